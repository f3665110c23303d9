"""Cached decoding of many prompts, by one set of weights or by many at once.

Axis letters: M members, B prompts, T prompt tokens, N new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jes.core.mesh import by_member
from jes.core.tree import is_quantized
from jes.sampling.prompts import BUCKETS, PromptBatch, batches, share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: sample among the k likeliest only; 0 for all.
      top_p: sample among the likeliest that hold this much probability; 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature, top_k >= 0 and 0 < top_p <= 1, not {self}")


GREEDY = Sampling()


@by_member(own=["params", "keys", "limits"], shared=["prompts", "centre", "prefix"])
def decode(
    model: Any,
    params: Any,
    prompts: PromptBatch,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling = GREEDY,
    centre: Any = None,
    prefix: PromptBatch | None = None,
    limits: jax.Array | None = None,
) -> jax.Array:
    """Answers every prompt with every member's weights (to be traced under `jit`).

    Stops when every row has ended. The step is vmapped inside the loop, not the loop
    itself: a vmapped `while_loop` would copy the whole cache at each step to keep the
    rows of finished members.

    Args:
      model: a decoder, in its unrolled form but where noise is drawn by layer.
      params: its parameters, each leaf with a leading member axis [M, ...]; or how
        members differ from a `centre`, or None.
      prompts: left-padded prompts, the same for all members.
      keys: typed PRNG keys [M], used where the temperature is above 0. A row's draws
        depend on its member's key and its number alone.
      max_new_tokens: N.
      eos_ids: tokens that end an answer.
      sampling: how the next token is chosen.
      centre: the parameters that members share: stacked, of a quantised model or where
        noise is drawn by layer; or unrolled.
      prefix: one row of tokens that every prompt begins with, left out of `prompts`:
        see `prompts.share`. Each member reads it once.
      limits: int32 [M, B], most tokens of each answer, where that is fewer than N.

    Returns:
      int32 [M, B, N]; after an end token, or its limit, the row holds `eos_ids[0]` (0
      where there are none).
    """
    chex.assert_equal_shape(list(prompts))
    chex.assert_tree_shape_prefix(params, keys.shape)
    row_keys = keys_of_rows(keys, jnp.arange(prompts.tokens.shape[0])[None])
    next_position = jnp.asarray(prompts.positions[:, -1:]) + 1

    forward = partial(next_logits, model, centre)

    def prefill(params: Any) -> Any:
        shared = None
        if prefix is not None:
            _, shared = forward(params, *map(jnp.asarray, prefix))
        tokens, positions = map(jnp.asarray, prompts)
        logits, cache = forward(params, tokens, positions, prefix=shared)
        return logits, cache.extended(max_new_tokens - 1), shared

    # Arrays of the cache are per member; its length is one scalar for all, so that a
    # step writes one slot in place instead of scattering to a slot per member.
    shapes = jax.eval_shape(prefill, jax.tree.map(lambda leaf: leaf[0], params))
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, shapes)
    step = jax.vmap(forward, in_axes=(0, 0, None, *axes[1:]), out_axes=axes[:2])

    def choose(logits: jax.Array, index: jax.Array) -> jax.Array:
        indices = jnp.broadcast_to(index, row_keys.shape)
        return choose_tokens(logits, row_keys, indices, sampling)

    def ended(token: jax.Array, index: jax.Array) -> jax.Array:
        ends = is_end(token, eos_ids)
        return ends if limits is None else ends | (index + 1 >= limits)

    members = keys.shape[0]
    read = jax.vmap(prefill, out_axes=axes, axis_size=members)
    logits, cache, shared = read(params)
    token = choose(logits, jnp.int32(0))
    fill = eos_ids[0] if eos_ids else 0
    answers = jnp.full((*token.shape, max_new_tokens), fill, jnp.int32)
    answers = answers.at[..., 0].set(token)

    def running(state: Any) -> jax.Array:
        index, _, done, _, _ = state
        return (index < max_new_tokens) & ~done.all()

    def advance(state: Any) -> Any:
        index, token, done, cache, answers = state
        position = next_position + index - 1
        logits, cache = step(params, token[..., None], position, cache, shared)
        token = jnp.where(done, fill, choose(logits, index))
        answers = jax.lax.dynamic_update_index_in_dim(answers, token, index, 2)
        return index + 1, token, done | ended(token, index), cache, answers

    first = jnp.int32(0)
    state = (first + 1, token, ended(token, first), cache, answers)
    return jax.lax.while_loop(running, advance, state)[-1]


def next_logits(
    model: Any,
    centre: Any,
    params: Any,
    tokens: Any,
    positions: Any,
    cache: Any = None,
    prefix: Any = None,
) -> tuple[jax.Array, Any]:
    """Logits [R, V] after the last of a member's tokens [R, T], and the cache.

    Args:
      model, centre, params: as for `decode`, `params` of one member.
      tokens, positions, cache, prefix: what `model.apply` takes.
    """
    stack = centre
    if centre is not None and "layers" in centre and not model.scan_layers:
        # Never so, but not for the compiler to know: or it would take all layers
        # out of the stack before the first token, and hold them twice.
        impossible = (positions.reshape(-1)[0] < -1).astype(jnp.int32)
        stack = model.unrolled_params(centre, impossible)
    variables = member_variables(params, stack)
    logits, cache = model.apply(
        variables, tokens, positions, cache, last=1, prefix=prefix
    )
    return logits[:, 0], cache


def keys_of_rows(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    """Keys [M, R] of rows: of their members' [M], by numbers [M, R] or [1, R]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    return fold(keys, jnp.broadcast_to(numbers, (len(keys), numbers.shape[1])))


def choose_tokens(
    logits: jax.Array, row_keys: jax.Array, indices: jax.Array, sampling: Sampling
) -> jax.Array:
    """Next tokens, int32 [M, R].

    Args:
      logits: [M, R, V].
      row_keys: see `keys_of_rows`.
      indices: int32 [M, R], how many tokens of the answer come before.
      sampling: how they are chosen.
    """
    if not sampling.temperature:
        return logits.argmax(-1).astype(jnp.int32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    draw = jax.vmap(jax.vmap(jax.random.categorical))
    drawn = draw(fold(row_keys, indices), restrict(logits, sampling))
    return drawn.astype(jnp.int32)


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Which tokens end an answer."""
    return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32))


def member_variables(params: Any, centre: Any) -> dict[str, Any]:
    """What `model.apply` takes for a member, from its weights or its deviation."""
    if centre is None:
        return {"params": params}
    return {"params": centre} | ({} if params is None else {"noise": params})


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


def trim(
    answers: np.ndarray, eos_ids: Iterable[int], *, keep_end: bool = False
) -> list[list[int]]:
    """Rows [B, N] as lists of token ids, cut before (or after) the first end token."""
    ends = np.isin(answers, list(eos_ids))
    lengths = np.where(ends.any(-1), ends.argmax(-1) + keep_end, answers.shape[-1])
    return [row[:n].tolist() for row, n in zip(answers, lengths, strict=True)]


decode_members = jax.jit(
    decode, static_argnums=0, static_argnames=("max_new_tokens", "eos_ids", "sampling")
)
"""`decode`, compiled once for each shape and setting."""


@partial(jax.jit, static_argnums=0)
@by_member(own=["params"])
def unrolled_members(model: Any, params: Any) -> Any:
    """Members' stacked parameters [M, L, ...] with one subtree a layer, [M, ...].

    A program of its own, after which the stack can be dropped: as a part of `decode`,
    or of drawing the members, both forms would be held while it runs.
    """
    return jax.vmap(model.unrolled_params)(params)


@partial(jax.jit, static_argnums=0)
def unrolled_centre(model: Any, params: Any) -> Any:
    """What members share, stacked [L, ...], with one subtree a layer.

    A program of its own, so that no token and no chunk of members copies it again.
    """
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

    Prompts of similar length share a batch, padded to one of a few lengths, so that
    repeated calls compile each shape once. What all of a batch begin with is computed
    once.

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
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    key = jax.random.key(0) if key is None else key
    parts = None if share_prefix else ()
    start = 0
    answers: list[list[int]] = [[] for _ in prompts]
    weights, centre = None, params
    if not is_quantized(params):
        one = jax.tree.map(lambda leaf: leaf[None], params)
        weights, centre = unrolled_members(model, one), None
    plan = batches(prompts, batch_size, max_new_tokens, buckets, parts)
    for chosen, size in plan:
        filled = chosen + chosen[-1:] * (size - len(chosen))
        prefix, batch = share([prompts[i] for i in filled], buckets, parts=parts)
        out = decode_members(
            model.unrolled(),
            weights,
            batch,
            jax.random.fold_in(key, start)[None],
            max_new_tokens=max_new_tokens,
            eos_ids=tuple(int(i) for i in eos_ids),
            sampling=sampling,
            centre=centre,
            prefix=prefix,
        )
        start += len(chosen)
        rows = trim(np.asarray(out[0]), eos_ids, keep_end=keep_end)
        for i, answer in zip(chosen, rows, strict=False):
            answers[i] = answer
    return answers
