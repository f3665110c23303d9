"""Cached decoding in a fixed number of slots, which answers that end leave to others.

Answers differ in length, and a few are far longer than most. `decode` holds the rows of
all until the last has ended; here a member has so many rows at a time, decodes in
slices, and between them fills the rows that have ended with the prompts that wait. When
none waits, the rows that are left move to fewer slots, so that the last long answer is
not paid for with the steps of all.

Shapes are fixed, so nothing is compiled again: the slots of the cache are a ring. All
rows write to the same slot of it, which moves on by one a token; a prompt that comes in
is turned in the ring so that it ends right before that slot. What a row sees is said by
the positions in its cache, of which the rest is padding.

Axis letters: M members, B prompts, S slots, F rows read at once, T prompt tokens,
R slots of the ring, N new tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jes.core.mesh import by_member
from jes.sampling.generate import (
    GREEDY,
    Sampling,
    choose_tokens,
    is_end,
    keys_of_rows,
    next_logits,
)
from jes.sampling.prompts import PromptBatch

READ = 4
"""A member's slots over the prompts it reads at once: it waits for so many rows to
end. Fewer at once are more launches, more are more rows that idle."""

STEP = 4
"""When none waits, slots become fewer by this factor: each number of them has a program
of its own."""


class Rows(NamedTuple):
    """Answers under way; each array has a leading axis of members.

    Attributes:
      cache: a `Cache` of S rows, a ring of R slots; its `length`, int32 [M], is the
        same for all members.
      token: int32 [M, S], the last token of each answer, not yet in the cache.
      length: int32 [M, S], how many tokens the answer has, with that one.
      position: int32 [M, S], of its first token.
      limit: int32 [M, S], the most tokens it may have.
      number: int32 [M, S], of the prompt.
      done: bool [M, S], whether the answer has ended, or there is none.
    """

    cache: Any
    token: jax.Array
    length: jax.Array
    position: jax.Array
    limit: jax.Array
    number: jax.Array
    done: jax.Array


def decode_in_slots(
    model: Any,
    params: Any,
    prompts: PromptBatch,
    keys: jax.Array,
    *,
    slots: int,
    slice_tokens: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling = GREEDY,
    centre: Any = None,
    prefix: PromptBatch | None = None,
    limits: Any = None,
) -> np.ndarray:
    """What `decode_members` gives, with the cache of `slots` rows a member.

    Driven from the host, which waits for each slice. Prompts are answered in their
    order; the draws of a row are those of the plain loop.

    Args:
      model, params, prompts, keys, max_new_tokens, eos_ids, sampling, centre, prefix,
        limits: as for `decode`.
      slots: S, rows that a member has at a time.
      slice_tokens: most tokens between two looks of the host at what has ended.

    Returns:
      int32 [M, B, N], as `decode`.

    Raises:
      ValueError: for no slots, or slices without tokens.
    """
    chex.assert_equal_shape(list(prompts))
    total, width = prompts.tokens.shape
    if min(slots, slice_tokens) < 1:
        raise ValueError(f"slots={slots}, slice_tokens={slice_tokens}: at least 1")
    if limits is None:
        limits = np.full((len(keys), total), max_new_tokens)
    limits = np.minimum(limits, max_new_tokens).astype(np.int32)
    given = {"model": model, "params": params, "centre": centre, "keys": keys}
    before = None if prefix is None else _read_prefix(**given, prefix=prefix)
    given |= {"before": before, "eos_ids": eos_ids, "sampling": sampling}

    fill = eos_ids[0] if eos_ids else 0
    answers = np.full((len(keys), total, max_new_tokens), fill, np.int32)
    seats = Seats(len(keys), total, min(slots, total))
    rows = None
    while True:
        if seats.ready():
            places, numbers = seats.fill()
            new = _read(
                prompts=PromptBatch(*(array[numbers] for array in prompts)),
                limits=np.take_along_axis(limits, numbers, 1),
                numbers=numbers,
                **given,
            )
            if rows is None:
                ring = width + max_new_tokens - 1
                rows = _empty(new, slots=seats.slots, ring=ring)
            rows = _place(rows, new, places)
            continue
        if not seats.active.any():
            return answers
        if seats.fewer() < seats.slots:
            rows = _moved(rows, seats.move(seats.fewer()))
        rows, report = _advance(
            rows=rows,
            hold=seats.hold(),
            floor=seats.floor(),
            slice_tokens=slice_tokens,
            **given,
        )
        seats.hear(np.asarray(report), answers)


class Seats:
    """What the host knows of the slots: who has which, and who is next.

    Attributes:
      numbers: int [M, S], of the prompt in each slot; -1 in free ones.
      lengths: int [M, S], tokens that its answer has.
      begun: int [M], how many prompts each member has taken up.
      sizes: numbers of slots that there may come to be.
    """

    def __init__(self, members: int, total: int, slots: int) -> None:
        self.total, self.group = total, -(-slots // READ)
        self.sizes = [slots]
        while self.sizes[-1] >= STEP:
            self.sizes.append(-(-self.sizes[-1] // STEP))
        self.numbers = np.full((members, slots), -1)
        self.lengths = np.zeros((members, slots), int)
        self.begun = np.zeros(members, int)

    @property
    def slots(self) -> int:
        """S."""
        return self.numbers.shape[1]

    @property
    def taken(self) -> np.ndarray:
        """bool [M, S], which slots have an answer under way."""
        return self.numbers >= 0

    @property
    def active(self) -> np.ndarray:
        """How many answers of each member are under way."""
        return self.taken.sum(1)

    @property
    def waiting(self) -> np.ndarray:
        """How many prompts each member has not begun."""
        return self.total - self.begun

    def hold(self) -> np.ndarray:
        """For how few active rows to stop a slice: int32 [M], -1 where none waits."""
        wanted = np.minimum(self.waiting, self.group)
        return np.where(wanted > 0, self.slots - wanted, -1).astype(np.int32)

    def ready(self) -> bool:
        """Whether some member can read as many prompts as are read at once."""
        return bool((self.active <= self.hold()).any())

    def fill(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives free slots to the next prompts.

        Returns:
          int32 [M, F] slots, S for none, and [M, F] prompts for them.
        """
        places = np.full((len(self.begun), self.group), self.slots, np.int32)
        numbers = np.zeros_like(places)
        for member, taken in enumerate(self.taken):
            free = np.flatnonzero(~taken)[: self.group]
            free = free[: self.waiting[member]]
            new = self.begun[member] + np.arange(len(free))
            places[member, : len(free)], numbers[member, : len(free)] = free, new
            self.numbers[member, free], self.lengths[member, free] = new, 1
            self.begun[member] += len(free)
        return places, numbers

    def fewer(self) -> int:
        """Slots that are enough from now on: S while a member has prompts that wait."""
        if self.waiting.any():
            return self.slots
        return min(n for n in self.sizes if n >= self.active.max())

    def floor(self) -> np.int32:
        """For how few active rows of every member to stop a slice."""
        smaller = [n for n in self.sizes if n < self.slots]
        return np.int32(0 if self.waiting.any() else max(smaller, default=0))

    def move(self, slots: int) -> np.ndarray:
        """Leaves so many slots, those with answers first: int32 [M, slots], which."""
        order = np.argsort(~self.taken, axis=1, kind="stable")[:, :slots]
        self.numbers = np.take_along_axis(self.numbers, order, 1)
        self.lengths = np.take_along_axis(self.lengths, order, 1)
        return order.astype(np.int32)

    def hear(self, report: np.ndarray, answers: np.ndarray) -> None:
        """Takes what `_advance` reports into the answers [M, B, N]; frees slots."""
        tokens, lengths, done = report[..., :-2], report[..., -2], report[..., -1]
        member, slot = np.nonzero(self.taken)
        # The last token before the slice is the first of it.
        first = self.lengths[member, slot] - 1
        heard = (lengths[member, slot] - first)[:, None] > np.arange(tokens.shape[-1])
        row, step = np.nonzero(heard)
        number = self.numbers[member, slot]
        answers[member[row], number[row], first[row] + step] = tokens[
            member[row], slot[row], step
        ]
        self.lengths = lengths.astype(int)
        self.numbers[done == 1] = -1


@partial(jax.jit, static_argnames=("model",))
@by_member(own=["params", "keys"], shared=["prefix", "centre"])
def _read_prefix(model: Any, params: Any, centre: Any, keys: Any, prefix: Any) -> Any:
    """Each member's keys and values of what all prompts begin with."""

    def read(params: Any) -> Any:
        return next_logits(model, centre, params, *map(jnp.asarray, prefix))[1]

    return jax.vmap(read, axis_size=keys.shape[0])(params)


@partial(jax.jit, static_argnames=("model", "eos_ids", "sampling"))
@by_member(
    own=["params", "keys", "before", "prompts", "numbers", "limits"],
    shared=["centre"],
)
def _read(
    model: Any,
    params: Any,
    centre: Any,
    prompts: PromptBatch,
    numbers: jax.Array,
    keys: jax.Array,
    before: Any,
    limits: jax.Array,
    *,
    eos_ids: tuple[int, ...],
    sampling: Sampling,
) -> Rows:
    """Reads prompts [M, F, T] with these numbers and limits; chooses first tokens."""
    tokens, positions = map(jnp.asarray, prompts)
    forward = jax.vmap(partial(next_logits, model, centre), in_axes=(0, 0, 0, None, 0))
    logits, cache = forward(params, tokens, positions, None, before)
    row_keys = keys_of_rows(keys, numbers)
    token = choose_tokens(logits, row_keys, jnp.zeros_like(numbers), sampling)
    length = jnp.ones_like(numbers)
    done = is_end(token, eos_ids) | (limits <= 1)
    position = positions[..., -1] + 1
    return Rows(cache, token, length, position, limits, numbers, done)


@partial(jax.jit, static_argnames=("slots", "ring"))
@by_member(own=["like"])
def _empty(like: Rows, *, slots: int, ring: int) -> Rows:
    """So many slots without answers, of members with rows like these."""
    cache = jax.vmap(lambda cache: cache.blank(slots, ring))(like.cache)
    zeros = (jnp.zeros((len(leaf), slots), leaf.dtype) for leaf in like[1:])
    rows = Rows(cache, *zeros)
    return rows._replace(done=~rows.done)


@partial(jax.jit, donate_argnames="rows")
@by_member(own=["rows", "new", "places"])
def _place(rows: Rows, new: Rows, places: jax.Array) -> Rows:
    """Writes new rows [M, F] to these slots [M, F], in place; S is nowhere."""
    cache, axes, lengths = _one_length(rows.cache)

    def put(old: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
        return old.at[places].set(new, mode="drop")

    def put_all(cache: Any, new: Any, places: jax.Array) -> Any:
        return cache.with_rows(new, places)

    cache = jax.vmap(put_all, in_axes=(axes, 0, 0), out_axes=axes)(
        cache, new.cache, places
    )
    rest = zip(rows[1:], new[1:], strict=True)
    return Rows(
        cache._replace(length=lengths),
        *(jax.vmap(put)(old, leaf, places) for old, leaf in rest),
    )


@jax.jit
@by_member(own=["rows", "order"])
def _moved(rows: Rows, order: jax.Array) -> Rows:
    """The rows in these slots [M, S]."""
    length = rows.cache.length
    rows = rows._replace(cache=rows.cache._replace(length=None))
    take = jax.vmap(lambda leaf, order: leaf[order])
    rows = jax.tree.map(lambda leaf: take(leaf, order), rows)
    return rows._replace(cache=rows.cache._replace(length=length))


@partial(
    jax.jit,
    static_argnames=("model", "slice_tokens", "eos_ids", "sampling"),
    donate_argnames="rows",
)
@by_member(own=["params", "rows", "keys", "before", "hold"], shared=["centre", "floor"])
def _advance(
    model: Any,
    params: Any,
    centre: Any,
    rows: Rows,
    keys: jax.Array,
    before: Any,
    hold: jax.Array,
    floor: jax.Array,
    *,
    slice_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Rows, jax.Array]:
    """Decodes `slice_tokens` tokens, or fewer where there is something else to do.

    That is as soon as one member has no more active rows than its `hold` [M], or all
    have no more than `floor`.

    Returns:
      The rows, and int32 [M, S, slice_tokens + 3]: the last token before and those of
      the slice, the number of tokens of each answer, and whether it has ended.
    """
    ring = rows.cache.positions.shape[-1]
    row_keys = keys_of_rows(keys, rows.number)
    cache, axes, lengths = _one_length(rows.cache)
    rows = rows._replace(cache=cache)
    # As in `decode`, the step is vmapped inside the loop.
    step = jax.vmap(
        partial(next_logits, model, centre),
        in_axes=(0, 0, 0, axes, 0),
        out_axes=(0, axes),
    )

    def running(state: Any) -> jax.Array:
        index, rows, _ = state
        active = (~rows.done).sum(-1)
        stop = (active <= hold).any() | (active <= floor).all()
        return (index < slice_tokens) & ~stop

    def advance(state: Any) -> Any:
        index, rows, said = state
        position = rows.position + rows.length - 1
        logits, cache = step(
            params, rows.token[..., None], position[..., None], rows.cache, before
        )
        chosen = choose_tokens(logits, row_keys, rows.length, sampling)
        token = jnp.where(rows.done, rows.token, chosen)
        length = rows.length + ~rows.done
        done = rows.done | is_end(token, eos_ids) | (length >= rows.limit)
        said = jax.lax.dynamic_update_index_in_dim(said, token, index + 1, 2)
        cache = cache._replace(length=cache.length % ring)
        rows = rows._replace(cache=cache, token=token, length=length, done=done)
        return index + 1, rows, said

    said = jnp.pad(rows.token[..., None], ((0, 0), (0, 0), (0, slice_tokens)))
    _, rows, said = jax.lax.while_loop(running, advance, (jnp.int32(0), rows, said))
    report = jnp.concatenate(
        [said, rows.length[..., None], rows.done[..., None].astype(jnp.int32)], -1
    )
    length = jnp.broadcast_to(rows.cache.length, lengths.shape)
    return rows._replace(cache=rows.cache._replace(length=length)), report


def _one_length(cache: Any) -> tuple[Any, Any, jax.Array]:
    """Members' cache with one length for all, the axes to vmap over, and all lengths.

    One slot for all is written in place, where one of each member's own would be
    scattered to.
    """
    one = cache._replace(length=cache.length[0])
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)
    return one, axes, cache.length
