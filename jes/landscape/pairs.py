"""What antithetic pairs of perturbed models get, prompt by prompt.

Axis letters: C members of a chunk, P prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.noise import Noise, PyTree
from jes.core.population import draw_members
from jes.questions import Evaluation, Question
from jes.sampling.generate import decode_members, trim, unrolled_members
from jes.sampling.likelihood import ChoiceBatch, log_likelihoods, pad_choices
from jes.sampling.prompts import pad
from jes.scoring import rewards_of

OBJECTIVES = ("reward", "surrogate")


class Values(NamedTuple):
    """Of some members, float64 [C, P] each; higher is better.

    Attributes:
      reward: of their greedy answers, or as the evaluation samples them.
      surrogate: log-likelihood of the reference answers in nats.
    """

    reward: np.ndarray
    surrogate: np.ndarray


_draw = jax.jit(draw_members, static_argnames=("noise", "dtype"))
_member_keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def values_of(
    evaluation: Evaluation,
    params: PyTree,
    key: jax.Array,
    members: np.ndarray,
    questions: Sequence[Question],
    references: ChoiceBatch,
    noise: Noise | None,
) -> Values:
    """What members get.

    Args:
      evaluation: how they are asked; members answer in its dtype, and have the
        likelihoods of the surrogate in float32.
      params: the centre, float32, of no quantised model.
      key: the generation key.
      members: int [C], numbers of members.
      questions: P of them.
      references: their reference answers.
      noise: how members differ from the centre; None for the centre itself.
    """
    numbers = jnp.asarray(members)
    model = evaluation.model
    stacked = _draw(params, key, numbers, noise=noise, dtype=jnp.dtype("float32"))
    with jax.default_matmul_precision("highest"):
        likelihoods = log_likelihoods(model, stacked, references, len(members))
    dtype = jnp.dtype(evaluation.dtype)
    stacked = jax.tree.map(lambda leaf: leaf.astype(dtype), stacked)
    if evaluation.mode == "likelihood":
        rewards = _by_likelihood(evaluation, stacked, questions)
    else:
        tokens = decode_members(
            model.unrolled(),
            unrolled_members(model, stacked),
            pad([question.prompt for question in questions], evaluation.buckets),
            _member_keys(key, numbers),
            max_new_tokens=evaluation.max_new_tokens,
            eos_ids=evaluation.eos_ids,
            sampling=evaluation.sampling,
        )
        rewards = _by_answers(evaluation, questions, np.asarray(tokens))
    return Values(rewards, np.asarray(likelihoods, np.float64))


def _by_answers(
    evaluation: Evaluation, questions: Sequence[Question], tokens: np.ndarray
) -> np.ndarray:
    asked = [
        (number, (tuple(text),))
        for rows in tokens
        for number, text in enumerate(trim(rows, evaluation.eos_ids))
    ]
    earned = rewards_of(evaluation, questions, asked)
    return earned[:, 0].reshape(len(tokens), len(questions))


def _by_likelihood(
    evaluation: Evaluation, stacked: PyTree, questions: Sequence[Question]
) -> np.ndarray:
    """1 where the choice with the highest log-likelihood per token is right."""
    assert evaluation.task.answer is not None
    prompts, choices = [q.prompt for q in questions], [q.choices for q in questions]
    batch = pad_choices(prompts, choices, evaluation.buckets)
    count = jax.tree.leaves(stacked)[0].shape[0]
    logs = log_likelihoods(evaluation.model, stacked, batch, count)
    per_token = np.asarray(logs) / batch.scored.sum(-1)
    right = [
        per_token[:, batch.owners == number].argmax(-1)
        == evaluation.task.answer(question.example)
        for number, question in enumerate(questions)
    ]
    return np.array(right, np.float64).T
