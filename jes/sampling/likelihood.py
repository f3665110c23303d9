"""Log-likelihood of given continuations: scoring without generating.

Axis letters: M members, R rows (a prompt with one of its choices), T tokens,
K tokens of the longest choice.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.members import Members, by_member
from jes.core.programs import program
from jes.sampling.prompts import BUCKETS, PromptBatch, share


class ChoiceBatch(NamedTuple):
    """Prompts with their choices, a row each, left-padded.

    Attributes:
      rows: the tokens of prompt and choice.
      scored: bool [R, K], which of a row's last K tokens belong to its choice.
      owners: int [R], the prompt that a row belongs to.
    """

    rows: PromptBatch
    scored: np.ndarray
    owners: np.ndarray


def pad_choices(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = (),
) -> ChoiceBatch:
    """One row for each choice of each prompt.

    Args:
      prompts: token ids of each prompt.
      choices: for each prompt, the token ids of its choices (none empty).
      buckets, parts: row lengths to pad to, as for `prompts.share`.
    """
    owners = [i for i, some in enumerate(choices) for _ in some]
    tails = [choice for some in choices for choice in some]
    if not min((len(tail) for tail in tails), default=0):
        raise ValueError("a choice is empty: it has no likelihood")
    rows = [[*prompts[i], *tail] for i, tail in zip(owners, tails, strict=True)]
    lengths = np.array([len(tail) for tail in tails])
    longest = lengths.max()
    scored = np.arange(longest) >= longest - lengths[:, None]
    # A row keeps the token before its choice too, which predicts the choice's first.
    batch = share(rows, buckets, parts=parts, own=int(longest) + 1)
    return ChoiceBatch(batch, scored, np.array(owners))


def choice_log_likelihoods(model: Any, variables: Any, batch: ChoiceBatch) -> jax.Array:
    """Summed log-probability in nats of every row's choice: float32 [R].

    The layers of the model and its variables are stacked.
    """
    tokens, positions = map(jnp.asarray, batch.rows[:2])
    longest = batch.scored.shape[1]
    prefix = batch.rows.prefix
    if prefix is not None:
        _, prefix = model.apply(variables, *map(jnp.asarray, prefix[:2]), last=1)
    logits, _ = model.apply(
        variables, tokens, positions, last=longest + 1, prefix=prefix
    )
    log_probabilities = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    targets = tokens[:, -longest:, None]
    chosen = jnp.take_along_axis(log_probabilities, targets, axis=-1)[..., 0]
    return jnp.where(batch.scored, chosen, 0).sum(-1)


@program(static_argnums=0)
@by_member(shared=["batch"])
def log_likelihoods(model: Any, members: Members, batch: ChoiceBatch) -> jax.Array:
    """`choice_log_likelihoods` under every member: float32 [M, R]."""
    score = partial(choice_log_likelihoods, model, batch=batch)
    if members.count == 1:  # vmap would transpose the stack of layers to scan it
        return score(members[0])[None]
    scores = jax.vmap(score, in_axes=(members.axes,), axis_size=members.count)
    return scores(members.variables)
