"""What answers earn: the host's part of asking.

Axis letters: C members, A questions about one example (1, or 2 with a second one), B
examples, N new tokens, R rows of choices.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jes.errors import InputError
from jes.metacognition.objectives import objective_fitness
from jes.questions import Evaluation, Question
from jes.sampling.generate import trim
from jes.sampling.likelihood import ChoiceBatch
from jes.tasks.task import Reward


class Score(NamedTuple):
    """What a member's answers earned, as means over the prompts; or arrays of these.

    Attributes:
      reward: mean reward, the member's fitness.
      accuracy: share of answers whose leniently extracted answer is right.
      strict: share of answers that are right in the format asked for.
      formatted: share of answers in that format.
      truncated: share of answers cut off at `max_new_tokens`.
      tokens: number of tokens generated.
      hits, false_alarms: shares of the answers that are right, or wrong, and of which
        the model says that it knows them; NaN where the task does not ask for that.
    """

    reward: Any
    accuracy: Any
    strict: Any
    formatted: Any
    truncated: Any
    tokens: Any
    hits: Any = math.nan
    false_alarms: Any = math.nan


class Answered(NamedTuple):
    """Single answers of members.

    Attributes:
      right: bool [C, B], whether the leniently extracted answer is right.
      said: integers [C, B, N], tokens as generated, or with N = 1 the choice taken.
    """

    right: np.ndarray
    said: np.ndarray


def score_answers(
    evaluation: Evaluation, questions: Sequence[Question], answers: jax.Array
) -> list[Score]:
    """Rewards of generated tokens, one `Score` a member.

    Args:
      evaluation: as for `ask`.
      questions: B of them.
      answers: [C, P, N]. P is B, where a batch was filled up more, and with a second
        question twice that: first all answers to the first.
    """
    members, earned = _earned(
        evaluation, questions, _unfilled(evaluation, questions, answers)
    )
    scores = []
    for rows, rewards in zip(members, earned, strict=True):
        lengths = np.array([len(text) for row in rows for text in row])
        truncated = lengths == evaluation.max_new_tokens
        generated = int((lengths + ~truncated).sum())
        scores.append(mean_score(rewards, truncated.mean(), generated))
    return scores


def judge_answers(
    evaluation: Evaluation, questions: Sequence[Question], answers: jax.Array
) -> Answered:
    """Single answers, of the arguments of `score_answers`."""
    tokens = _unfilled(evaluation, questions, answers)
    _, earned = _earned(evaluation, questions, tokens)
    return Answered(earned[..., 1] == 1, tokens[:, 0])


def _unfilled(
    evaluation: Evaluation, questions: Sequence[Question], answers: jax.Array
) -> np.ndarray:
    """Tokens [C, A, B, N] to the A questions of each prompt, without the filled-up."""
    tokens = np.asarray(answers)
    asks = 1 if evaluation.task.meta is None else 2
    tokens = tokens.reshape(len(tokens), asks, -1, tokens.shape[-1])
    return tokens[:, :, : len(questions)]


def _earned(
    evaluation: Evaluation, questions: Sequence[Question], tokens: np.ndarray
) -> tuple[list[list[tuple[tuple[int, ...], ...]]], np.ndarray]:
    """Each member's answers without their end, and what they earn, [C, B, 5]."""
    members = []
    for rows in tokens:
        texts = [map(tuple, trim(each, evaluation.eos_ids)) for each in rows]
        members.append(list(zip(*texts, strict=True)))
    asked = [(i, row) for rows in members for i, row in enumerate(rows)]
    earned = rewards_of(evaluation, questions, asked)
    return members, earned.reshape(len(members), len(questions), -1)


def mean_score(rewards: np.ndarray, truncated: float, tokens: int) -> Score:
    """A member's score from the rewards of its answers, float64 [B, 5]."""
    value, correct, strict, formatted, _ = rewards.mean(0)
    right, yes = rewards[:, 1], rewards[:, 4]
    hits, false_alarms = (right * yes).mean(), ((1 - right) * yes).mean()
    return Score(
        value, correct, strict, formatted, truncated, tokens, hits, false_alarms
    )


def rewards_of(
    evaluation: Evaluation,
    questions: Sequence[Question],
    asked: Sequence[tuple[int, tuple[tuple[int, ...], ...]]],
) -> np.ndarray:
    """What answers earn: the fields of a `Reward`, float64 [R, 5], None as NaN.

    Answers mostly agree: each different one is decoded and scored once.

    Args:
      evaluation: the task and the tokenizer.
      questions: what was asked.
      asked: for each of R answers the number of its question, and its tokens without
        the end token: one text, or with a second question two.
    """
    new = list(dict.fromkeys(asked))
    texts = list(dict.fromkeys(text for _, answer in new for text in answer))
    tokenizer = evaluation.tokenizer.backend_tokenizer
    decoded = dict(
        zip(texts, tokenizer.decode_batch([list(t) for t in texts]), strict=True)
    )
    earned: dict[Any, Reward] = {}
    for i, answer in new:
        written = (decoded[text] for text in answer)
        earned[i, answer] = evaluation.task.reward(questions[i].example, *written)
    return np.array([earned[one] for one in asked], float)


def score_likelihoods(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: ChoiceBatch,
    log_likelihoods: jax.Array,
) -> list[Score]:
    """Share of right choices by log-likelihood per token, one `Score` a member."""
    answered = judge_likelihoods(evaluation, questions, batch, log_likelihoods)
    shares = answered.right.mean(-1)
    shares[~np.isfinite(np.asarray(log_likelihoods)).all(-1)] = np.nan
    return [Score(share, share, share, 1.0, 0.0, 0) for share in map(float, shares)]


def judge_likelihoods(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch: ChoiceBatch,
    log_likelihoods: jax.Array,
) -> Answered:
    """The choice with the highest log-likelihood per token, and whether it is right."""
    assert evaluation.task.answer is not None
    per_token = np.asarray(log_likelihoods) / batch.scored.sum(-1)
    taken = np.stack(
        [per_token[:, batch.owners == i].argmax(-1) for i in range(len(questions))], 1
    )
    right = np.array([evaluation.task.answer(q.example) for q in questions])
    return Answered(taken == right, taken[..., None])


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
      objective: see `jes.metacognition.objectives.objective_fitness`.
      generation: its number, for the error and the shuffling.
      shuffle_seed: if given, members swap their fitness at random: a control in which
        fitness says nothing about the noise.

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
