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
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from jes.core.noise import PyTree
from jes.core.tree import with_dtype
from jes.errors import InputError
from jes.experiment import Experiment, State, pick
from jes.io.interrupts import Before, proceed
from jes.questions import Evaluation, Question
from jes.sampling.generate import generate
from jes.sampling.prompts import encode_continuation, pad
from jes.scoring import rewards_of


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Settings of the baseline.

    Attributes:
      steps: of the optimizer, over which the learning rate rises and falls.
      highest_rate: of the learning rate, in units of the weights.
      loss_on: 'answer', or 'all' for the tokens of META too.
      microbatch: questions whose activations are held at once; a divisor of P, 0 for
        all. It changes no result beyond the order of sums.
    """

    steps: int
    highest_rate: float = 2e-5
    loss_on: str = "answer"
    microbatch: int = 0

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """AdamW on its schedule."""
        return make_optimizer(self.learning_rate)

    def learning_rate(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Of a step, from 0: up over the first tenth of the steps, then down to 0.

        With W of S steps to warm up, the smaller of (step + 1) / W and
        (S - step) / (S - W), times the highest: that at steps W - 1 and W, 0 at S. No
        step of the run has a rate of 0.
        """
        warm_up = -(-self.steps // 10)
        rise = (jnp.asarray(step) + 1) / warm_up
        fall = (self.steps - jnp.asarray(step)) / max(1, self.steps - warm_up)
        return self.highest_rate * jnp.maximum(jnp.minimum(rise, fall), 0)

    @staticmethod
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


def resolve(experiment: Experiment) -> dict[str, int]:
    """The microbatch that the memory holds; see `jes.train.Method`."""
    claims, width = claims_of(experiment.evaluation), _width(experiment)
    last = _last(experiment.settings.sft.loss, claims, width)
    return choose_microbatch(experiment, experiment.prompts, width - last, last)


def init(experiment: Experiment) -> Any:
    """The optimizer's state before the first generation."""
    return settings_of(experiment).optimizer.init(experiment.pretrained.params)


def settings_of(experiment: Experiment, microbatch: int = 0) -> Sft:
    """The settings of the baseline in a run."""
    return Sft(
        steps=experiment.settings.generations,
        highest_rate=experiment.settings.sft.learning_rate,
        loss_on=experiment.settings.sft.loss,
        microbatch=microbatch,
    )


def step(
    experiment: Experiment,
    state: State,
    base: PyTree,
    resolved: dict[str, int],
    check_stop: Before,
) -> tuple[State, dict[str, Any], None]:
    """One generation, an optimizer step; see `jes.train.Method`.

    A row's `accuracy` is the share of right direct answers, and so of the labels yes.
    META is not answered while training: there is no fitness, and `agreement` says how
    often the likeliest answer is the label.
    """
    del base
    settings, evaluation = settings_of(experiment, **resolved), experiment.evaluation
    questions = pick(experiment, state.generation)
    size = experiment.settings.eval_batch
    direct = answer_directly(evaluation, state.params, questions, size, check_stop)
    batch = make_batch(
        settings,
        [question.meta for question in questions],
        direct.correct,
        claims_of(evaluation),
        _width(experiment),
    )
    check_stop("the step")
    before = state.params, state.opt_state
    after, learned = improve(settings, experiment.pretrained.model, before, batch)
    figures = {
        "accuracy": float(direct.correct.mean()),
        "strict": float(direct.strict.mean()),
        "truncated": float(direct.truncated.mean()),
        **learned,
        "learning_rate": float(settings.learning_rate(state.generation)),
        "tokens": direct.tokens,
    }
    return State(state.root, state.generation + 1, *after), figures, None


def _width(experiment: Experiment) -> int:
    """Tokens of the longest META with its answer, over all of training: one shape."""
    claims = claims_of(experiment.evaluation)
    return max(len(q.meta) for q in experiment.train) + max(map(len, claims))


def _last(loss_on: str, claims: Sequence[Sequence[int]], width: int) -> int:
    """Number of the last tokens whose logits the loss needs: K."""
    return width - 1 if loss_on == "all" else max(map(len, claims))


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


def answer_directly(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    batch_size: int,
    before_batch: Before = proceed,
) -> Direct:
    """Lets the weights answer the direct questions greedily, in batches."""
    weights = with_dtype(params, jnp.dtype(evaluation.dtype))
    size = min(batch_size, len(questions))
    said: list[list[int]] = []
    for start in range(0, len(questions), size):
        before_batch("")
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
    asked = [(number, (tuple(answer), ())) for number, answer in enumerate(said)]
    earned = rewards_of(evaluation, questions, asked)
    lengths = np.array([len(answer) for answer in said])
    truncated = lengths == evaluation.max_new_tokens
    tokens = int((lengths + ~truncated).sum())
    return Direct(earned[:, 1] == 1, earned[:, 2] == 1, truncated, tokens)


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
    yes, no = (
        encode_continuation(evaluation.tokenizer, word) + end for word in task.claims
    )
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
    last = _last(settings.loss_on, claims, width)
    lengths = np.array([len(answer) for answer in answers])
    answered = np.arange(last) >= last - lengths[:, None]
    # Nothing precedes META's first token, which nothing can predict then.
    scored = padded.positions[:, 1:] >= 1 if settings.loss_on == "all" else answered
    weights = (scored * (len(rows) / scored.sum())).astype(np.float32)
    return Batch(padded.tokens, padded.positions, weights, answered)


def improve(
    settings: Sft, model: Any, before: tuple[PyTree, Any], batch: Batch
) -> tuple[tuple[PyTree, Any], dict[str, float]]:
    """One optimizer step: `descend` on all rows, with what it measures.

    Raises:
      InputError: if the weights diverge.
    """
    data, rows = (jax.tree.map(jnp.asarray, batch),), jnp.arange(len(batch.tokens))
    after, metrics = descend(settings, model, before, data, rows)
    return after, mean_metrics([metrics])
