"""GRPO: advantages, log-probabilities, the loss and its gradient, learning."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jes
from jes.baselines.gradient import descend
from jes.baselines.grpo import (
    CLIP,
    KL,
    Batch,
    Grpo,
    advantages,
    divergence,
    improve,
    log_probabilities,
    rollout,
)
from jes.core.anchor import displacement, keep_anchor
from jes.errors import InputError
from jes.questions import Evaluation, Question, prepare
from jes.sampling.generate import Sampling, trim
from jes.tasks import load_task
from jes.tasks.task import Reward

slopes = jax.jit(
    jax.value_and_grad(Grpo.loss, argnums=2, has_aux=True), static_argnums=(0, 1)
)
logs_of = jax.jit(log_probabilities, static_argnums=0)
SETTINGS = Grpo(group=4, minibatch=24, learning_rate=1e-3)


def make_evaluation(
    pretrained: jes.Pretrained, name: str, **settings: Any
) -> Evaluation:
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=load_task(name, root="", seed=0, train_examples=64, test_examples=16),
        sampling=Sampling(eos_ids=pretrained.eos_ids),
        buckets=(24,),
        **settings,
    )


@pytest.fixture(scope="module")
def evaluation(small_model: Path) -> Evaluation:
    return make_evaluation(jes.load(small_model), "tiny/reverse")


@pytest.fixture(scope="module")
def params(small_model: Path) -> dict:
    return jes.load(small_model).params


@pytest.fixture(scope="module")
def questions(evaluation: Evaluation) -> list[Question]:
    return prepare(evaluation, evaluation.task.train)[:6]


@pytest.fixture(scope="module")
def batch(evaluation: Evaluation, params: dict, questions: list[Question]) -> Batch:
    sampled, _, _ = rollout(SETTINGS, evaluation, params, questions, jax.random.key(0))
    drawn = np.random.default_rng(0).standard_normal(24).astype(np.float32)
    return sampled._replace(advantages=drawn)


def improved(
    evaluation: Evaluation, params: dict, reference: Any, batch: Batch, **changes: Any
) -> tuple[dict, Any, dict[str, float]]:
    """The weights, the optimizer's state and the metrics after the steps."""
    settings = dataclasses.replace(SETTINGS, **changes)
    mine = jax.tree.map(jnp.array, params)
    before = mine, settings.optimizer.init(mine)
    key = jax.random.key(4)
    after, metrics = improve(settings, evaluation.model, before, reference, batch, key)
    return *after, metrics


def test_advantages_compare_within_a_group() -> None:
    got = advantages(
        np.array(
            [
                [1, 0, 0, 1],
                [0.1, 0.1, 0.1, 0.1],
                [3, np.nan, 1, np.inf],
                [np.nan, 5, np.nan, -np.inf],
                [np.nan] * 4,
            ]
        )
    )
    half = 0.5 / (3**-0.5 + 1e-6)  # ddof 1
    pair = 1 / (2**0.5 + 1e-6)
    expected = [[half, -half, -half, half], [0] * 4, [pair, 0, -pair, 0]]
    np.testing.assert_allclose(got[:3], expected, rtol=1e-6)
    assert not got[[1, 3, 4]].any()
    assert got.dtype == np.float32


def test_rollout_lays_out_what_was_answered_and_rewards_it(
    evaluation: Evaluation, params: dict, questions: list[Question]
) -> None:
    # An end token that random weights do choose now and then.
    sampling = dataclasses.replace(evaluation.sampling, eos_ids=tuple(range(20)))
    evaluation = dataclasses.replace(evaluation, sampling=sampling)
    settings = dataclasses.replace(SETTINGS, batch_size=10)
    batch, rewards, score = rollout(
        settings, evaluation, params, questions, jax.random.key(0)
    )
    tokens, positions, answered, gains = batch
    room = evaluation.max_new_tokens
    answers = trim(tokens[:, -room:], evaluation.eos_ids)
    for row, answer in enumerate(answers):
        question = questions[row // 4]
        length = len(question.prompt)
        assert tokens[row, 24 - length : 24].tolist() == question.prompt
        expected = [-1] * (24 - length) + list(range(length + room))
        assert positions[row].tolist() == expected
        chosen = min(len(answer) + 1, room)
        assert answered[row].tolist() == [i < chosen for i in range(room)]
        text = evaluation.tokenizer.decode(answer)
        value = evaluation.task.reward(question.example, text).value
        assert rewards[row // 4, row % 4] == value
    assert len({tuple(answer) for answer in answers}) > 12
    assert 0 < np.mean([len(answer) == room for answer in answers]) < 1
    assert score.truncated == np.mean([len(answer) == room for answer in answers])
    assert score.tokens == answered.sum()
    assert score.reward == pytest.approx(rewards.mean())
    np.testing.assert_array_equal(gains, advantages(rewards).ravel())


def test_rollout_survives_rewards_that_are_not_finite(
    evaluation: Evaluation, params: dict, questions: list[Question]
) -> None:
    def reward(example: Any, text: str) -> Reward:
        return Reward(np.nan if "a" in text else len(text), False, False, False)

    task = dataclasses.replace(evaluation.task, reward=reward)
    evaluation = dataclasses.replace(evaluation, task=task)
    batch, rewards, score = rollout(
        SETTINGS, evaluation, params, questions, jax.random.key(0)
    )
    finite = np.isfinite(rewards)
    assert 0 < finite.sum() < finite.size
    assert score.reward == rewards[finite].mean()
    assert np.isfinite(batch.advantages).all()
    assert not batch.advantages[~finite.ravel()].any()


def test_log_probabilities_are_those_of_cached_steps(
    evaluation: Evaluation, params: dict, batch: Batch
) -> None:
    model, room = evaluation.model, evaluation.max_new_tokens
    prompt, answer = batch.tokens[:, :-room], batch.tokens[:, -room:]
    run = jax.jit(partial(model.apply, last=1))
    variables = {"params": params}
    logits, cache = run(variables, prompt, batch.positions[:, :-room])
    cache = cache.extended(room - 1)
    expected = []
    for i in range(room):
        logs = jax.nn.log_softmax(logits[:, 0] / 0.7)
        expected.append(logs[np.arange(len(answer)), answer[:, i]])
        if i < room - 1:
            at = batch.positions[:, i - room, None]
            token = answer[:, i, None]
            logits, cache = run(variables, token, at, cache)
    expected = np.where(batch.answered, np.stack(expected, 1), 0)
    got = logs_of(model, params, batch, 0.7)
    # float32 sums in another order: some ulps of logits near 10.
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_sampler_draws_from_these_probabilities(
    evaluation: Evaluation, params: dict, questions: list[Question]
) -> None:
    settings = Grpo(group=4000, temperature=1.5, batch_size=4000)
    sampling = dataclasses.replace(evaluation.sampling, max_new_tokens=1)
    evaluation = dataclasses.replace(evaluation, sampling=sampling)
    key = jax.random.key(1)
    batch, _, _ = rollout(settings, evaluation, params, questions[:1], key)
    logs = np.asarray(logs_of(evaluation.model, params, batch, 1.5))
    first, index, seen = np.unique(
        batch.tokens[:, -1], return_index=True, return_counts=True
    )
    expected = 4000 * np.exp(logs[index, 0])
    assert len(first) > 20
    # Counts are binomial: no more than 5 standard deviations off.
    assert (abs(seen - expected) < 5 * np.sqrt(expected) + 1).all()


def test_divergence_is_never_negative_and_unbiased() -> None:
    rng = np.random.default_rng(0)
    logs, reference = jax.nn.log_softmax(jnp.array(rng.normal(size=(2, 200))))
    estimate = divergence(logs, reference)
    assert (estimate >= 0).all()
    assert not divergence(logs, logs).any()
    exact = (jnp.exp(logs) * (logs - reference)).sum()
    expected = (jnp.exp(logs) * estimate).sum()
    np.testing.assert_allclose(expected, exact, rtol=1e-5)
    assert np.isfinite(divergence(jnp.float32(-1e3), jnp.float32(0)))


class Bigrams:
    """A model whose logits depend on the last token alone."""

    def apply(
        self, variables: dict, tokens: jax.Array, positions: jax.Array, *, last: int
    ) -> tuple[jax.Array, None]:
        return variables["params"]["table"][tokens][:, -last:], None


WORDS = 5


def bigram_batch() -> tuple[Batch, np.ndarray, np.ndarray, np.ndarray]:
    """Answers of 1 to 4 tokens; tables of the policy, of the sampler, of the base."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, WORDS, (12, 7)).astype(np.int32)
    answered = np.arange(4) < rng.integers(1, 5, (12, 1))
    drawn = rng.standard_normal(12).astype(np.float32)
    tables = rng.normal(size=(3, WORDS, WORDS))
    tables[1] = tables[0] + 0.3 * tables[1]
    return Batch(tokens, np.zeros_like(tokens), answered, drawn), *tables


def table_logs(table: np.ndarray) -> np.ndarray:
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def written_out(
    table: np.ndarray, old: np.ndarray, base: np.ndarray, batch: Batch
) -> float:
    """The loss as 2402.03300 writes it, in float64, one token after another."""
    total = 0.0
    new, old, base = map(table_logs, (table, old, base))
    for tokens, answered, gain in zip(
        batch.tokens, batch.answered, batch.advantages, strict=True
    ):
        terms = []
        for i in range(int(answered.sum())):
            at = tokens[2 + i], tokens[3 + i]
            ratio = np.exp(new[at] - old[at])
            limited = min(max(ratio, 1 - CLIP), 1 + CLIP)
            r = np.exp(base[at] - new[at])
            kl = r - np.log(r) - 1
            terms.append(min(ratio * gain, limited * gain) - KL * kl)
        total += np.mean(terms)
    return -total / len(batch.tokens)


def test_loss_and_gradient_are_those_of_the_formula() -> None:
    batch, table, old, base = bigram_batch()

    def logs(values: np.ndarray) -> jax.Array:
        given = {"table": jnp.float32(values)}
        return log_probabilities(Bigrams(), given, batch)

    (got, metrics), gradient = slopes(
        SETTINGS,
        Bigrams(),
        {"table": jnp.float32(table)},
        batch,
        logs(old),
        logs(base),
    )
    np.testing.assert_allclose(got, written_out(table, old, base, batch), rtol=1e-5)
    expected = np.zeros_like(table)
    for i, j in np.ndindex(*table.shape):
        step = np.zeros_like(table)
        step[i, j] = 1e-6
        above = written_out(table + step, old, base, batch)
        below = written_out(table - step, old, base, batch)
        expected[i, j] = (above - below) / 2e-6
    np.testing.assert_allclose(gradient["table"], expected, atol=1e-6)
    assert 0 < metrics["clipped"] < 1
    assert abs(expected).max() > 0.05


@pytest.mark.parametrize(
    ("ratio", "gain", "moves"),
    [
        (1.1, 1, True),
        (1.3, 1, False),  # better, and already likelier by more than the clip
        (0.7, 1, True),
        (1.3, -1, True),
        (0.7, -1, False),  # worse, and already less likely
        (0.9, -1, True),
    ],
)
def test_clipping_stops_what_has_gone_far_enough(
    ratio: float, gain: float, moves: bool
) -> None:
    tokens = np.array([[1, 2]], np.int32)
    batch = Batch(tokens, tokens, np.ones((1, 1), bool), np.float32([gain]))
    params = {"table": jnp.zeros((WORDS, WORDS))}
    logs = log_probabilities(Bigrams(), params, batch)
    (_, metrics), gradient = slopes(
        SETTINGS, Bigrams(), params, batch, logs - np.log(ratio), logs
    )
    assert bool(gradient["table"].any()) == moves
    assert metrics["clipped"] == (not moves)


def test_the_first_gradient_is_reinforce_with_group_advantages(
    evaluation: Evaluation, params: dict, batch: Batch
) -> None:
    def reinforce(params: dict) -> jax.Array:
        logs = log_probabilities(evaluation.model, params, batch)
        per_answer = logs.sum(-1) / batch.answered.sum(-1)
        return -(per_answer * batch.advantages).mean()

    old = logs_of(evaluation.model, params, batch)
    (_, metrics), gradient = slopes(SETTINGS, evaluation.model, params, batch, old, old)
    chex.assert_trees_all_close(
        gradient, jax.jit(jax.grad(reinforce))(params), atol=1e-6
    )
    assert metrics["clipped"] == 0
    assert metrics["kl"] < 1e-12
    expected = -(old.sum() / batch.answered.sum())
    np.testing.assert_allclose(metrics["entropy"], expected, rtol=1e-6)


def test_improve_takes_the_steps_that_it_says(
    evaluation: Evaluation, params: dict, batch: Batch
) -> None:
    """Three minibatches, against the same steps written out."""
    settings = dataclasses.replace(SETTINGS, minibatch=8)
    model, optimizer = evaluation.model, settings.optimizer
    update = jax.jit(optimizer.update)
    expected, state = params, optimizer.init(params)
    old = logs_of(model, params, batch)
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(4), 0), 24)
    for rows in np.asarray(order).reshape(3, 8):
        part = jax.tree.map(lambda array, rows=rows: array[rows], batch)
        _, gradient = slopes(settings, model, expected, part, old[rows], old[rows])
        updates, state = update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    start = descend._cache_size()
    got, got_state, metrics = improved(evaluation, params, params, batch, minibatch=8)
    assert descend._cache_size() - start == 1
    # Adam divides by √v: where gradients nearly vanish, rounding counts.
    chex.assert_trees_all_close(got, expected, atol=2e-5)
    assert got_state[1][0].count == 3
    assert 0 < displacement(got, params) < 3 * 1e-3 * 12_000**0.5 * 1.1
    assert metrics.keys() == {"loss", "kl", "clipped", "entropy", "gradient_norm"}
    assert metrics["kl"] > 0


@pytest.mark.slow
def test_microbatches_add_up_to_the_minibatch(
    evaluation: Evaluation, params: dict, batch: Batch
) -> None:
    """The same gradient, from less memory."""
    (_, whole, expected), (_, parts, metrics) = (
        improved(evaluation, params, params, batch, microbatch=held) for held in (0, 4)
    )
    chex.assert_trees_all_close(whole[1][0].mu, parts[1][0].mu, rtol=1e-4, atol=1e-8)
    for name in ("loss", "gradient_norm", "clipped"):
        assert expected[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("place", "stored", "kl"),
    [
        ("host", None, 1e-12),  # one minibatch: still the base model
        ("bfloat16", None, 1e-3),  # of a rounded base: not quite nothing
        ("device", jnp.bfloat16, 1e-12),  # exact where the files hold no more
    ],
)
def test_the_reference_may_be_kept_elsewhere_or_in_less(
    evaluation: Evaluation, batch: Batch, params: dict, place: str, stored: Any, kl: Any
) -> None:
    if stored is not None:
        params = jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), params)
    reference = keep_anchor(params, place, stored)
    *_, metrics = improved(evaluation, params, reference, batch)
    assert metrics["kl"] < kl


def test_nothing_is_learned_from_groups_that_tie(
    evaluation: Evaluation, batch: Batch, params: dict
) -> None:
    tied = batch._replace(advantages=np.zeros(24, np.float32))
    got, *_ = improved(evaluation, params, params, tied)
    chex.assert_trees_all_equal(got, params)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_reward_rises() -> None:
    pretrained = jes.load("tiny")
    evaluation = make_evaluation(pretrained, "tiny/min")
    settings = Grpo(group=16, minibatch=128, learning_rate=3e-4)
    base = keep_anchor(pretrained.params)
    state = pretrained.params, settings.optimizer.init(pretrained.params)
    questions = prepare(evaluation, evaluation.task.train)
    rewards = []
    for i in range(8):
        key = jax.random.key(i)
        chosen = questions[16 * (i % 4) :][:16]
        batch, _, score = rollout(settings, evaluation, state[0], chosen, key)
        rewards.append(score.reward)
        state, _ = improve(settings, evaluation.model, state, base, batch, key)
    # 256 answers of 16 prompts: the mean is known to 0.06 or so.
    assert np.mean(rewards[:2]) < 0.3
    assert np.mean(rewards[-2:]) > 0.45


def test_diverged_weights_are_reported(
    evaluation: Evaluation, batch: Batch, params: dict
) -> None:
    diverged = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(InputError, match="learning_rate"):
        improved(evaluation, diverged, params, batch)
