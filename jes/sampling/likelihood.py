"""Log-likelihood of given continuations: scoring without generating.

A prompt is read once, and its choices go on from there.

Axis letters: M members, B prompts, C choices of a prompt, T tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.members import Members, by_member
from jes.core.programs import program
from jes.sampling.packing import (
    Packed,
    Rows,
    Shape,
    Tree,
    over_blocks,
    pack,
    reads_of_choices,
    shape_of,
    zeros,
)
from jes.sampling.prompts import BUCKETS, bucket, common_prefix


class Choices(NamedTuple):
    """Prompts with their choices, packed.

    Attributes:
      texts: a tree for each prompt, and the targets of its choices.
      lengths: int32 [B, C], tokens of each choice; 0 where a prompt has fewer.
    """

    texts: Packed
    lengths: Any


def choice_tree(prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> Tree:
    """A prompt with the tokens of its choices that predict others."""
    if not min(map(len, choices), default=0):
        raise ValueError("a choice is empty: it has no likelihood")
    return Tree(prompt, [choice[:-1] for choice in choices])


def pack_choices(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = (),
    shape: Shape | None = None,
    rows: np.ndarray | None = None,
) -> Choices:
    """The choices of each prompt, as a tree of tokens.

    Args:
      prompts: token ids of each prompt.
      choices: for each prompt, the token ids of its choices (none empty).
      buckets: lengths of the longest prompt with its choices, to pad to.
      parts: lengths to pad what all prompts begin with to; () shares nothing.
      shape: to pack to.
      rows: int [B], the row of each prompt; see `pack`.
    """
    most = max(map(len, choices))
    prefix, count = common_prefix(prompts, buckets, parts)
    trees = [
        choice_tree(prompt[count:], some)
        for prompt, some in zip(prompts, choices, strict=True)
    ]
    reads = [
        reads_of_choices(tree, some, i * most)
        for i, (tree, some) in enumerate(zip(trees, choices, strict=True))
    ]
    shape = shape or shape_of_choices([(prompts, choices)], buckets, parts)
    lengths = np.zeros((len(prompts), most), np.int32)
    for i, some in enumerate(choices):
        lengths[i, : len(some)] = [*map(len, some)]
    return Choices(pack(trees, reads, shape, prefix, count, rows), lengths)


def shape_of_choices(
    batches: Sequence[tuple[Sequence[Sequence[int]], Sequence[Any]]],
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = (),
) -> Shape:
    """A shape for batches of prompts with choices, as for `pack_choices`."""
    found, longest = [], 0
    for prompts, choices in batches:
        _, common = common_prefix(prompts, buckets, parts)
        pairs = zip(prompts, choices, strict=True)
        sizes = [choice_tree(prompt, some).size - common for prompt, some in pairs]
        found.append((sizes, [sum(map(len, some)) for some in choices]))
        longest = max(longest, *sizes)
    return shape_of(found, longest=bucket(longest, buckets), width=0)


def choice_log_likelihoods(model: Any, variables: Any, batch: Choices) -> jax.Array:
    """Summed log-probability in nats of every choice: float32 [B, C].

    -inf where a prompt has fewer choices. The layers of the model and its variables
    are stacked.
    """
    texts, prefix = batch.texts, None
    if texts.prefix is not None:
        given = map(jnp.asarray, texts.prefix[:2])
        _, prefix = model.apply(variables, *given, last=1)

    def score(sums: jax.Array, rows: Rows, _: Any) -> jax.Array:
        given = rows.tokens, rows.positions
        logits, _ = model.apply(variables, *given, **rows.settings(prefix))
        chosen = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
        chosen -= jax.nn.logsumexp(logits, axis=-1)
        return sums.at[rows.number.reshape(-1)].add(chosen.reshape(-1), mode="drop")

    lengths = jnp.asarray(batch.lengths)
    sums = zeros(variables, (lengths.size,), jnp.float32)
    sums = over_blocks(score, texts, sums).reshape(lengths.shape)
    return jnp.where(lengths > 0, sums, -jnp.inf)


@program(static_argnums=0)
@by_member(shared=["batch"])
def log_likelihoods(model: Any, members: Members, batch: Choices) -> jax.Array:
    """`choice_log_likelihoods` under every member: float32 [M, B, C]."""
    score = partial(choice_log_likelihoods, model, batch=batch)
    if members.count == 1:  # vmap would transpose the stack of layers to scan it
        return score(members[0])[None]
    scores = jax.vmap(score, in_axes=(members.axes,), axis_size=members.count)
    return scores(members.variables)
