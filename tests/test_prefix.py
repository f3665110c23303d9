"""What all prompts begin with, computed once: the same answers for less work."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from small_decoder import decoder, weights_of

import jes
from jes.core.noise import Noise
from jes.core.population import perturb_members
from jes.quantize import quantize
from jes.questions import MODES, Evaluation, padded_lengths, prepare
from jes.rollout import answer_each, ask, examine
from jes.sampling.generate import Sampling, decode, unrolled
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.packing import computed_tokens, text_tokens
from jes.sampling.prompts import batches, pad, share
from jes.tasks.task import Reward, Task

MODEL = decoder()
RNG = np.random.default_rng(0)
SHOTS = RNG.integers(0, 50, 37).tolist()
"""Of which 32 are shared, in multiples of 8."""
PROMPTS = [SHOTS + RNG.integers(0, 50, n).tolist() for n in (9, 3, 12, 1, 7)]
BUCKETS = (16, 24, 40, 64)
SAMPLING = Sampling(max_new_tokens=6, eos_ids=(7,))


@pytest.fixture(scope="module")
def params() -> dict:
    return weights_of(MODEL)


def test_share_splits_prompts() -> None:
    rest = share(PROMPTS, BUCKETS)
    prefix = rest.prefix
    assert prefix is not None
    assert prefix.tokens.shape == (1, 40)
    assert prefix.tokens[0, 8:].tolist() == SHOTS[:32]
    assert prefix.positions[0].tolist() == [-1] * 8 + list(range(32))
    assert rest.tokens.shape == (5, 24)
    for row, positions, prompt in zip(*rest[:2], PROMPTS, strict=True):
        own = positions >= 0
        assert row[own].tolist() == prompt[32:]
        assert positions[own].tolist() == list(range(32, len(prompt)))


def test_share_leaves_what_does_not_pay() -> None:
    def nothing(prompts: list[list[int]], *args: tuple, **settings: tuple) -> None:
        rest = share(prompts, *(args or (BUCKETS,)), **settings)
        assert rest.prefix is None
        np.testing.assert_equal(rest, pad(prompts, *(args or (BUCKETS,))))

    nothing(PROMPTS[:1])  # nobody to share with
    nothing([prompt[:40] for prompt in PROMPTS[:2]])  # 40 + 2 x 16 for 2 x 40 tokens
    nothing([[1, *prompt] if i else prompt for i, prompt in enumerate(PROMPTS)])
    nothing([prompt[25:] for prompt in PROMPTS])  # 12 tokens in common
    nothing(PROMPTS, (64,))  # one length: the rest would be as long
    nothing(PROMPTS, parts=())
    # Every prompt keeps its last token: what follows is predicted from there.
    rest = share([SHOTS[:32]] * 4, BUCKETS)
    assert rest.prefix is not None
    assert (rest.prefix.positions >= 0).sum() == 24
    assert (rest.positions >= 0).sum(1).tolist() == [8] * 4


@pytest.mark.slow
def test_logits_after_a_prefix_are_those_of_the_whole(params: dict) -> None:
    for model, weights in (
        (MODEL, params),
        (MODEL.unrolled(), MODEL.unrolled_params(params)),
    ):
        run = jax.jit(partial(model.apply, {"params": weights}), static_argnames="last")
        rest = share(PROMPTS, BUCKETS)
        assert rest.prefix is not None
        _, shared = run(*map(jnp.asarray, rest.prefix[:2]))
        got, cache = run(*map(jnp.asarray, rest[:2]), last=1, prefix=shared)
        # A token after it, which sees prefix and cache.
        token = jnp.full((len(PROMPTS), 1), 3)
        position = jnp.asarray(rest.positions[:, -1:]) + 1
        after, _ = run(token, position, cache.extended(1), prefix=shared)
        full = pad([[*prompt, 3] for prompt in PROMPTS], BUCKETS)
        whole, _ = run(*map(jnp.asarray, full[:2]), last=2)
        np.testing.assert_allclose(got[:, 0], whole[:, 0], atol=1e-5)
        np.testing.assert_allclose(after[:, 0], whole[:, 1], atol=1e-5)


def test_positions_follow_the_prefix(params: dict) -> None:
    run = jax.jit(partial(MODEL.apply, {"params": params}))
    _, shared = run(jnp.array([SHOTS]))
    got, _ = run(jnp.array([[4, 5]]), prefix=shared)
    whole, _ = run(jnp.array([[*SHOTS, 4, 5]]))
    np.testing.assert_allclose(got, whole[:, -2:], atol=1e-5)


def test_greedy_answers_are_the_same(params: dict) -> None:
    answer = partial(
        jes.generate, MODEL, params, PROMPTS, 6, eos_ids=(7,), buckets=BUCKETS
    )
    assert answer() == answer(share_prefix=False) == answer(batch_size=2)
    assert len({tuple(row) for row in answer()}) == len(PROMPTS)


@pytest.mark.parametrize("quantized", slow_except({False}, [False, True]))
def test_members_read_a_prefix_each(params: dict, quantized: bool) -> None:
    if quantized:
        params = quantize(params, bits=4, group_size=16)
    noise = Noise(sigma=0.5 if quantized else 0.05)
    members = perturb_members(params, jax.random.key(2), jnp.arange(3), noise)
    run = partial(decode, MODEL.unrolled(), unrolled(MODEL, members))
    batch = share(PROMPTS, BUCKETS)
    assert batch.prefix is not None
    got = np.asarray(run(batch, SAMPLING))
    assert got.tolist() == run(pad(PROMPTS, BUCKETS), SAMPLING).tolist()
    assert len({row.tobytes() for row in got}) == 3


def test_likelihoods_are_the_same(params: dict) -> None:
    choices = [[[4], [5, 6, 7]]] * len(PROMPTS)
    noise = Noise(sigma=0.05)
    members = perturb_members(params, jax.random.key(2), jnp.arange(2), noise)
    batch = pack_choices(PROMPTS, choices, BUCKETS, None)
    assert batch.texts.prefix is not None
    whole = pack_choices(PROMPTS, choices, BUCKETS)
    assert whole.texts.prefix is None
    assert computed_tokens(batch.texts) < computed_tokens(whole.texts) / 2
    got = log_likelihoods(MODEL, members, batch)
    np.testing.assert_allclose(got, log_likelihoods(MODEL, members, whole), rtol=1e-5)


def test_the_shortest_prefix_that_is_shared() -> None:
    for common, shared in ((16, 16), (15, 0)):
        prompts = [[*SHOTS[:common], i, i + 1] for i in range(40, 45)]
        rest = share(prompts, (8, 24))
        found = 0 if rest.prefix is None else int((rest.prefix.positions >= 0).sum())
        assert found == shared


def test_a_prompt_keeps_the_token_before_its_choices() -> None:
    """Which predicts the first of each; of 32 tokens in common 24 are shared then."""
    batch = pack_choices([SHOTS[:32]] * 4, [[[4], [5]]] * 4, BUCKETS, None)
    assert batch.texts.prefix is not None
    assert text_tokens(batch.texts.prefix) == 24
    assert text_tokens(batch.texts) == 24 + 4 * 8


def test_prompts_of_a_family_are_answered_together() -> None:
    rng = np.random.default_rng(1)
    families = [rng.integers(0, 50, 200).tolist() for _ in range(3)]
    prompts = [families[i % 3] + rng.integers(0, 50, 20).tolist() for i in range(30)]
    plan = batches(prompts, 16, 8)
    assert sorted(i for chosen, _ in plan for i in chosen) == list(range(30))
    assert all(len({i % 3 for i in chosen}) == 1 for chosen, _ in plan)
    assert [rows for _, rows in plan] == [16, 16, 16]
    # With little to share it is the length that counts, and batches are full.
    short = [prompt[190:] for prompt in prompts]
    lengths = [10 + i % 7 for i in range(30)]
    short = [prompt[:n] for prompt, n in zip(short, lengths, strict=True)]
    for some, parts in ((short, None), (prompts, ())):
        plan = batches(some, 16, 8, parts=parts)
        assert [(len(chosen), rows) for chosen, rows in plan] == [(16, 16), (14, 16)]
        counts = [len(some[i]) for chosen, _ in plan for i in chosen]
        assert counts == sorted(counts)


def shots(pretrained: jes.Pretrained, mode: str) -> Evaluation:
    """Sums after worked examples of one of two kinds."""
    kinds = ["".join(f"{i}+{j}={i + j} " for i in range(9)) for j in (1, 2)]
    examples = tuple({"kind": n % 2, "a": n, "b": 3 * n + 1} for n in range(3, 17))
    task = Task(
        name="shots",
        train=examples,
        test=examples,
        prompt=lambda row: f"{kinds[row['kind']]}{row['a']}+{row['b']}=",
        reward=lambda example, text: Reward(len(text) % 7, "1" in text, False, False),
        choices=lambda example: ["1", "22", "3"],
        answer=lambda example: example["a"] % 3,
        max_new_tokens=5,
    )
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        sampling=Sampling(eos_ids=pretrained.eos_ids),
        mode=mode,
    )


@pytest.mark.parametrize("mode", slow_except({"likelihood"}, MODES))
def test_scores_are_the_same(mode: str, small_model: Path) -> None:
    pretrained = jes.load(small_model)
    evaluation, params = shots(pretrained, mode), pretrained.params
    whole = dataclasses.replace(evaluation, parts=())
    questions = prepare(evaluation, evaluation.task.test)
    assert padded_lengths(whole, questions)[0] == 0
    odd = questions[::2]
    assert padded_lengths(evaluation, odd)[0] >= 48
    got, expected = (examine(each, params, questions) for each in (evaluation, whole))
    np.testing.assert_equal(got, expected)
    noise, key = Noise(sigma=0.02), jax.random.key(3)
    settings = {"noise": noise, "population": 3, "chunk": 2}
    got, expected = (
        ask(each, params, key, odd, **settings) for each in (evaluation, whole)
    )
    np.testing.assert_equal(got, expected)
    members = np.arange(3)
    got, expected = (
        answer_each(each, params, key, odd, members, noise=noise, batch_size=4)
        for each in (evaluation, whole)
    )
    np.testing.assert_equal(got, expected)
