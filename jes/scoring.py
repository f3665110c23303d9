"""Scores of answers and the fitness of members, on the host.

Axis letters: M members, A prompts of an example (1, or 2 with a second one), B
examples, T new tokens, C choices, N members of a generation.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jes.errors import InputError
from jes.metacognition.objectives import objective_fitness
from jes.questions import Batch, Evaluation, Question
from jes.sampling.generate import lengths_of, trim
from jes.sampling.likelihood import Choices


class Score(NamedTuple):
    """Scores of members as means over their answers: arrays [M], or floats of one.

    Attributes:
      reward: mean reward; NaN where a reward, or what the model computed, is no number.
      accuracy: share of answers whose leniently extracted answer is right; NaN, as
        `strict` and `formatted`, where the task does not say so.
      strict: share of answers that are right in the format asked for.
      formatted: share of answers in that format.
      truncated: share of answers cut off at `max_new_tokens`.
      tokens: number of tokens generated.
      hits, false_alarms: shares of the answers that are right, or wrong, and of which
        the model says that it knows them; NaN where the task does not ask for that.
      error: standard error of the mean reward, over the answers.
      parts: means of the numbers that `Task.parts` names.
    """

    reward: Any
    accuracy: Any
    strict: Any
    formatted: Any
    truncated: Any
    tokens: Any
    hits: Any = math.nan
    false_alarms: Any = math.nan
    error: Any = math.nan
    parts: tuple[Any, ...] = ()

    @classmethod
    def of_columns(cls, columns: Iterable[Any]) -> "Score":
        """The inverse of `jax.tree.leaves`."""
        values: list[Any] = [*columns]
        fixed = len(cls._fields) - 1
        return cls._make([*values[:fixed], tuple(values[fixed:])])


class Answered(NamedTuple):
    """Single answers of members: whether each is right, bool [M, B], and its tokens.

    `tokens` are integers [M, B, T] as generated; or with T = 1 the chosen choice.
    """

    correct: np.ndarray
    tokens: np.ndarray


def score(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: Batch,
    outputs: jax.Array | np.ndarray,
) -> Score:
    """Scores of members, arrays [M].

    Args:
      evaluation: how they were asked.
      questions: B of them.
      batch: that they were asked in, which may be filled up with more.
      outputs: tokens [M, A x rows, T], all first prompts before all second ones; or
        log-likelihoods [M, rows, C].
    """
    rewards = answer_rewards(evaluation, questions, batch, outputs)
    return mean_score(rewards, *generated(evaluation, questions, batch, outputs))


def generated(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: Batch,
    outputs: jax.Array | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The share of answers that were cut off, and the tokens generated: [M] each.

    Arguments are those of `score`.
    """
    if isinstance(batch, Choices):
        none = np.zeros(len(outputs))
        return none, none
    tokens = answer_tokens(evaluation, questions, outputs)
    lengths = lengths_of(tokens, evaluation.eos_ids).reshape(len(tokens), -1)
    truncated = lengths == evaluation.max_new_tokens
    return truncated.mean(-1), (lengths + ~truncated).sum(-1)


def texts_of(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: Batch,
    outputs: jax.Array | np.ndarray,
) -> list[str]:
    """What the first member answers to each question, as text."""
    if isinstance(batch, Choices):
        assert evaluation.task.choices is not None
        taken = choices_taken(questions, batch, outputs)[0]
        pairs = zip(questions, taken, strict=True)
        return [evaluation.task.choices(one.example)[i] for one, i in pairs]
    tokens = answer_tokens(evaluation, questions, outputs)[0, 0]
    return decoded(evaluation.tokenizer, trim(tokens, evaluation.eos_ids))


def decoded(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """Answers as the text that rewards see: without special tokens."""
    return tokenizer.backend_tokenizer.decode_batch(list(map(list, answers)))


def answered(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: Batch,
    outputs: jax.Array | np.ndarray,
) -> Answered:
    """Single answers, of the arguments of `score`.

    Raises:
      InputError: if the task does not say which answers are right.
    """
    rewards = answer_rewards(evaluation, questions, batch, outputs)
    if np.isnan(rewards[..., 1]).all() and not np.isnan(rewards[..., 0]).all():
        raise InputError(
            f"task {evaluation.task.name} does not say which answers are right, only "
            "what they earn: a reward of bool, or jes.Reward(value, correct), does"
        )
    correct = rewards[..., 1] == 1
    if isinstance(batch, Choices):
        return Answered(correct, choices_taken(questions, batch, outputs)[..., None])
    return Answered(correct, answer_tokens(evaluation, questions, outputs)[:, 0])


def answer_rewards(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: Batch,
    outputs: jax.Array | np.ndarray,
) -> np.ndarray:
    """Rewards of single answers, of the arguments of `score`.

    Returns:
      float64 [M, B, 5 + parts], the fields of a `Reward`; NaN for what the task does
      not ask, and where what a member computes is not finite.
    """
    if isinstance(batch, Choices):
        assert evaluation.task.answer is not None
        right = [evaluation.task.answer(question.example) for question in questions]
        correct = (choices_taken(questions, batch, outputs) == right).astype(float)
        fine = np.isfinite(np.asarray(outputs)) | (batch.lengths == 0)
        correct[~fine.all((1, 2))] = np.nan
        formatted, yes = np.ones_like(correct), np.full_like(correct, np.nan)
        return np.stack([correct, correct, correct, formatted, yes], -1)
    tokens = answer_tokens(evaluation, questions, outputs)
    asked: list[Any] = []
    for member in tokens:
        texts = [map(tuple, trim(each, evaluation.eos_ids)) for each in member]
        asked += enumerate(zip(*texts, strict=True))
    earned = rewards_of(evaluation, questions, asked)
    earned = earned.reshape(len(tokens), len(questions), -1)
    earned[(tokens < 0).any((1, 3))] = np.nan
    return earned


def answer_tokens(
    evaluation: Evaluation,
    questions: Sequence[Question],
    outputs: jax.Array | np.ndarray,
) -> np.ndarray:
    """Tokens [M, A, B, T] without the rows that fill up the batch."""
    tokens = np.asarray(outputs)
    asks = 1 if evaluation.task.meta is None else 2
    tokens = tokens.reshape(len(tokens), asks, -1, tokens.shape[-1])
    return tokens[:, :, : len(questions)]


def choices_taken(
    questions: Sequence[Question], batch: Choices, outputs: jax.Array | np.ndarray
) -> np.ndarray:
    """The choice with the highest log-likelihood per token: int [M, B]."""
    per_token = np.asarray(outputs) / np.maximum(batch.lengths, 1)
    return per_token[:, : len(questions)].argmax(-1)


def mean_score(rewards: np.ndarray, truncated: Any, tokens: Any) -> Score:
    """Scores from rewards [..., B, 5 + parts], shares truncated and tokens [...]."""
    means = np.moveaxis(rewards.mean(-2), -1, 0)
    right, yes = rewards[..., 1], rewards[..., 4]
    known = (right * yes).mean(-1), ((1 - right) * yes).mean(-1)
    error = rewards[..., 0].std(-1) / rewards.shape[-2] ** 0.5
    return Score.of_columns([*means[:4], truncated, tokens, *known, error, *means[5:]])


def rewards_of(
    evaluation: Evaluation,
    questions: Sequence[Question],
    asked: Sequence[tuple[int, tuple[tuple[int, ...], ...]]],
) -> np.ndarray:
    """Rewards of texts: fields and parts of a `Reward`, float64 [R, 5 + parts].

    None is NaN.

    Answers mostly agree: each different one is decoded and scored once.

    Args:
      evaluation: the task and the tokenizer.
      questions: what was asked.
      asked: for each of R answers the number of its question, and its tokens without
        the end token: one text, or with a second question two.
    """
    new = list(dict.fromkeys(asked))
    texts = list(dict.fromkeys(text for _, answer in new for text in answer))
    text_of = dict(zip(texts, decoded(evaluation.tokenizer, texts), strict=True))
    said = [[text_of[text] for text in answer] for _, answer in new]
    examples, task = [questions[i].example for i, _ in new], evaluation.task
    if task.rewards is not None:
        rewards = task.rewards(examples, [text for text, *_ in said])
    else:
        pairs = zip(examples, said, strict=True)
        rewards = [task.reward(example, *answer) for example, answer in pairs]
    rows = ((*reward[:5], *reward.parts) for reward in rewards)
    earned = dict(zip(new, rows, strict=True))
    return np.array([earned[one] for one in asked], float)


def fitness_of(
    scores: Score,
    objective: str = "reward",
    *,
    generation: int,
    shuffle_seed: int | None = None,
) -> np.ndarray:
    """The raw fitness of a population, as the ledger stores it.

    Args:
      scores: of all members, arrays [N].
      objective: see `objective_fitness`.
      generation: its number, for the error and the shuffling.
      shuffle_seed: if given, members swap their fitness at random, as a control.

    Returns:
      float32 [N]; not finite where a member has no valid reward.

    Raises:
      InputError: if no member's reward is finite.
    """
    fitness = np.asarray(objective_fitness(objective, scores), np.float32)
    if not np.isfinite(fitness).any():
        raise InputError(
            f"generation {generation}: no member has a finite reward; the weights have "
            "diverged (a smaller sigma or alpha helps), or the reward is at fault"
        )
    if shuffle_seed is None:
        return fitness
    return np.random.default_rng([shuffle_seed, generation, 1]).permutation(fitness)
