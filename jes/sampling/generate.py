"""Cached decoding of many prompts by many members.

Axis letters: M members, B prompts, T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.members import Members, by_member, unperturbed
from jes.core.programs import program
from jes.core.stack import STACK
from jes.core.tree import is_quantized
from jes.sampling.packing import (
    Packed,
    Rows,
    Shape,
    block_of,
    over_blocks,
    pack_prompts,
    shape_of_prompts,
    shared_shapes,
    zeros,
)
from jes.sampling.prompts import BUCKETS, PromptBatch, batches, bucket

AT_ONCE = 2**14
"""Tokens of padded prompts that are read at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are generated.

    Attributes:
      max_new_tokens: longest answer; 0 in an `Evaluation` for that of its task.
      eos_ids: tokens that end an answer.
      temperature: 0 takes the likeliest token.
      top_k: sample among the k likeliest only; 0 for all.
      top_p: sample among the likeliest that hold this much probability; 1 for all.
    """

    max_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature, top_k >= 0 and 0 < top_p <= 1, not {self}")

    @property
    def fill(self) -> int:
        """The token that follows the end of an answer."""
        return self.eos_ids[0] if self.eos_ids else 0


@program(static_argnames=("model", "sampling"))
@by_member(own=["limits"], shared=["prompts"])
def decode(
    model: Any,
    members: Members,
    prompts: PromptBatch | Packed,
    sampling: Sampling,
    limits: jax.Array | None = None,
) -> jax.Array:
    """Every member answers every prompt; stops when all rows have ended.

    Args:
      model: a decoder, unrolled but where the layers draw their noise.
      members: from `unrolled`. A row's draws depend on its member's key and the row's
        number alone.
      prompts: the same for all members. Each member reads their prefix once.
      sampling: how they are answered.
      limits: int32 [M, B], most tokens of each answer, where that is fewer than N.

    Returns:
      int32 [M, B, N]; after an end token, or its limit, a row holds `sampling.fill`.
    """
    new, prefix = sampling.max_new_tokens, prompts.prefix
    next_position = jnp.asarray(prompts.next_position)
    row_keys = keys_of_rows(members.keys, jnp.arange(len(next_position))[None])
    forward = partial(next_logits, model)

    def prefill(variables: Any) -> Any:
        shared = None
        if prefix is not None:
            _, shared = forward(variables, *prefix[:2])
        if isinstance(prompts, Packed):
            logits, cache = read(model, variables, prompts, shared)
        else:
            reading = partial(forward, variables, prefix=shared)
            logits, cache = by_rows(reading, *prompts[:2])
        return logits, cache.extended(new - 1), shared

    # A vmapped loop would copy the whole cache at each step to keep the rows of
    # finished members, so the step is vmapped. The length of the cache is one scalar
    # for all members, so that a step writes one slot in place and does not scatter.
    shapes = jax.eval_shape(lambda members: prefill(members[0]), members)
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, shapes)
    step = jax.vmap(
        forward, in_axes=(members.axes, 0, None, *axes[1:]), out_axes=axes[:2]
    )

    def choose(logits: jax.Array, index: jax.Array) -> jax.Array:
        indices = jnp.broadcast_to(index, row_keys.shape)
        return choose_tokens(logits, row_keys, indices, sampling)

    def ended(token: jax.Array, index: jax.Array) -> jax.Array:
        ends = is_end(token, sampling.eos_ids)
        return ends if limits is None else ends | (index + 1 >= limits)

    begin = jax.vmap(
        prefill, in_axes=(members.axes,), out_axes=axes, axis_size=members.count
    )
    logits, cache, shared = begin(members.variables)
    token = choose(logits, jnp.int32(0))
    answers = jnp.full((*token.shape, new), sampling.fill, jnp.int32)
    answers = answers.at[..., 0].set(token)

    def running(state: Any) -> jax.Array:
        index, _, done, _, _ = state
        return (index < new) & ~done.all()

    def advance(state: Any) -> Any:
        index, token, done, cache, answers = state
        position = next_position + index - 1
        logits, cache = step(
            members.variables, token[..., None], position, cache, shared
        )
        token = jnp.where(done, sampling.fill, choose(logits, index))
        answers = jax.lax.dynamic_update_index_in_dim(answers, token, index, 2)
        return index + 1, token, done | ended(token, index), cache, answers

    first = jnp.int32(0)
    state = (first + 1, token, ended(token, first), cache, answers)
    return jax.lax.while_loop(running, advance, state)[-1]


def by_rows(read: Any, tokens: Any, positions: Any) -> tuple[jax.Array, Any]:
    """`read` of prompts [B, T], some at a time: their logits [B, V], and the cache.

    As many as have `AT_ONCE` tokens, whose activations are in memory.
    """
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    count, length = tokens.shape
    parts = -(-count // max(1, AT_ONCE // length))
    rows = -(-count // parts)
    if parts == 1:
        return read(tokens, positions)

    def cut(array: jax.Array) -> jax.Array:
        filled = jnp.pad(array, ((0, parts * rows - count), (0, 0)), mode="edge")
        return filled.reshape(parts, rows, length)

    def merge(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:  # of the parts: the length of the cache
            return leaf[0]
        return leaf.reshape(parts * rows, *leaf.shape[2:])[:count]

    found = jax.lax.map(lambda part: read(*part), (cut(tokens), cut(positions)))
    return jax.tree.map(merge, found)


def next_logits(
    model: Any,
    variables: Any,
    tokens: Any,
    positions: Any,
    cache: Any = None,
    prefix: Any = None,
) -> tuple[jax.Array, Any]:
    """Logits [R, V] after the last of a member's tokens [R, T], and the cache."""
    settings = {"cache": cache, "prefix": prefix, "last": 1}
    logits, cache = apply(model, variables, tokens, positions, **settings)
    return logits[:, 0], cache


def apply(
    model: Any, variables: Any, tokens: Any, positions: Any, **settings: Any
) -> tuple[jax.Array, Any]:
    """`model.apply`, with layers that are stacked taken out where they are used."""
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    params = variables["params"]
    if STACK in params and not model.scan_layers:
        # Always 0, but opaque to XLA, so that the slices are not hoisted: it would
        # take all layers out of the stack before the first token, and hold them twice.
        first = (positions.reshape(-1)[0] < -1).astype(jnp.int32)
        variables = variables | {"params": model.unrolled_params(params, first)}
    return model.apply(variables, tokens, positions, **settings)


def read(
    model: Any, variables: Any, prompts: Packed, prefix: Any = None
) -> tuple[jax.Array, Any]:
    """One member reads packed prompts: logits [B, V], and a cache with a row for each.

    `prefix` is the cache of what all begin with.
    """
    blocks, size, length = prompts.rows.tokens.shape
    slots = jnp.asarray(prompts.slots)

    def apply_to(rows: Rows) -> tuple[jax.Array, Any]:
        given = rows.tokens, rows.positions
        logits, cache = apply(model, variables, *given, **rows.settings(prefix))
        return logits.reshape(-1, logits.shape[-1]), cache

    def step(state: Any, rows: Rows, number: Any) -> Any:
        logits, kept = state
        after, new = apply_to(rows)
        logits = logits.at[rows.number.reshape(-1)].set(after, mode="drop")
        put = partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=number * size, axis=0
        )
        return logits, jax.tree.map(put, kept, tuple(new[:2]))

    after, new = jax.eval_shape(apply_to, block_of(prompts, 0))
    logits = zeros(variables, (len(slots), after.shape[-1]), after.dtype)
    kept = jax.tree.map(
        lambda leaf: zeros(variables, (blocks * size, *leaf.shape[1:]), leaf.dtype),
        tuple(new[:2]),
    )
    logits, kept = over_blocks(step, prompts, (logits, kept))

    def take(leaf: jax.Array, axis: int) -> jax.Array:
        def one(row: jax.Array, column: jax.Array) -> jax.Array:
            return jnp.take(leaf[row], column, axis)

        return jax.vmap(one)(slots[:, -1] // length, slots % length)

    keys, values = (
        tuple(take(leaf, axis) for leaf in part)
        for part, axis in zip(kept, (-1, -2), strict=True)
    )
    positions = jnp.asarray(prompts.rows.positions).reshape(-1)[slots]
    positions = jnp.where(slots < 0, -1, positions)
    slot = jnp.int32(slots.shape[1])
    return logits, new._replace(
        keys=keys, values=values, positions=positions, length=slot
    )


def keys_of_rows(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """Keys [M, R] of rows: of their members' [M], by numbers [M, R] or [1, R]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    return fold(keys, jnp.broadcast_to(numbers, (len(keys), numbers.shape[1])))


def choose_tokens(
    logits: jax.Array, row_keys: jax.Array, indices: jax.Array, sampling: Sampling
) -> jax.Array:
    """Next tokens, int32 [M, R], from logits [M, R, V]; -1 where they are not finite.

    `indices`, int32 [M, R], are how many tokens of each answer come before. Where a
    layer has overflowed all logits of a row are infinite or NaN: the first shows it.
    """
    fine = jnp.isfinite(logits[..., 0])
    if not sampling.temperature:
        return jnp.where(fine, logits.argmax(-1), -1).astype(jnp.int32)

    def draw(key: jax.Array, index: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, index), logits)

    drawn = jax.vmap(jax.vmap(draw))(row_keys, indices, restrict(logits, sampling))
    return jnp.where(fine, drawn, -1).astype(jnp.int32)


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Which tokens end an answer: also -1, after which nothing can come."""
    return jnp.isin(tokens, jnp.array((*eos_ids, -1), jnp.int32))


def restrict(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits at the temperature, -inf outside top-k and top-p. [..., V] -> [..., V]."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1)
        logits = jnp.where(logits < least[..., None], -jnp.inf, logits)
    return logits


def lengths_of(answers: np.ndarray, eos_ids: Iterable[int]) -> np.ndarray:
    """How many tokens of answers [..., N] come before the first end token: [...]."""
    ends = np.isin(answers, [*eos_ids, -1])
    return np.where(ends.any(-1), ends.argmax(-1), answers.shape[-1])


def trim(
    answers: np.ndarray, eos_ids: Iterable[int], *, keep_end: bool = False
) -> list[list[int]]:
    """Rows [B, N] as lists of token ids, cut before (or after) the first end token."""
    lengths = lengths_of(answers, eos_ids) + keep_end
    return [row[:n].tolist() for row, n in zip(answers, lengths, strict=True)]


def unrolled(model: Any, members: Members) -> Members:
    """Members with one subtree a layer in all that is each member's own.

    A program of its own, after which the stack can be dropped.
    """
    own = "noise" if members.share_params else "params"
    tree = members.variables[own]
    if tree:
        tree = _unrolled_by_member(model, tree, mesh=members.mesh)
    return members.replace(**{own: tree})


@program(static_argnames=("model", "mesh"))
@by_member(own=["tree"])
def _unrolled_by_member(model: Any, tree: Any) -> Any:
    return jax.vmap(model.unrolled_params)(tree)


@program(static_argnames=("model", "dtype"))
def unrolled_params(model: Any, params: Any, dtype: Any = None) -> Any:
    """Shared parameters with one subtree a layer, copied once for all tokens.

    In the dtype, if one is given, without a stack of that.
    """
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return model.unrolled_params(params)


def generate(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
    keep_end: bool = False,
    batch_size: int = 256,
    buckets: Sequence[int] = BUCKETS,
    share_prefix: bool = True,
) -> list[list[int]]:
    """Answers prompts of any lengths, in their order.

    Prompts of similar length share a batch, padded to one of a few lengths.

    Args:
      model: a decoder, as `jes.load` gives it.
      params: its parameters.
      prompts: lists of token ids.
      max_new_tokens: longest answer, in tokens.
      temperature, top_k, top_p: see `Sampling`.
      key: PRNG key, needed where the temperature is above 0.
      eos_ids: tokens that end an answer; they are not part of it.
      keep_end: make the end token the last one of an answer that has come to it.
      batch_size: prompts decoded at once.
      buckets: prompt lengths to pad to.
      share_prefix: False computes every prompt in full.

    Returns:
      One list of token ids a prompt.

    Raises:
      ValueError: for an empty prompt, one longer than the longest bucket, no room for
        an answer, or a temperature without a key.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature and key is None:
        raise ValueError("sampling with a temperature needs a key")
    if not prompts:
        return []
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        eos_ids=tuple(map(int, eos_ids)),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    key = jax.random.key(0) if key is None else key
    parts = None if share_prefix else ()
    if not is_quantized(params):
        params = unrolled_params(model, params)
    answers: dict[int, list[int]] = {}
    plan = batches(prompts, batch_size, max_new_tokens, buckets, parts)
    filled = [
        [prompts[i] for i in chosen + chosen[-1:] * (size - len(chosen))]
        for chosen, size in plan
    ]
    longest = [bucket(max(map(len, texts)), buckets) for texts in filled]

    def shape_of(batches: Sequence[Any]) -> Shape:
        return shape_of_prompts(batches, buckets, parts, coarse=True)

    shapes = shared_shapes(filled, longest, shape_of)
    for (chosen, _), texts, shape in zip(plan, filled, shapes, strict=True):
        batch = pack_prompts(texts, buckets, parts, shape=shape)
        itself = unperturbed(params, jax.random.fold_in(key, len(answers)))
        out = decode(model.unrolled(), itself, batch, sampling)
        rows = trim(np.asarray(out[0]), eos_ids, keep_end=keep_end)
        answers |= zip(chosen, rows, strict=False)
    return [answers[i] for i in range(len(prompts))]
