"""Attention: which tokens see which, and the weighted sums of what they see.

`attend` is plain for few scores. For many it goes over blocks of queries and of keys:
no array of scores is larger than a block, whatever the length (the softmax of a row is
put together from those of its blocks; 2205.14135).

Axis letters: B batch, T queries, S keys, K key-value heads, G query heads per key-value
head, H head dimension, P tokens of a prefix.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jes.models.cache import PADDING

MASKED = -1e30
"""Score of a masked slot: finite, so that a row of padding gives no NaN."""
BLOCK = 512
CPU_BLOCK = 128
"""Queries, and keys, of a block. What has no more scores than two blocks is not cut: on
two cores rows of 256 tokens then take 0.7 times as long, of 2,048 a fifth."""


class Place(NamedTuple):
    """Where tokens stand, int [B, T]: segment and trunk are None for one text a row."""

    position: jax.Array
    segment: jax.Array | None = None
    trunk: jax.Array | None = None


def sees(queries: Place, keys: Place) -> jax.Array:
    """Which keys a query attends to, bool [B, T, S]: of its text, not after itself."""
    position = keys.position[:, None, :]
    visible = (position <= queries.position[:, :, None]) & (position != PADDING)
    if queries.segment is None or queries.trunk is None or keys.segment is None:
        return visible
    segment = keys.segment[:, None, :]
    own, trunk = queries.segment[:, :, None], queries.trunk[:, :, None]
    return visible & ((segment == own) | (segment == trunk))


class Attended(NamedTuple):
    """Sums of values [B, T, K, G, H], and the logsumexp of the scores [B, T, K, G]."""

    values: jax.Array
    log_sum: jax.Array


def joined(one: Attended, two: Attended) -> Attended:
    """Attention to the keys of both: the mean of the two, weighted by their sums."""
    part = jax.nn.sigmoid(one.log_sum - two.log_sum)[..., None]
    values = part * one.values + (1 - part) * two.values
    return Attended(values, jnp.logaddexp(one.log_sum, two.log_sum))


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    queries: Place,
    seen: Place,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention with scaled queries; scores and weights in float32.

    Args:
      q: [B, T, K, G, H], already scaled.
      keys: [B, K, H, S].
      values: [B, K, S, H].
      queries, seen: where the queries and the keys stand.
      prefix: keys [1, K, H, P], values [1, K, P, H] and positions [1, P] that come
        before those of every row.
      causal: whether no key is later in its row than what sees it.

    Returns:
      float32 [B, T, K, G, H].
    """
    own = _attend(q, keys, values, queries, seen, causal=causal)
    if prefix is None:
        return own.values
    # All queries attend to the prefix as one long row: it is read once.
    row = (1, q.shape[0] * q.shape[1])
    before = Place(queries.position.reshape(row)), Place(prefix[2])
    many = q.reshape(*row, *q.shape[2:])
    if q.shape[1] == 1:
        shared = attend_at_once(many, *prefix[:2], sees(*before))
    else:
        shared = _attend(many, *prefix[:2], *before)
    return joined(Attended(*map(jnp.reshape, shared, map(jnp.shape, own))), own).values


def _attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    queries: Place,
    seen: Place,
    causal: bool = False,
) -> Attended:
    """In blocks, or not, as the platform likes it."""
    length, slots = q.shape[1], keys.shape[-1]
    given = q, keys, values, queries, seen

    def with_blocks(block: int) -> Callable[..., Attended]:
        if length > 1 and length * slots > 2 * block * block:
            return partial(attend_in_blocks, causal=causal, block=block)
        # CPUs run matrix-vector products faster as one fused multiply-and-sum.
        fused = length == 1 and block == CPU_BLOCK
        one = _attend_fused if fused else attend_at_once
        return lambda q, keys, values, *places: one(q, keys, values, sees(*places))

    if length > 1 and length * slots <= 2 * CPU_BLOCK * CPU_BLOCK:
        return with_blocks(BLOCK)(*given)
    return jax.lax.platform_dependent(
        *given, cpu=with_blocks(CPU_BLOCK), default=with_blocks(BLOCK)
    )


def attend_at_once(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> Attended:
    """Attention by two products, with all scores in memory; `visible` is of `sees`."""
    f32 = jnp.float32
    scores = jnp.einsum("btkgh,bkhs->bkgts", q, keys, preferred_element_type=f32)
    weights, log_sum = _softmax(scores, visible[:, None, None])
    weights = weights.astype(values.dtype)
    equation = "bkgts,bksh->btkgh"
    out = jnp.einsum(equation, weights, values, preferred_element_type=f32)
    return Attended(out, log_sum.transpose(0, 3, 1, 2))


def _attend_fused(q, keys, values, visible):
    q, keys, values = (a.astype(jnp.float32) for a in (q[:, 0], keys, values))
    scores = (q[..., None] * keys[:, :, None]).sum(-2)  # [B, K, G, S]
    weights, log_sum = _softmax(scores, visible[:, :, None])
    out = (weights[..., None] * values[:, :, None]).sum(-2)
    return Attended(out[:, None], log_sum[:, None])


def _softmax(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax weights, and the logsumexp of the scores."""
    scores = jnp.where(visible, scores, MASKED)
    # Written as softmax computes it, so that the compiler merges the two.
    largest = scores.max(-1, keepdims=True)
    total = jnp.exp(scores - largest).sum(-1, keepdims=True)
    return jax.nn.softmax(scores, axis=-1), (largest + jnp.log(total))[..., 0]


def attend_in_blocks(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    queries: Place,
    seen: Place,
    *,
    causal: bool = False,
    block: int = BLOCK,
) -> Attended:
    """The same, a block of queries and of keys at a time; arguments as of `attend`."""
    length = q.shape[1]
    rows, columns = min(block, length), min(block, keys.shape[-1])

    def of_queries(number: jax.Array, own: tuple[jax.Array, Place]) -> Attended:
        q, place = own

        def of_keys(found: Attended, part: tuple) -> tuple[Attended, None]:
            first, keys, values, seen = part

            def more(found: Attended) -> Attended:
                return joined(found, attend_at_once(q, keys, values, sees(place, seen)))

            def if_needed(found: Attended) -> Attended:
                needed = first < (number + 1) * rows
                return jax.lax.cond(needed, more, lambda found: found, found)

            if not causal:
                return more(found), None
            # GPUs ask the host whether to go on, which takes longer than the block.
            skip = {"cpu": if_needed, "tpu": if_needed, "default": more}
            return jax.lax.platform_dependent(found, **skip), None

        nothing = jnp.full(q.shape[:-1], MASKED, jnp.float32) + 0 * q[..., 0]
        start = Attended(jnp.zeros_like(q, jnp.float32), nothing.astype(jnp.float32))
        return jax.lax.scan(jax.checkpoint(of_keys), start, parts)[0]

    firsts = jnp.arange(-(-keys.shape[-1] // columns)) * columns
    parts = (
        firsts,
        _blocks(keys, columns, 3),
        _blocks(values, columns, 2),
        Place(*map(partial(_blocks, size=columns, padding=PADDING), _given(seen))),
    )
    own = Place(*map(partial(_blocks, size=rows, padding=PADDING), _given(queries)))
    cut = _blocks(q, rows, 1), own
    numbers = jnp.arange(-(-length // rows))
    found = jax.lax.map(lambda part: of_queries(*part), (numbers, cut))
    return Attended(
        *(
            jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
            for x in found
        )
    )


def _given(place: Place) -> list[jax.Array]:
    return [part for part in place if part is not None]


def _blocks(x: jax.Array, size: int, axis: int = 1, padding: int = 0) -> jax.Array:
    """Blocks of an axis on a new leading axis, the last filled up."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, widths, constant_values=padding)
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)
