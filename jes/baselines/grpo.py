"""GRPO (2402.03300): the policy gradient that evolution strategies are compared with.

One generation (`step`): `rollout` samples a group of answers to every prompt from the
current weights and rewards them; `improve` takes one optimizer step for each minibatch
of the shuffled answers. A group is as large as a population of ES; prompts, rewards and
sampler are those of `jes.rollout`, so that a comparison differs in the update only. The
weights that train are float32.

The settings are those that 2605.30148 ran verl with, but without its weight decay of
0.01, which pulls towards zero and would blur what is measured as forgetting. There is
no critic and no entropy bonus.

Axis letters: P prompts, G answers a prompt (its group), R = P·G rows, prompt by prompt,
T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jes.baselines.gradient import (
    choose_microbatch,
    descend,
    make_optimizer,
    mean_metrics,
)
from jes.core.members import unperturbed
from jes.core.noise import PyTree, generation_key
from jes.core.placement import on_device
from jes.core.tree import with_dtype
from jes.errors import InputError
from jes.experiment import Experiment, State, pick
from jes.io.interrupts import Before, proceed
from jes.questions import Evaluation, Question
from jes.sampling.generate import decode, trim, unrolled_params
from jes.sampling.prompts import pad
from jes.scoring import Score, mean_score, rewards_of

CLIP = 0.2
"""The ratio to the sampling policy counts up to 1 ± this."""
KL = 0.001
"""Weight of the divergence from the base model, in reward per nat."""
MOST_NATS = 20.0
"""Log-ratios are cut off here: exp(89) is infinite in float32, and one infinite token
would make the whole gradient NaN."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Settings of the baseline.

    Attributes:
      group: G, answers sampled to each prompt.
      learning_rate: of AdamW, in units of the weights.
      minibatch: rows (answers) per optimizer step; a divisor of P·G.
      microbatch: rows whose logits and activations are in memory at once; a divisor of
        `minibatch`, 0 for all. It changes no result beyond the order of sums.
      temperature: of the sampled answers, and so of the policy that is trained.
      batch_size: rows decoded at once. The draws depend on it.
    """

    group: int = 30
    learning_rate: float = 1e-6
    minibatch: int = 1000
    microbatch: int = 0
    temperature: float = 1.0
    batch_size: int = 256

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Of the policy."""
        return make_optimizer(self.learning_rate)

    def loss(
        self,
        model: Any,
        params: PyTree,
        batch: Batch,
        old: jax.Array,
        reference: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What is minimised: the negative of 2402.03300, equation 3.

        Tokens are averaged over their answer first, then over the answers (verl and
        DAPO average over all tokens at once: long answers count no more here).

        Args:
          model, params: a decoder and the policy, float32.
          batch: answers.
          old, reference: float32 [R, N], log-probabilities under the policy that
            sampled and under the base model.

        Returns:
          float32 scalar, and means over all tokens: `kl` and `entropy` (-log p) in
          nats, and `clipped`, the share whose ratio is clipped.
        """
        logs = log_probabilities(model, params, batch, self.temperature)
        ratio = jnp.exp(jnp.clip(logs - old, -MOST_NATS, MOST_NATS))
        advantage = jnp.asarray(batch.advantages)[:, None]
        free = ratio * advantage
        bounded = jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage
        kl = divergence(logs, reference)
        gain = jnp.minimum(free, bounded) - KL * kl
        answered = jnp.asarray(batch.answered)
        per_answer = (gain * answered).sum(-1) / answered.sum(-1)
        each = {"kl": kl, "clipped": bounded < free, "entropy": -logs}
        mean = {n: (v * answered).sum() / answered.sum() for n, v in each.items()}
        return -per_answer.mean(), mean


def resolve(experiment: Experiment) -> dict[str, int]:
    """The microbatch that the memory holds; see `jes.train.Method`."""
    evaluation = experiment.evaluation
    return choose_microbatch(
        experiment,
        settings_of(experiment).minibatch,
        evaluation.buckets[0],
        evaluation.max_new_tokens,
    )


def init(experiment: Experiment) -> Any:
    """The optimizer's state before the first generation."""
    return settings_of(experiment).optimizer.init(experiment.pretrained.params)


def settings_of(experiment: Experiment, microbatch: int = 0) -> Grpo:
    """The settings of the baseline in a run.

    Raises:
      InputError: if the task asks two questions, or the minibatch does not fit.
    """
    settings = experiment.settings
    if experiment.evaluation.task.meta is not None:
        raise InputError(f"GRPO asks one question; task {settings.task} asks two")
    answers = experiment.answers_a_generation
    minibatch = settings.grpo.minibatch or answers
    if answers % minibatch:
        raise InputError(f"minibatch must be a divisor of {answers}, not {minibatch}")
    return Grpo(
        group=settings.population,
        learning_rate=settings.grpo.learning_rate,
        minibatch=minibatch,
        microbatch=microbatch,
        temperature=settings.temperature or 1.0,
        batch_size=settings.eval_batch,
    )


def step(
    experiment: Experiment,
    state: State,
    base: PyTree,
    resolved: dict[str, int],
    check_stop: Before,
) -> tuple[State, dict[str, Any], None]:
    """One generation: `rollout`, then `improve`; see `jes.train.Method`."""
    settings, model = settings_of(experiment, **resolved), experiment.pretrained.model
    key = generation_key(state.root, state.generation)
    questions = pick(experiment, state.generation)
    batch, rewards, score = rollout(
        settings, experiment.evaluation, state.params, questions, key, check_stop
    )
    rewards = rewards[np.isfinite(rewards)]
    if not rewards.size:
        raise InputError(
            f"generation {state.generation}: no answer has a finite reward"
        )
    before = state.params, state.opt_state
    after, learned = improve(settings, model, before, base, batch, key)
    shares = ("accuracy", "strict", "formatted", "truncated")
    figures = {
        "fitness_mean": float(rewards.mean()),
        "fitness_max": float(rewards.max()),
        "fitness_std": float(rewards.std()),
        **{name: float(getattr(score, name)) for name in shares},
        "tokens": int(score.tokens),
        **learned,
    }
    return State(state.root, state.generation + 1, *after), figures, None


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


def rollout(
    settings: Grpo,
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    key: jax.Array,
    before_batch: Before = proceed,
) -> tuple[Batch, np.ndarray, Score]:
    """Samples a group of answers to every question, and rewards them.

    Args:
      settings: of the baseline, with the temperature and the batch size.
      evaluation: the model, its task and the dtype of the weights that answer.
      params: the policy, float32.
      questions: the prompts [P].
      key: of the draws.
      before_batch: called before each batch; an exception from it changes nothing.

    Returns:
      What to learn from; the rewards, float64 [P, G]; and means over all answers, of
      the reward over those where it is finite.
    """
    prompts = pad([q.prompt for q in questions], evaluation.buckets)
    rows = np.repeat(np.arange(len(questions)), settings.group)
    weights = with_dtype(params, jnp.dtype(evaluation.dtype))
    weights = unrolled_params(evaluation.model, weights)
    sampling = dataclasses.replace(
        evaluation.sampling, temperature=settings.temperature, top_k=0, top_p=1.0
    )
    size = min(settings.batch_size, len(rows))
    pieces = []
    for start in range(0, len(rows), size):
        before_batch("")
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
    return _rewarded(evaluation, questions, prompts, answers)


def _rewarded(
    evaluation: Evaluation,
    questions: Sequence[Question],
    prompts: Any,
    answers: np.ndarray,
) -> tuple[Batch, np.ndarray, Score]:
    """Rewards the answers int32 [R, N] to the prompts [R, T], and lays them out."""
    group, room = len(answers) // len(questions), answers.shape[1]
    trimmed = [tuple(row) for row in trim(answers, evaluation.eos_ids)]
    asked = [(i // group, (answer,)) for i, answer in enumerate(trimmed)]
    earned = rewards_of(evaluation, questions, asked)
    rewards = earned[:, 0].reshape(-1, group)
    lengths = np.array([len(row) for row in trimmed])
    truncated = lengths == room
    chosen = lengths + ~truncated  # the end token is chosen too
    steps = np.arange(room)
    later = prompts.positions[:, -1:] + 1 + steps
    batch = Batch(
        tokens=np.concatenate([prompts.tokens, answers], 1),
        positions=np.concatenate([prompts.positions, later], 1).astype(np.int32),
        answered=steps < chosen[:, None],
        advantages=advantages(rewards).ravel(),
    )
    finite = rewards[np.isfinite(rewards)]
    score = mean_score(earned, truncated.mean(), int(chosen.sum()))
    score = score._replace(reward=finite.mean() if finite.size else np.nan)
    return batch, rewards, score


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
    """Estimate in nats of KL(p || p_ref) from samples of p: r - log r - 1, r = p_ref/p.

    The estimator of low variance, k3 in Schulman's 'Approximating KL divergence'
    (2020), which 2402.03300 takes (equation 4): never negative, unbiased.

    Args:
      logs, reference: log-probabilities of the samples under p and p_ref, in nats.
    """
    log_ratio = jnp.clip(reference - logs, -MOST_NATS, MOST_NATS)
    return jnp.expm1(log_ratio) - log_ratio


def improve(
    settings: Grpo,
    model: Any,
    before: tuple[PyTree, Any],
    reference: PyTree,
    batch: Batch,
    key: jax.Array,
) -> tuple[tuple[PyTree, Any], dict[str, float]]:
    """One optimizer step for each minibatch of the shuffled answers.

    The ratio is taken to these float32 weights as they come in. Where narrower weights
    answered (`Evaluation.dtype`), the two differ by that rounding, as they do in verl.

    Args:
      settings: of the baseline.
      model: a decoder.
      before: the policy that sampled the answers, float32, and the optimizer's state;
        donated.
      reference: the base weights, in memory of their own.
      batch: all answers of the generation, [R, ...].
      key: of the shuffling.

    Returns:
      New parameters and optimizer state, and the means over the steps of what `descend`
      measures.

    Raises:
      InputError: if the weights diverge.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    rows = jnp.arange(len(batch.tokens))
    pieces = rows.reshape(-1, settings.microbatch or settings.minibatch)

    def logs_of(params: PyTree) -> jax.Array:
        logs = partial(_logs_of_rows, model, params, batch, settings.temperature)
        return jnp.concatenate([logs(piece) for piece in pieces])

    data, history = (batch, logs_of(before[0]), logs_of(reference)), []
    order = jax.random.permutation(jax.random.fold_in(key, 0), len(rows))
    for chosen in order.reshape(-1, settings.minibatch):
        before, metrics = descend(settings, model, before, data, chosen)
        history.append(metrics)
    return before, mean_metrics(history)


@partial(jax.jit, static_argnums=(0, 3))
def _logs_of_rows(
    model: Any, params: PyTree, batch: Batch, temperature: float, rows: jax.Array
) -> jax.Array:
    # The base weights may be kept in less, or by the host; they answer in float32.
    weights = jax.tree.map(lambda leaf: on_device(leaf).astype(jnp.float32), params)
    chosen = jax.tree.map(lambda array: array[rows], batch)
    return log_probabilities(model, weights, chosen, temperature)
