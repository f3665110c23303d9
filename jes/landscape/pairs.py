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
from jes.examiner import Examiner, Question
from jes.sampling.generate import decode_members, trim, unrolled_members
from jes.sampling.likelihood import ChoiceBatch, log_likelihoods, pad_choices
from jes.sampling.prompts import pad
from jes.score import rewards_of

OBJECTIVES = ("reward", "surrogate")


class Values(NamedTuple):
    """Of some members, float64 [C, P] each; higher is better.

    Attributes:
      reward: of their greedy answers, or as the examiner samples them.
      surrogate: log-likelihood of the reference answers in nats.
    """

    reward: np.ndarray
    surrogate: np.ndarray


_draw = jax.jit(draw_members, static_argnames=("noise", "dtype"))
_member_keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def values_of(
    examiner: Examiner,
    params: PyTree,
    key: jax.Array,
    members: np.ndarray,
    questions: Sequence[Question],
    references: ChoiceBatch,
    noise: Noise | None,
) -> Values:
    """What members get.

    Args:
      examiner: how they are asked; members answer in its dtype, and have the
        likelihoods of the surrogate in float32.
      params: the centre, float32, of no quantised model.
      key: the generation key.
      members: int [C], numbers of members.
      questions: P of them.
      references: their reference answers.
      noise: how members differ from the centre; None for the centre itself.
    """
    numbers = jnp.asarray(members)
    model = examiner.model
    stacked = _draw(params, key, numbers, noise=noise, dtype=jnp.dtype("float32"))
    with jax.default_matmul_precision("highest"):
        likelihoods = log_likelihoods(model, stacked, references, len(members))
    dtype = jnp.dtype(examiner.dtype)
    stacked = jax.tree.map(lambda leaf: leaf.astype(dtype), stacked)
    if examiner.mode == "likelihood":
        rewards = _by_likelihood(examiner, stacked, questions)
    else:
        tokens = decode_members(
            model.unrolled(),
            unrolled_members(model, stacked),
            pad([question.prompt for question in questions], examiner.buckets),
            _member_keys(key, numbers),
            max_new_tokens=examiner.max_new_tokens,
            eos_ids=examiner.eos_ids,
            sampling=examiner.sampling,
        )
        rewards = _by_answers(examiner, questions, np.asarray(tokens))
    return Values(rewards, np.asarray(likelihoods, np.float64))


def _by_answers(
    examiner: Examiner, questions: Sequence[Question], tokens: np.ndarray
) -> np.ndarray:
    asked = [
        (number, (tuple(text),))
        for rows in tokens
        for number, text in enumerate(trim(rows, examiner.eos_ids))
    ]
    earned = rewards_of(examiner, questions, asked)
    return earned[:, 0].reshape(len(tokens), len(questions))


def _by_likelihood(
    examiner: Examiner, stacked: PyTree, questions: Sequence[Question]
) -> np.ndarray:
    """1 where the choice with the highest log-likelihood per token is right."""
    assert examiner.task.answer is not None
    prompts, choices = [q.prompt for q in questions], [q.choices for q in questions]
    batch = pad_choices(prompts, choices, examiner.buckets)
    count = jax.tree.leaves(stacked)[0].shape[0]
    logs = log_likelihoods(examiner.model, stacked, batch, count)
    per_token = np.asarray(logs) / batch.scored.sum(-1)
    right = [
        per_token[:, batch.owners == number].argmax(-1)
        == examiner.task.answer(question.example)
        for number, question in enumerate(questions)
    ]
    return np.array(right, np.float64).T
