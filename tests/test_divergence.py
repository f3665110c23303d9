"""KL to the base model on its own answers, and distances by kind of tensor."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jes
from jes.core.anchor import MOVED, displacement, kind_of
from jes.sampling.kl import Answers, divergence, sample_answers


@pytest.fixture(scope="module")
def base(small_model: Path) -> jes.Pretrained:
    return jes.load(small_model)


@pytest.fixture(scope="module")
def answers(base: jes.Pretrained) -> Answers:
    prompts = [base.tokenizer.encode(p) for p in ("12+3=", "reverse abc:", "max a)1")]
    return sample_answers(
        base.model,
        base.params,
        prompts * 5,
        6,
        key=jax.random.key(0),
        eos_ids=base.eos_ids,
        batch_size=4,
    )


def noisy(params: dict, sigma: float) -> dict:
    return jes.perturb(params, jax.random.key(7), sigma)


def test_answers_keep_their_end_token(base: jes.Pretrained, answers: Answers) -> None:
    ends = [answer[-1] in base.eos_ids for answer in answers.answers]
    assert all(
        len(answer) == 6 or end
        for answer, end in zip(answers.answers, ends, strict=True)
    )
    assert not any(set(answer[:-1]) & set(base.eos_ids) for answer in answers.answers)
    assert len(set(ends)) == 2  # both kinds are there


def test_none_to_itself_and_to_shifted_logits(
    base: jes.Pretrained, answers: Answers
) -> None:
    same = divergence(base.model, base.params, base.params, answers)
    assert same[:4] == (0, 0, 0, 0)
    assert same.tokens == sum(map(len, answers.answers))

    class Shifted:
        """The decoder, with a constant added to every logit."""

        def apply(self, variables: dict, *args: object, **kwargs: object) -> tuple:
            inner = {"params": variables["params"]["inner"]}
            logits, cache = base.model.apply(inner, *args, **kwargs)
            return logits + variables["params"]["shift"], cache

    shifts = [
        {"inner": base.params, "shift": jnp.full((1, 1, 1), by)} for by in (0.0, 3.0)
    ]
    shifted = divergence(Shifted(), *shifts, answers)
    np.testing.assert_allclose(shifted[:4], 0, atol=1e-6)


def test_against_a_plain_reading(base: jes.Pretrained, answers: Answers) -> None:
    """One answer at a time, without padding."""
    answers = Answers(answers.prompts[:4], answers.answers[:4])
    tuned = noisy(base.params, 0.05)
    sampled, full, lengths = [], [], []
    apply = jax.jit(base.model.apply)
    for prompt, answer in zip(*answers, strict=True):
        tokens = jnp.array([prompt + answer])
        logs = [
            jax.nn.log_softmax(apply({"params": p}, tokens)[0][0])
            for p in (base.params, tuned)
        ]
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        ratio = np.asarray(logs[0] - logs[1])[at]
        sampled.append(ratio[np.arange(len(answer)), answer].sum())
        full.append((np.exp(np.asarray(logs[0])[at]) * ratio).sum())
        lengths.append(len(answer))
    for batch_size in (3, 100):
        found = divergence(
            base.model, base.params, tuned, answers, batch_size=batch_size
        )
        expected = (
            sum(sampled) / sum(lengths),
            np.mean(np.array(sampled) / lengths),
            sum(full) / sum(lengths),
        )
        np.testing.assert_allclose(found[:3], expected, rtol=1e-4)
        assert found.tokens == sum(lengths)


@pytest.mark.slow
def test_answers_as_long_as_a_bucket(base: jes.Pretrained) -> None:
    """A batch of short rows is narrower than the longest answer; its sums are whole."""
    tuned = noisy(base.params, 0.05)
    rng = np.random.default_rng(0)
    lengths = [(2, 5), (3, 6), (4, 20), (2, 30), (30, 30)]
    made = [[rng.integers(3, 60, n).tolist() for n in pair] for pair in lengths]
    answers = Answers(*map(list, zip(*made, strict=True)))
    settings = {"batch_size": 2, "buckets": (8, 16, 32)}  # the last row needs 60
    found = divergence(base.model, base.params, tuned, answers, **settings)
    whole = divergence(
        base.model, base.params, tuned, answers, batch_size=5, buckets=(64,)
    )
    np.testing.assert_allclose(found[:4], whole[:4], rtol=1e-4)
    assert found.tokens == 91


def test_sampled_and_full_agree_and_grow_with_the_distance(
    base: jes.Pretrained,
) -> None:
    prompts = [base.tokenizer.encode(f"{n}+{n}=") for n in range(100)] * 4
    key = jax.random.key(1)
    answers = sample_answers(
        base.model, base.params, prompts, 5, key=key, eos_ids=base.eos_ids
    )
    near, far = (
        divergence(
            base.model, base.params, noisy(base.params, s), answers, batch_size=100
        )
        for s in (0.01, 0.1)
    )
    assert 0 < near.full < far.full
    # The sampled one has the same mean: within four of its standard errors, which for
    # a small KL is about sqrt(2 KL / tokens).
    for found in (near, far):
        error = (2 * found.full / found.tokens) ** 0.5
        assert abs(found.sampled - found.full) < 4 * error
        assert 0 < found.error < 0.2 * found.full


def test_distances_by_kind(base: jes.Pretrained) -> None:
    assert kind_of("layers/attention/q/kernel") == "attention"
    assert kind_of("layers/attention/q/bias") == "bias"
    assert kind_of("layers/attention/q_norm/scale") == "norm"
    assert kind_of("embed/embedding") == "embedding"
    assert kind_of("lm_head") == "lm_head"
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.5 if "'mlp'" in str(path) else leaf + MOVED / 4,
        base.params,
    )
    far = jes.distance(moved, base.params)
    inside = sum(leaf.size for leaf in jax.tree.leaves(base.params["layers"]["mlp"]))
    total = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    assert set(far.norms) == {"embedding", "attention", "mlp", "norm", "bias"}
    assert far.moved_shares["mlp"] == 1
    assert far.moved == pytest.approx(inside / total)
    assert far.norms["mlp"] == pytest.approx(0.5 * inside**0.5, rel=1e-5)
    assert far.norm == pytest.approx(float(displacement(moved, base.params)), rel=1e-5)
    assert far.largest == pytest.approx(0.5, rel=1e-5)
    flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(base.params)]
    size = np.linalg.norm(np.concatenate(flat).astype(np.float64))
    assert far.relative == pytest.approx(far.norm / size, rel=1e-5)
