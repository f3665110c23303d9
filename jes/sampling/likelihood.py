"""Log-likelihood of given continuations: scoring without generating.

Axis letters: M members, R rows (a prompt with one of its choices), T tokens,
K tokens of the longest choice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.mesh import by_member
from jes.sampling.generate import member_variables
from jes.sampling.prompts import BUCKETS, PromptBatch, share


class ChoiceBatch(NamedTuple):
    """Prompts with their choices, a row each, left-padded.

    Attributes:
      rows: the tokens of prompt and choice, without those of the prefix.
      scored: bool [R, K], which of a row's last K tokens belong to its choice.
      owners: int [R], the prompt that a row belongs to.
      prefix: what all rows begin with, as one row; see `prompts.share`.
    """

    rows: PromptBatch
    scored: np.ndarray
    owners: np.ndarray
    prefix: PromptBatch | None = None


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
    # Also the last token before a choice has to be there: it predicts the first of it.
    prefix, rest = share(rows, buckets, parts=parts, own=int(longest) + 1)
    return ChoiceBatch(rest, scored, np.array(owners), prefix)


@by_member(own=["params"], shared=["batch", "centre"])
def choice_log_likelihoods(
    model: Any, params: Any, batch: ChoiceBatch, members: int, centre: Any = None
) -> jax.Array:
    """Summed log-probability in nats of every row's choice under every member.

    Args:
      model: a decoder.
      params: stacked parameters with a leading member axis [M, ...]; with a `centre`,
        how members differ from it, or None.
      batch: prompts and choices.
      members: M, where `params` is None.
      centre: the stacked parameters that members share.

    Returns:
      float32 [M, R].
    """
    tokens, positions = map(jnp.asarray, batch.rows)
    longest = batch.scored.shape[1]
    targets = tokens[:, -longest:, None]

    def score(params: Any) -> jax.Array:
        variables = member_variables(params, centre)
        shared = None
        if batch.prefix is not None:
            row = map(jnp.asarray, batch.prefix)
            _, shared = model.apply(variables, *row, last=1)
        logits, _ = model.apply(
            variables, tokens, positions, last=longest + 1, prefix=shared
        )
        log_probabilities = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        chosen = jnp.take_along_axis(log_probabilities, targets, axis=-1)[..., 0]
        return jnp.where(batch.scored, chosen, 0).sum(-1)

    if params is None:
        return jax.vmap(score, axis_size=members)(params)
    if len(jax.tree.leaves(params)[0]) == 1:
        # One member's layers are taken from its stack one by one. Of several the whole
        # stack would be turned first, for a scan over layers of all of them.
        return score(jax.tree.map(lambda leaf: leaf[0], params))[None]
    return jax.vmap(score)(params)


log_likelihoods = jax.jit(choice_log_likelihoods, static_argnums=(0, 3))
"""`choice_log_likelihoods`, compiled once for each shape."""
