"""GRPO (2402.03300): the policy gradient that evolution strategies are compared with.

One generation (`step`): `rollout` samples a group of answers to every prompt from the
current weights and rewards them; `improve` takes one optimizer step for each minibatch
of the shuffled answers. A group is as large as a population of ES; prompts, rewards and
sampler are those of `jes.rollout`, so that a comparison differs in the update only. The
weights that train are float32.

Left out on purpose: a critic and an entropy bonus.

Axis letters: P prompts, G answers a prompt (its group), R = P·G rows, prompt by prompt,
T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jes import memory
from jes.baselines.gradient import check_finite, descend, largest_divisor
from jes.core.members import unperturbed
from jes.core.noise import PyTree, generation_key
from jes.core.placement import on_device
from jes.core.tree import with_dtype
from jes.errors import InputError
from jes.experiment import Experiment, State, pick
from jes.questions import Evaluation, Question
from jes.sampling.generate import decode, trim, unrolled_params
from jes.sampling.prompts import pad
from jes.scoring import Score, mean_score, rewards_of

CLIP_NORM = 1.0
"""Largest global norm of a minibatch's gradient."""
MOST_NATS = 20.0
"""Log-ratios are cut off here: exp(89) is infinite in float32, and one infinite token
would make the whole gradient NaN."""


def resolve(experiment: Experiment) -> dict[str, int]:
    """The microbatch that the memory holds; see `jes.train.Method`."""
    settings = settings_of(experiment)
    rows = memory.rows_of_gradient(
        experiment.pretrained.config,
        experiment.parameters,
        experiment.evaluation.buckets[0],
        experiment.evaluation.max_new_tokens,
        budget=int(experiment.settings.memory_gb * 1e9) or memory.free_bytes(),
    )
    return {"microbatch": largest_divisor(settings.minibatch, rows)}


def init(experiment: Experiment) -> Any:
    """The optimizer's state before the first generation."""
    return make_optimizer(settings_of(experiment)).init(experiment.pretrained.params)


def step(
    experiment: Experiment,
    state: State,
    base: PyTree,
    resolved: dict[str, int],
    check_stop: Callable[[], None],
) -> tuple[State, dict[str, Any], None]:
    """One generation: `rollout`, then `improve`; see `jes.train.Method`."""
    settings = settings_of(experiment, **resolved)
    key = generation_key(state.root, state.generation)
    answered = rollout(
        experiment.evaluation,
        state.params,
        pick(experiment, state.generation),
        key,
        settings,
        batch_size=experiment.settings.eval_batch,
        before_batch=check_stop,
    )
    rewards = answered.rewards[np.isfinite(answered.rewards)]
    if not rewards.size:
        raise InputError(
            f"generation {state.generation}: no answer has a finite reward"
        )
    params, opt_state, learned = improve(
        settings,
        experiment.pretrained.model,
        state.params,
        state.opt_state,
        base,
        answered.batch,
        key,
    )
    score = answered.score
    figures = {
        "fitness_mean": float(rewards.mean()),
        "fitness_max": float(rewards.max()),
        "fitness_std": float(rewards.std()),
        "accuracy": float(score.accuracy),
        "strict": float(score.strict),
        "formatted": float(score.formatted),
        "truncated": float(score.truncated),
        "tokens": int(score.tokens),
        **learned,
    }
    return State(state.root, state.generation + 1, params, opt_state), figures, None


def settings_of(experiment: Experiment, microbatch: int = 0) -> "Grpo":
    """The settings of the baseline in a run.

    Raises:
      InputError: if the task asks two questions, or the minibatch does not fit.
    """
    settings = experiment.settings
    if experiment.evaluation.task.meta is not None:
        raise InputError(f"GRPO asks one question; task {settings.task} asks two")
    answers = experiment.prompts * settings.population
    return Grpo(
        prompts=experiment.prompts,
        group=settings.population,
        learning_rate=settings.grpo.learning_rate,
        minibatch=settings.grpo.minibatch or answers,
        microbatch=microbatch,
        temperature=settings.temperature or 1.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Settings of the baseline.

    The defaults are those that 2605.30148 ran verl with, but without its weight decay
    of 0.01, which pulls towards zero and would blur what is measured as forgetting.

    Attributes:
      prompts: P, prompts per iteration.
      group: G, answers sampled to each prompt.
      learning_rate: of AdamW without decay, in units of the weights.
      clip: the ratio to the sampling policy counts up to 1 ± clip.
      kl: weight of the divergence from the base model, in reward per nat.
      minibatch: rows (answers) per optimizer step; a divisor of P·G.
      microbatch: rows whose logits and activations are in memory at once; a divisor of
        `minibatch`, 0 for all. It changes no result beyond the order of sums.
      epochs: how often each answer is used.
      temperature: of the sampled answers, and so of the policy that is trained.
    """

    prompts: int = 200
    group: int = 30
    learning_rate: float = 1e-6
    clip: float = 0.2
    kl: float = 0.001
    minibatch: int = 1000
    microbatch: int = 0
    epochs: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        rows, held = self.prompts * self.group, self.microbatch or self.minibatch
        right = {
            "prompts": (self.prompts >= 1, "at least 1"),
            "group": (self.group >= 2, "at least 2, or nothing can be compared"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "positive"),
            "clip": (0 < self.clip < math.inf, "positive"),
            "temperature": (0 < self.temperature < math.inf, "positive"),
            "kl": (0 <= self.kl < math.inf, "at least 0"),
            "minibatch": (
                self.minibatch >= 1 and not rows % self.minibatch,
                f"a divisor of {rows}",
            ),
            "microbatch": (
                held > 0 and not self.minibatch % held,
                f"a divisor of {self.minibatch}",
            ),
        }
        for name, (is_right, what) in right.items():
            if not is_right:
                raise InputError(f"{name} must be {what}, not {getattr(self, name)}")


class Batch(NamedTuple):
    """Answers to learn from.

    Attributes:
      tokens: int32 [R, T+N], left-padded prompt and answer.
      positions: int32 [R, T+N]: 0, 1, ... from the prompt's first token on, -1 before.
      answered: bool [R, N], which of the last N tokens the policy chose: the answer
        with its end token.
      advantages: float32 [R].
    """

    tokens: np.ndarray
    positions: np.ndarray
    answered: np.ndarray
    advantages: np.ndarray


class Rollout(NamedTuple):
    """Sampled answers and what they earned.

    Attributes:
      batch: to learn from.
      rewards: float64 [P, G].
      score: means over all answers, of the reward over those where it is finite;
        `tokens` is the number of tokens generated.
    """

    batch: Batch
    rewards: np.ndarray
    score: Score


def advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better an answer is than its group: (r - mean) / (std + 1e-6).

    2402.03300, section 4.1.2; std with ddof 1 and epsilon as in verl. A group that ties
    gets exactly 0. A reward that is not finite gets 0 and no part in the statistics.

    Args:
      rewards: [P, G]; higher is better.

    Returns:
      float32 [P, G].
    """
    rewards = np.asarray(rewards, np.float64)
    chex.assert_rank(rewards, 2)
    finite = np.isfinite(rewards)
    count = np.maximum(finite.sum(-1, keepdims=True), 1)
    kept = np.where(finite, rewards, 0)
    centred = np.where(finite, kept - kept.sum(-1, keepdims=True) / count, 0)
    variance = (centred**2).sum(-1, keepdims=True) / np.maximum(count - 1, 1)
    highest = np.where(finite, rewards, -np.inf).max(-1, keepdims=True)
    lowest = np.where(finite, rewards, np.inf).min(-1, keepdims=True)
    scaled = centred / (np.sqrt(variance) + 1e-6)
    return np.where(highest > lowest, scaled, 0).astype(np.float32)


def make_optimizer(settings: Grpo) -> optax.GradientTransformationExtraArgs:
    """AdamW behind a bound on the global norm of the gradient."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(settings.learning_rate, weight_decay=0.0),
    )


def rollout(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    key: jax.Array,
    settings: Grpo,
    *,
    batch_size: int = 256,
    before_batch: Callable[[], None] = lambda: None,
) -> Rollout:
    """Samples a group of answers to every question, and rewards them.

    Args:
      evaluation: the model, its task and the dtype of the weights that answer; the
        temperature comes from `settings`.
      params: the policy, float32.
      questions: the prompts [P].
      key: of the draws.
      settings: of the baseline.
      batch_size: rows decoded at once. The draws depend on it.
      before_batch: called before each batch; an exception from it changes nothing.

    Raises:
      InputError: if the evaluation scores by likelihood: nothing would be sampled.
    """
    if evaluation.mode != "generate":
        raise InputError(
            f"GRPO samples answers: mode 'generate', not {evaluation.mode}"
        )
    prompts = pad([q.prompt for q in questions], evaluation.buckets)
    rows = np.repeat(np.arange(len(questions)), settings.group)
    weights = unrolled_params(
        evaluation.model, with_dtype(params, jnp.dtype(evaluation.dtype))
    )
    sampling = dataclasses.replace(
        evaluation.sampling, temperature=settings.temperature, top_k=0, top_p=1.0
    )
    size = min(batch_size, len(rows))
    pieces = []
    for start in range(0, len(rows), size):
        before_batch()
        # The last batch is filled up so that it has the shape of the others.
        chosen = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
        answers = decode(
            evaluation.model.unrolled(),
            unperturbed(weights, jax.random.fold_in(key, start)),
            jax.tree.map(lambda array, chosen=chosen: array[chosen], prompts),
            sampling,
        )
        pieces.append(np.asarray(answers[0]))
    answers = np.concatenate(pieces)[: len(rows)]
    prompts = jax.tree.map(lambda array: array[rows], prompts)
    return _scored_rollout(evaluation, questions, prompts, answers)


def _scored_rollout(
    evaluation: Evaluation,
    questions: Sequence[Question],
    prompts: Any,
    answers: np.ndarray,
) -> Rollout:
    """Rewards the answers int32 [R, N] to the prompts [R, T], and lays them out."""
    group = len(answers) // len(questions)
    trimmed = [tuple(row) for row in trim(answers, evaluation.eos_ids)]
    asked = [(i // group, (answer,)) for i, answer in enumerate(trimmed)]
    earned = rewards_of(evaluation, questions, asked)
    rewards = earned[:, 0].reshape(-1, group)
    lengths = np.array([len(row) for row in trimmed])
    truncated = lengths == answers.shape[1]
    chosen = lengths + ~truncated  # the end token is chosen too
    steps = np.arange(answers.shape[1])
    batch = Batch(
        tokens=np.concatenate([prompts.tokens, answers], 1),
        positions=np.concatenate(
            [prompts.positions, prompts.positions[:, -1:] + 1 + steps], 1
        ).astype(np.int32),
        answered=steps < chosen[:, None],
        advantages=advantages(rewards).ravel(),
    )
    finite = rewards[np.isfinite(rewards)]
    value = finite.mean() if finite.size else np.nan
    score = mean_score(earned, truncated.mean(), int(chosen.sum()))
    score = score._replace(reward=value)
    return Rollout(batch, rewards, score)


def log_probabilities(
    model: Any, params: PyTree, batch: Batch, temperature: float = 1.0
) -> jax.Array:
    """Log-probability in nats of every answer token, by one forward pass.

    Args:
      model: a decoder.
      params: its parameters (one set, no member axis).
      batch: answers; advantages are not read.
      temperature: that they were sampled at.

    Returns:
      float32 [R, N]; 0 after an answer's end.
    """
    length = batch.answered.shape[1]
    tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
    logits, _ = model.apply(
        {"params": params}, tokens[:, :-1], positions[:, :-1], last=length
    )
    logs = jax.nn.log_softmax(logits / temperature, axis=-1)
    chosen = jnp.take_along_axis(logs, tokens[:, -length:, None], axis=-1)[..., 0]
    return jnp.where(batch.answered, chosen, 0)


def divergence(logs: jax.Array, reference: jax.Array) -> jax.Array:
    """Estimate of KL(p || p_ref) from samples of p: r - log r - 1, r = p_ref / p.

    The estimator of low variance, k3 in Schulman's 'Approximating KL divergence'
    (2020), which 2402.03300 takes (equation 4): never negative, unbiased.

    Args:
      logs, reference: log-probabilities of the samples under p and p_ref, in nats.

    Returns:
      In nats, of the same shape.
    """
    log_ratio = jnp.clip(reference - logs, -MOST_NATS, MOST_NATS)
    return jnp.expm1(log_ratio) - log_ratio


def loss(
    settings: Grpo,
    model: Any,
    params: PyTree,
    batch: Batch,
    old: jax.Array,
    reference: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What is minimised: the negative of 2402.03300, equation 3.

    Tokens are averaged over their answer first and then over the answers, 1/R Σ 1/|o|
    (not over all tokens at once, as verl and DAPO do: long answers count no more here).

    Args:
      settings: of the baseline.
      model: a decoder.
      params: the policy, float32.
      batch: answers.
      old: float32 [R, N], log-probabilities under the policy that sampled.
      reference: float32 [R, N], log-probabilities under the base model.

    Returns:
      float32 scalar, and means over all tokens: `kl` in nats (see `divergence`),
      `clipped`, the share whose ratio is clipped, and `entropy`, -log p in nats.
    """
    logs = log_probabilities(model, params, batch, settings.temperature)
    ratio = jnp.exp(jnp.clip(logs - old, -MOST_NATS, MOST_NATS))
    advantage = jnp.asarray(batch.advantages)[:, None]
    free = ratio * advantage
    bounded = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip) * advantage
    kl = divergence(logs, reference)
    gain = jnp.minimum(free, bounded) - settings.kl * kl
    answered = jnp.asarray(batch.answered)
    per_answer = (gain * answered).sum(-1) / answered.sum(-1)
    tokens = answered.sum()

    def mean(values: jax.Array) -> jax.Array:
        return (values * answered).sum() / tokens

    metrics = {"kl": mean(kl), "clipped": mean(bounded < free), "entropy": mean(-logs)}
    return -per_answer.mean(), metrics


def improve(
    settings: Grpo,
    model: Any,
    params: PyTree,
    state: Any,
    reference: PyTree,
    batch: Batch,
    key: jax.Array,
) -> tuple[PyTree, Any, dict[str, float]]:
    """One iteration's optimizer steps, over the shuffled answers.

    The ratio is taken to these float32 weights as they come in. Where narrower weights
    answered (`Evaluation.dtype`), the two differ by that rounding, as they do in verl.

    Args:
      settings: of the baseline.
      model: a decoder.
      params: the policy that sampled the answers, float32; donated.
      state: of `make_optimizer`; donated.
      reference: the base weights, in memory of their own.
      batch: all answers of the iteration, [R, ...].
      key: of the shuffling.

    Returns:
      New parameters and optimizer state, and the means over the steps of what `loss`
      gives, of `loss` itself and of `gradient_norm` (before it is bounded).

    Raises:
      InputError: if the minibatch does not divide R, or the weights diverge.
    """
    rows = len(batch.tokens)
    if rows % settings.minibatch:
        raise InputError(f"minibatch {settings.minibatch} does not divide {rows} rows")
    batch = jax.tree.map(jnp.asarray, batch)
    old = _scored(settings, model, params, batch)
    base = _scored(settings, model, reference, batch)
    history = []
    for epoch in range(settings.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        for chosen in order.reshape(-1, settings.minibatch):
            params, state, metrics = _step(
                settings, model, params, state, batch, old, base, chosen
            )
            history.append(metrics)
    history = jax.device_get(history)
    means = {name: float(np.mean([row[name] for row in history])) for name in metrics}
    check_finite(means)
    return params, state, means


def _scored(settings: Grpo, model: Any, params: PyTree, batch: Batch) -> jax.Array:
    """`log_probabilities` of any number of rows, a microbatch at a time: [R, N]."""
    held = settings.microbatch or settings.minibatch
    pieces = [
        _log_probabilities(model, params, batch, settings.temperature, piece)
        for piece in jnp.arange(len(batch.tokens)).reshape(-1, held)
    ]
    return jnp.concatenate(pieces)


@partial(jax.jit, static_argnums=(0, 3))
def _log_probabilities(
    model: Any, params: PyTree, batch: Batch, temperature: float, rows: jax.Array
) -> jax.Array:
    # The base weights may be kept in less, or by the host; they answer in float32.
    weights = jax.tree.map(lambda leaf: on_device(leaf).astype(jnp.float32), params)
    chosen = jax.tree.map(lambda array: array[rows], batch)
    return log_probabilities(model, weights, chosen, temperature)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(settings, model, params, state, batch, old, reference, rows):
    """One optimizer step on the given rows."""
    return descend(
        lambda params, data: loss(settings, model, params, *data),
        make_optimizer(settings),
        settings.microbatch,
        (params, state),
        (batch, old, reference),
        rows,
    )
