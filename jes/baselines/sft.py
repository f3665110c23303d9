"""Supervised fine-tuning of what a model says that it knows (SFT-meta of 2602.02605).

One generation (`step`) is one optimizer step: the current weights answer the direct
questions of `prompts` examples greedily, and are trained to answer the question whether
they know (META) by the task's word for yes where that was right, and for no where it
was wrong. Labels are made anew every step, so that they are about the model as it is.
The weights that train are float32; `population` and the noise of ES play no part.

What differs from the published baseline, so that it is no straw man:
- META is rendered identically in training and in evaluation, by the task. The published
  code trains on it in the chat template and evaluates it as raw text.
- The loss is on the answer to META alone, unless `loss` is 'all': then it is on the
  tokens of META too, as in the published code.
- A step takes many questions, not one, and all tokens that the loss is on count the
  same: a mean within each answer would pull towards the shorter of yes and no.
- Of the schedule the sources state only the warm-up; the linear decay to zero after it
  is the usual one, and a choice made here.

Axis letters: P questions, T tokens of the longest META with its answer, K of the last
tokens those whose logits are needed, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jes import memory
from jes.baselines.gradient import check_finite, descend, largest_divisor
from jes.core.noise import PyTree
from jes.core.tree import with_dtype
from jes.errors import InputError
from jes.experiment import Experiment, State, pick
from jes.questions import Evaluation, Question
from jes.sampling.generate import generate
from jes.sampling.prompts import encode, pad
from jes.scoring import rewards_of

CLIP_NORM = 1.0
"""Largest global norm of a step's gradient (2602.02605, the SFT baseline)."""


def resolve(experiment: Experiment) -> dict[str, int]:
    """The microbatch that the memory holds; see `jes.train.Method`."""
    settings, width = experiment.settings, _width(experiment)
    last = _last(settings.sft.loss, claims_of(experiment.evaluation), width)
    rows = memory.rows_of_gradient(
        experiment.pretrained.config,
        experiment.parameters,
        width - last,
        last,
        budget=int(settings.memory_gb * 1e9) or memory.free_bytes(),
    )
    return {"microbatch": largest_divisor(experiment.prompts, rows)}


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
    """One generation, an optimizer step; see `jes.train.Method`.

    A row's `accuracy` is the share of right direct answers, and so of the labels yes.
    META is not answered while training: there is no fitness, and `agreement` says how
    often the likeliest answer is the label.
    """
    del base
    questions = pick(experiment, state.generation)
    direct = answer_directly(
        experiment.evaluation,
        state.params,
        questions,
        batch_size=experiment.settings.eval_batch,
        before_batch=check_stop,
    )
    settings, claims = (
        settings_of(experiment, **resolved),
        claims_of(experiment.evaluation),
    )
    metas = [question.meta for question in questions]
    batch = make_batch(settings, metas, direct.correct, claims, _width(experiment))
    check_stop()
    params, opt_state, learned = improve(
        settings, experiment.pretrained.model, state.params, state.opt_state, batch
    )
    figures = {
        "accuracy": float(direct.correct.mean()),
        "strict": float(direct.strict.mean()),
        "truncated": float(direct.truncated.mean()),
        **learned,
        "learning_rate": float(learning_rate(settings, state.generation)),
        "tokens": direct.tokens,
    }
    return State(state.root, state.generation + 1, params, opt_state), figures, None


def settings_of(experiment: Experiment, microbatch: int = 0) -> "Sft":
    """The settings of the baseline in a run."""
    settings = experiment.settings
    return Sft(
        steps=settings.generations,
        learning_rate=settings.sft.learning_rate,
        loss=settings.sft.loss,
        microbatch=microbatch,
    )


def _width(experiment: Experiment) -> int:
    """Tokens of the longest META with its answer, over all of training: one shape."""
    claims = claims_of(experiment.evaluation)
    return max(len(q.meta) for q in experiment.train) + max(map(len, claims))


def _last(loss: str, claims: Sequence[Sequence[int]], width: int) -> int:
    """Number of the last tokens whose logits the loss needs: K."""
    return width - 1 if loss == "all" else max(map(len, claims))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Settings of the baseline.

    Attributes:
      steps: of the optimizer, over which the learning rate rises and falls.
      learning_rate: the highest, of AdamW without decay, in units of the weights.
      loss: 'answer' is on the answer's tokens, 'all' on those of META too.
      microbatch: questions whose activations are held at once, while gradients add up;
        a divisor of P, 0 for all. It changes no result beyond the order of sums.
    """

    steps: int
    learning_rate: float = 2e-5
    loss: str = "answer"
    microbatch: int = 0


class Direct(NamedTuple):
    """Greedy answers to the direct questions.

    Attributes:
      correct, strict: bool [P], by the task's lenient and strict match.
      truncated: bool [P], whether an answer was cut off.
      tokens: number of tokens generated.
    """

    correct: np.ndarray
    strict: np.ndarray
    truncated: np.ndarray
    tokens: int


class Batch(NamedTuple):
    """Questions META with the answers to learn.

    Attributes:
      tokens: int32 [P, T], left-padded META and answer.
      positions: int32 [P, T]: 0, 1, ... from META's first token on, -1 before.
      weights: float32 [P, K], of the last K tokens in the loss: the same for all that
        it is on, 0 for the others; their sum over a row is 1 in the mean.
      answered: bool [P, K], which of these tokens are the answer's.
    """

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    answered: np.ndarray


def learning_rate(settings: Sft, step: jax.typing.ArrayLike) -> jax.Array:
    """Of a step, counted from 0: up over the first tenth of the steps, then down to 0.

    With W of S steps to warm up, the smaller of (step + 1) / W and
    (S - step) / (S - W), times the highest: that at steps W - 1 and W, 0 at S. No step
    of the run has a rate of 0.
    """
    warm_up = -(-settings.steps // 10)
    rise = (jnp.asarray(step) + 1) / warm_up
    fall = (settings.steps - jnp.asarray(step)) / max(1, settings.steps - warm_up)
    return settings.learning_rate * jnp.maximum(jnp.minimum(rise, fall), 0)


def make_optimizer(settings: Sft) -> optax.GradientTransformationExtraArgs:
    """AdamW on its schedule, behind a bound on the global norm of the gradient."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(partial(learning_rate, settings), weight_decay=0.0),
    )


def answer_directly(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
    before_batch: Callable[[], None] = lambda: None,
) -> Direct:
    """Lets the weights answer the direct questions greedily.

    Args:
      evaluation: the model, a task with `meta`, the dtype of the weights that answer.
      params: the weights.
      questions: P of them.
      batch_size: prompts answered at once.
      before_batch: called before each batch; an exception from it changes nothing.
    """
    weights = with_dtype(params, jnp.dtype(evaluation.dtype))
    size = min(batch_size, len(questions))
    said: list[list[int]] = []
    for start in range(0, len(questions), size):
        before_batch()
        prompts = [q.prompt for q in questions[start : start + size]]
        # The last batch is filled up so that it has the shape of the others.
        filled = prompts + prompts[-1:] * (size - len(prompts))
        answers = generate(
            evaluation.model,
            weights,
            filled,
            evaluation.max_new_tokens,
            eos_ids=evaluation.eos_ids,
            batch_size=size,
            buckets=evaluation.buckets,
        )
        said += answers[: len(prompts)]
    # Rewards of such tasks take two texts; whether the first is right is its own.
    earned = rewards_of(
        evaluation, questions, [(i, (tuple(one), ())) for i, one in enumerate(said)]
    )
    lengths = np.array([len(one) for one in said])
    truncated = lengths == evaluation.max_new_tokens
    return Direct(
        correct=earned[:, 1] == 1,
        strict=earned[:, 2] == 1,
        truncated=truncated,
        tokens=int((lengths + ~truncated).sum()),
    )


def claims_of(evaluation: Evaluation) -> tuple[list[int], list[int]]:
    """The two answers to META as tokens: yes and no, each with the end token.

    Raises:
      InputError: if the task does not ask whether the model knows.
    """
    task = evaluation.task
    if task.meta is None or task.claims is None:
        raise InputError(
            "SFT is for tasks that ask 'do you know', by `meta` and `claims`, and "
            f"{task.name} does not"
        )
    end = list(evaluation.eos_ids[:1])
    yes, no = (encode(evaluation.tokenizer, word) + end for word in task.claims)
    return yes, no


def make_batch(
    settings: Sft,
    metas: Sequence[Sequence[int]],
    correct: np.ndarray,
    claims: tuple[Sequence[int], Sequence[int]],
    width: int,
) -> Batch:
    """Lays out what is to be learned.

    Args:
      settings: of the baseline.
      metas: tokens of META, P of them.
      correct: bool [P], whether the direct answer was right.
      claims: tokens to answer META by where it was, and where it was not.
      width: T, the same for all batches of a run.
    """
    answers = [claims[0] if right else claims[1] for right in correct]
    rows = [[*meta, *answer] for meta, answer in zip(metas, answers, strict=True)]
    padded = pad(rows, (width,))
    last = _last(settings.loss, claims, width)
    lengths = np.array([len(answer) for answer in answers])
    answered = np.arange(last) >= last - lengths[:, None]
    # Nothing precedes META's first token, which nothing can predict then.
    scored = padded.positions[:, 1:] >= 1 if settings.loss == "all" else answered
    weights = (scored * (len(rows) / scored.sum())).astype(np.float32)
    return Batch(padded.tokens, padded.positions, weights, answered)


def loss(
    model: Any, params: PyTree, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats, the mean over all tokens of the batch that count.

    Args:
      model: a decoder.
      params: its weights, float32 (one set, no member axis).
      batch: what is to be learned.

    Returns:
      float32 scalar, and `agreement`: the share of rows in which every token of the
      answer is the likeliest one.
    """
    tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
    last = batch.weights.shape[1]
    logits, _ = model.apply(
        {"params": params}, tokens[:, :-1], positions[:, :-1], last=last
    )
    targets = tokens[:, -last:]
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    per_row = (entropies * jnp.asarray(batch.weights)).sum(-1)
    agreed = (logits.argmax(-1) == targets) | ~jnp.asarray(batch.answered)
    return per_row.mean(), {"agreement": agreed.all(-1).mean()}


def improve(
    settings: Sft, model: Any, params: PyTree, state: Any, batch: Batch
) -> tuple[PyTree, Any, dict[str, float]]:
    """One optimizer step.

    Args:
      settings: of the baseline.
      model: a decoder.
      params: its weights, float32; donated.
      state: of `make_optimizer`; donated.
      batch: what is to be learned.

    Returns:
      New parameters and optimizer state, and, of the weights before the step, `loss`,
      what `loss` gives beside it, and `gradient_norm` (before it is bounded).

    Raises:
      InputError: if the microbatch does not divide P, or the weights diverge.
    """
    rows = len(batch.tokens)
    if rows % (settings.microbatch or rows):
        raise InputError(
            f"microbatch {settings.microbatch} does not divide {rows} rows"
        )
    params, state, metrics = _step(
        settings, model, params, state, jax.tree.map(jnp.asarray, batch)
    )
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    check_finite(values)
    return params, state, values


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(settings, model, params, state, batch):
    """One optimizer step on all rows."""
    return descend(
        partial(loss, model),
        make_optimizer(settings),
        settings.microbatch,
        (params, state),
        batch,
        jnp.arange(len(batch.tokens)),
    )
