"""Continuous batching: finished sequences free their slot for prompts that wait.

A member decodes in a fixed number of slots, in slices of a few tokens; between slices
the host admits waiting prompts to free slots. When none waits, the remaining rows move
to fewer slots, so that the last long answer does not cost the steps of all.

Shapes are fixed, so nothing is compiled again: the cache is a ring. All rows write to
the same ring slot, which moves on by one a token; the cache of an admitted prompt is
rolled so that it ends right before that slot.

Axis letters: M members, B prompts, S slots, F prompts admitted at once, T prompt
tokens, R ring slots of the cache, N new tokens.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.members import Members, by_member
from jes.core.programs import Abstract, program
from jes.sampling.generate import (
    Sampling,
    choose_tokens,
    is_end,
    keys_of_rows,
    next_logits,
)
from jes.sampling.prompts import PromptBatch

ADMIT = 4
"""A member admits S / ADMIT prompts at once. With fewer at once more programs are
launched; with more, free slots wait longer for a full group."""
SHRINK = 4
"""When none waits, slots become fewer by this factor."""
WIDTHS, NARROWEST = 4, 32
"""Prompts admitted together are padded to one of so many lengths, of which the shortest
has at least so many tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """S slots of a member, and most tokens between two looks of the host at them."""

    sampling: Sampling
    slots: int
    slice_tokens: int = 32

    def __post_init__(self) -> None:
        if min(self.slots, self.slice_tokens) < 1:
            raise ValueError(
                f"slots={self.slots}, slice_tokens={self.slice_tokens}: at least 1"
            )


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
      done: bool [M, S], whether the answer has ended, or the slot is free.
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
    members: Members,
    prompts: PromptBatch,
    batching: Batching,
    limits: Any = None,
    *,
    before_slice: Callable[[str], None] = lambda doing: None,
) -> np.ndarray:
    """The answers of `decode`, with a cache of `batching.slots` rows a member.

    `before_slice` is called with '' before every `batching.slice_tokens` tokens; an
    exception from it ends the decoding.
    """
    sampling, mesh = batching.sampling, members.mesh
    total, width = prompts.tokens.shape
    shape, new = (members.count, total), sampling.max_new_tokens
    limits = np.minimum(np.full(shape, new) if limits is None else limits, new)
    order, widths = by_length(prompts)
    prefix = prompts.prefix and _read_prefix(model, members, prompts.prefix)
    answers = np.full((*shape, new), sampling.fill, np.int32)
    scheduler, rows = Scheduler(*shape, min(batching.slots, total)), None
    while True:
        if scheduler.can_admit():
            slots, places = scheduler.admit()
            numbers = order[places]
            most = np.take_along_axis(limits, numbers, 1).astype(np.int32)
            own = slice(-widths[places[slots < scheduler.slots]].max(), None)
            texts = prompts.tokens[numbers, own], prompts.positions[numbers, own]
            admitted = (*texts, most, numbers)
            read = _prefill(model, members, admitted, prefix, sampling)
            if rows is None:
                ring = width + new - 1
                rows = _empty(read, slots=scheduler.slots, ring=ring, mesh=mesh)
            rows = _insert(rows, read, slots, mesh=mesh)
            continue
        if not scheduler.active.any():
            return answers[:, np.argsort(order)]
        if scheduler.enough < scheduler.slots:
            rows = _take(rows, scheduler.shrink(), mesh=mesh)
        before_slice("")
        given = rows, prefix, scheduler.stop()
        rows, report = _decode_slice(model, members, *given, batching)
        if isinstance(report, Abstract):  # analysed, not run
            for fewer in scheduler.sizes[1:2]:
                _take(rows, np.zeros((shape[0], fewer), np.int32), mesh=mesh)
            return answers
        scheduler.collect(np.asarray(report), answers)


def by_length(prompts: PromptBatch) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the prompts, longest first, and the lengths that they are padded to.

    Prompts admitted together are then about as long, and read without much padding. The
    lengths are a few parts of the longest: each is a program to compile.
    """
    longest = prompts.tokens.shape[1]
    part = -(-longest // max(1, min(WIDTHS, longest // NARROWEST)))
    lengths = (prompts.positions >= 0).sum(1)
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    return order, np.minimum(-(-lengths[order] // part) * part, longest)


def read_in_slots(prompts: PromptBatch, slots: int) -> int:
    """Tokens, with padding, that a member computes to read prompts in full groups."""
    _, widths = by_length(prompts)
    group = -(-slots // ADMIT)
    rest = 0 if prompts.prefix is None else prompts.prefix.tokens.size
    return rest + group * int(widths[::group].sum())


class Scheduler:
    """The host's record of which prompt is in which slot, and which wait.

    Attributes:
      numbers: int [M, S], of the prompt in each slot; -1 in free ones.
      lengths: int [M, S], tokens that its answer has.
      started: int [M], how many prompts of each member were admitted.
      sizes: numbers of slots that it may shrink to.
    """

    def __init__(self, members: int, total: int, slots: int) -> None:
        self.total, self.group = total, -(-slots // ADMIT)
        self.sizes = [slots]
        while self.sizes[-1] >= SHRINK:
            self.sizes.append(-(-self.sizes[-1] // SHRINK))
        self.numbers = np.full((members, slots), -1)
        self.lengths = np.zeros((members, slots), int)
        self.started = np.zeros(members, int)

    @property
    def slots(self) -> int:
        """S."""
        return self.numbers.shape[1]

    @property
    def active(self) -> np.ndarray:
        """How many answers of each member are under way: int [M]."""
        return (self.numbers >= 0).sum(1)

    @property
    def waiting(self) -> np.ndarray:
        """How many prompts of each member wait: int [M]."""
        return self.total - self.started

    @property
    def enough(self) -> int:
        """Slots needed from now on: S while a prompt waits."""
        if self.waiting.any():
            return self.slots
        return min(n for n in self.sizes if n >= self.active.max())

    def stop(self) -> tuple[np.ndarray, np.ndarray]:
        """At what numbers of active rows a slice ends early: two arrays, int32 [M].

        At the first as soon as one member has no more than its number, because it can
        admit prompts then (-1 for never); at the second when all members have no more,
        because fewer slots will do then.
        """
        wanted = np.minimum(self.waiting, self.group)
        some = np.where(wanted > 0, self.slots - wanted, -1).astype(np.int32)
        smaller = max((n for n in self.sizes if n < self.slots), default=0)
        return some, np.full_like(some, 0 if self.waiting.any() else smaller)

    def can_admit(self) -> bool:
        """Whether some member has a group of free slots for prompts that wait."""
        return bool((self.active <= self.stop()[0]).any())

    def admit(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives free slots, int32 [M, F], S for none, to the next prompts [M, F]."""
        slots = np.full((len(self.started), self.group), self.slots, np.int32)
        numbers = np.zeros_like(slots)
        for member, waiting in enumerate(self.waiting):
            free = np.flatnonzero(self.numbers[member] < 0)[: self.group][:waiting]
            new = self.started[member] + np.arange(len(free))
            slots[member, : len(free)], numbers[member, : len(free)] = free, new
            self.numbers[member, free], self.lengths[member, free] = new, 1
            self.started[member] += len(free)
        return slots, numbers

    def shrink(self) -> np.ndarray:
        """Keeps as few slots as are enough: int32 [M, S'], which, active ones first."""
        order = np.argsort(self.numbers < 0, axis=1, kind="stable")[:, : self.enough]
        self.numbers = np.take_along_axis(self.numbers, order, 1)
        self.lengths = np.take_along_axis(self.lengths, order, 1)
        return order.astype(np.int32)

    def collect(self, report: np.ndarray, answers: np.ndarray) -> None:
        """Writes the tokens of `_decode_slice` to the answers and frees its slots."""
        tokens, lengths, done = report[..., :-2], report[..., -2], report[..., -1]
        member, slot = np.nonzero(self.numbers >= 0)
        # The slice begins with the last token before it.
        first = self.lengths[member, slot] - 1
        new = (lengths[member, slot] - first)[:, None] > np.arange(tokens.shape[-1])
        row, step = np.nonzero(new)
        number = self.numbers[member, slot]
        chosen = tokens[member[row], slot[row], step]
        answers[member[row], number[row], first[row] + step] = chosen
        self.lengths = lengths.astype(int)
        self.numbers[done == 1] = -1


@program(static_argnames="model")
@by_member(shared=["prefix"])
def _read_prefix(model: Any, members: Members, prefix: PromptBatch) -> Any:
    """Each member's keys and values of the prefix of all prompts."""

    def read(variables: Any) -> Any:
        return next_logits(model, variables, *prefix[:2])[1]

    read = jax.vmap(read, in_axes=(members.axes,), axis_size=members.count)
    return read(members.variables)


@program(static_argnames=("model", "sampling"))
@by_member(own=["admitted", "prefix"])
def _prefill(
    model: Any, members: Members, admitted: Any, prefix: Any, sampling: Sampling
) -> Rows:
    """Reads prompts and chooses their first tokens.

    Of those admitted, tokens and positions [M, F, T], limits and numbers [M, F].
    """
    tokens, positions, limits, numbers = map(jnp.asarray, admitted)
    forward = jax.vmap(
        partial(next_logits, model), in_axes=(members.axes, 0, 0, None, 0)
    )
    logits, cache = forward(members.variables, tokens, positions, None, prefix)
    row_keys = keys_of_rows(members.keys, numbers)
    token = choose_tokens(logits, row_keys, jnp.zeros_like(numbers), sampling)
    done = is_end(token, sampling.eos_ids) | (limits <= 1)
    position = positions[..., -1] + 1
    length = jnp.ones_like(numbers)
    return Rows(cache, token, length, position, limits, numbers, done)


@program(static_argnames=("slots", "ring", "mesh"))
@by_member(own=["like"])
def _empty(like: Rows, *, slots: int, ring: int) -> Rows:
    """So many free slots, of members with rows like these."""
    cache = jax.vmap(lambda cache: cache.blank(slots, ring))(like.cache)
    zeros = (jnp.zeros((len(leaf), slots), leaf.dtype) for leaf in like[1:])
    rows = Rows(cache, *zeros)
    return rows._replace(done=~rows.done)


@program(donate_argnames="rows", static_argnames="mesh")
@by_member(own=["rows", "new", "slots"])
def _insert(rows: Rows, new: Rows, slots: jax.Array) -> Rows:
    """Writes new rows [M, F] to these slots [M, F], in place; S is nowhere."""
    cache, axes, lengths = _one_length(rows.cache)

    def put(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return old.at[slots].set(new, mode="drop")

    put_cache = jax.vmap(type(cache).with_rows, in_axes=(axes, 0, 0), out_axes=axes)
    cache = put_cache(cache, new.cache, slots)._replace(length=lengths)
    rest = zip(rows[1:], new[1:], strict=True)
    return Rows(cache, *(jax.vmap(put)(old, leaf, slots) for old, leaf in rest))


@program(static_argnames="mesh")
@by_member(own=["rows", "slots"])
def _take(rows: Rows, slots: jax.Array) -> Rows:
    """The rows in these slots [M, S']."""
    length = rows.cache.length
    rows = rows._replace(cache=rows.cache._replace(length=None))
    take = jax.vmap(lambda leaf, slots: leaf[slots])
    rows = jax.tree.map(lambda leaf: take(leaf, slots), rows)
    return rows._replace(cache=rows.cache._replace(length=length))


@program(static_argnames=("model", "batching"), donate_argnames="rows")
@by_member(own=["rows", "prefix", "stop"])
def _decode_slice(
    model: Any,
    members: Members,
    rows: Rows,
    prefix: Any,
    stop: tuple[jax.Array, jax.Array],
    batching: Batching,
) -> tuple[Rows, jax.Array]:
    """Decodes `batching.slice_tokens` tokens, or fewer as `stop` says.

    Returns the rows and int32 [M, S, slice_tokens + 3]: the last token before and those
    of the slice, the number of tokens of each answer, and whether it has ended.
    """
    sampling, most = batching.sampling, batching.slice_tokens
    ring = rows.cache.positions.shape[-1]
    row_keys = keys_of_rows(members.keys, rows.number)
    cache, axes, lengths = _one_length(rows.cache)
    rows = rows._replace(cache=cache)
    # As in `decode`, the step is vmapped inside the loop.
    step = jax.vmap(
        partial(next_logits, model),
        in_axes=(members.axes, 0, 0, axes, 0),
        out_axes=(0, axes),
    )

    def running(state: Any) -> jax.Array:
        index, rows, _ = state
        active = (~rows.done).sum(-1)
        ends = (active <= stop[0]).any() | (active <= stop[1]).all()
        return (index < most) & ~ends

    def advance(state: Any) -> Any:
        index, rows, tokens = state
        position = rows.position + rows.length - 1
        given = rows.token[..., None], position[..., None], rows.cache, prefix
        logits, cache = step(members.variables, *given)
        chosen = choose_tokens(logits, row_keys, rows.length, sampling)
        token = jnp.where(rows.done, rows.token, chosen)
        length = rows.length + ~rows.done
        done = rows.done | is_end(token, sampling.eos_ids) | (length >= rows.limit)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index + 1, 2)
        cache = cache._replace(length=cache.length % ring)
        rows = rows._replace(cache=cache, token=token, length=length, done=done)
        return index + 1, rows, tokens

    tokens = jnp.pad(rows.token[..., None], ((0, 0), (0, 0), (0, most)))
    state = (jnp.int32(0), rows, tokens)
    _, rows, tokens = jax.lax.while_loop(running, advance, state)
    report = jnp.concatenate(
        [tokens, rows.length[..., None], rows.done[..., None].astype(jnp.int32)], -1
    )
    length = jnp.broadcast_to(rows.cache.length, lengths.shape)
    return rows._replace(cache=rows.cache._replace(length=length)), report


def _one_length(cache: Any) -> tuple[Any, Any, jax.Array]:
    """Members' cache with one length for all, the axes to vmap over, all lengths."""
    one = cache._replace(length=cache.length[0])
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)
    return one, axes, cache.length
