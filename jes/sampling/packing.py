"""Ragged texts in few rows: each token is computed once, with little padding.

Several texts share a row. What begins alike - a question with its possible answers - is
a tree, whose trunk is computed once. Rows are computed in blocks, and blocks that hold
nothing are left out: shapes stay the same from batch to batch, and work follows the
text.

Axis letters: K blocks of R rows, L tokens of a row, X reads of a row (positions whose
logits are wanted), B prompts, T tokens of the longest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.sampling.prompts import (
    BUCKETS,
    STEP,
    PromptBatch,
    agreement,
    bucket,
    common_prefix,
    share,
)

PADDED = 1.1
"""Prompts are packed where padding them would compute more than so many tokens for each
token of text ..."""
SAVED = 16
"""... and so many more for a prompt: packing moves its keys and values once more, which
with five saved tokens made a generation of the tiny model 1.7 times as long."""
ATTENDED = 8192
"""Attending to so many tokens costs about as much as the rest of a layer: what rows
save in padding by being longer they lose there."""
TRIED = 16
"""Rows are tried that hold one longest text, or up to so many of mean length."""
BLOCKS = 32
"""At most so many blocks: a half of one is computed for nothing."""
BLOCK_TOKENS = 256
"""Tokens of a block that keep a device busy: fewer than twice as many are one block."""


class Tree(NamedTuple):
    """A text, and what goes on from its end, each branch by itself."""

    trunk: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    @property
    def size(self) -> int:
        """Tokens of all parts."""
        return len(self.trunk) + sum(map(len, self.branches))


class Shape(NamedTuple):
    """The fixed sizes of packed batches: K, R, L, X and T; K = 0 for padded prompts."""

    blocks: int
    rows: int = 0
    length: int = 0
    reads: int = 0
    width: int = 0


class Rows(NamedTuple):
    """Texts in rows: all, with a leading axis of blocks, or one block.

    Attributes:
      tokens, positions: int32 [K, R, L].
      segments, trunks: int32 [K, R, L], the part of a row that a token belongs to, and
        that which this goes on from: it sees these two.
      at: int32 [K, R, X], which tokens of a row to give logits for.
      number: int32 [K, R, X], what each of them is for; a number past all for none.
      targets: int32 [K, R, X], the tokens that follow, where they are given.
    """

    tokens: Any
    positions: Any
    segments: Any
    trunks: Any
    at: Any
    number: Any
    targets: Any

    def settings(self, prefix: Any) -> dict[str, Any]:
        """How the model is applied to a block, after the cache of a prefix."""
        parts = self.segments, self.trunks
        return {"segments": parts, "at": self.at, "prefix": prefix}


class Packed(NamedTuple):
    """Prompts, or prompts with choices, in rows.

    Attributes:
      rows: their tokens.
      slots: int32 [B, T], where the tokens of each prompt are among K * R * L, aligned
        at its last; -1 for padding. T is 0 where targets are given.
      blocks: int32, how many of K hold texts.
      prefix: see `PromptBatch`.
    """

    rows: Rows
    slots: Any
    blocks: Any
    prefix: PromptBatch | None = None

    @property
    def next_position(self) -> Any:
        """Of the token that follows each prompt: int32 [B, 1]."""
        return self.rows.positions.reshape(-1)[self.slots[:, -1:]] + 1


class Read(NamedTuple):
    """Logits that are wanted: after a token of a tree, by its index; see `Packed`."""

    at: int
    number: int
    target: int = 0


def reads_of_prompts(tree: Tree, first: int, count: int) -> list[Read]:
    """The logits after the trunk, or after each branch.

    They are numbered `first`, `first` + `count` and so on.
    """
    trunk, *ends = np.cumsum([len(tree.trunk), *map(len, tree.branches)]).tolist()
    # A branch without tokens ends with the trunk.
    pairs = zip(ends, tree.branches, strict=True)
    ends = [end if branch else trunk for end, branch in pairs] or [trunk]
    return [Read(end - 1, first + i * count) for i, end in enumerate(ends)]


def reads_of_choices(
    tree: Tree, choices: Sequence[Sequence[int]], first: int
) -> list[Read]:
    """The logits that predict each token of each choice; branches lack the last."""
    reads: list[Read] = []
    start, trunk = len(tree.trunk), len(tree.trunk) - 1
    for number, choice in enumerate(choices, first):
        at = [trunk, *range(start, start + len(choice) - 1)]
        reads += map(Read, at, [number] * len(choice), choice)
        start += len(choice) - 1
    return reads


def first_fit(
    sizes: Sequence[int], reads: Sequence[int], length: int, most: int
) -> np.ndarray:
    """The row of each text, longest first, each in the first row that has room.

    Args:
      sizes, reads: tokens and reads of each text.
      length, most: of a row.
    """
    rows = np.zeros(len(sizes), int)
    room, left = np.full(len(sizes), length), np.full(len(sizes), most)
    for i in np.argsort(-np.asarray(sizes), kind="stable"):
        rows[i] = ((room >= sizes[i]) & (left >= reads[i])).argmax()
        room[rows[i]] -= sizes[i]
        left[rows[i]] -= reads[i]
    return rows


def shape_of(
    batches: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    longest: int,
    width: int,
    padded: int = 0,
    coarse: bool = False,
) -> Shape:
    """A shape that holds each of some batches, and mostly others like them.

    Args:
      batches: the tokens and the reads of the texts of each.
      longest: tokens of the longest text that may come.
      width: tokens of the longest prompt that may come.
      padded: tokens of a batch when it is padded, where that will do too: where it
        costs little, and for little text.
      coarse: choose one of few shapes, for batches of which nothing is known before.
    """
    text = float(np.mean([sum(sizes) for sizes, _ in batches]))
    count = float(np.mean([len(sizes) for sizes, _ in batches]))
    blocks = max(1, min(BLOCKS, int(text / BLOCK_TOKENS)))
    if padded and (blocks == 1 or padded <= max(PADDED * text, text + SAVED * count)):
        return Shape(0)
    tried = [longest, *(int(text / count * (n + 0.1)) for n in range(2, TRIED))]
    if coarse:
        tried = [bucket(2 * longest, BUCKETS)]
    tried = [n + -n % STEP for n in tried if longest <= n <= 6 * longest]
    some = batches[:4]
    packed = [[first_fit(*each, length, length) for each in some] for length in tried]
    counts = [np.mean([each.max() + 1 for each in found]) for found in packed]
    costs = np.array(counts) * tried * (1 + np.array(tried) / ATTENDED)
    best = int(costs.argmin())
    length = tried[best]
    # Room for the reads of most rows: what has more goes to others.
    pairs = zip(packed[best], some, strict=True)
    most = max(round(np.bincount(found, reads).max()) for found, (_, reads) in pairs)
    most = max(most + most // 2, *(max(reads) for _, reads in batches))
    most += -most % 4
    rows = max(int(first_fit(*each, length, most).max()) + 1 for each in batches)
    size = rows if blocks == 1 else max(1, rows // blocks)
    shape = Shape(-(-rows // size) + (blocks > 1), size, length, most, width)
    if coarse:
        few = (1 << (count - 1).bit_length() for count in (*shape[:2], most))
        blocks, size, most = few
        shape = Shape(blocks, size, length, most, width)
    return shape


def pack(
    trees: Sequence[Tree],
    reads: Sequence[Sequence[Read]],
    shape: Shape,
    prefix: PromptBatch | None = None,
    first: int = 0,
    rows: np.ndarray | None = None,
) -> Packed:
    """Texts in rows of a shape; with more blocks where they need more rows.

    Args:
      trees, reads: the texts, without the prefix, and which logits they are for.
      shape: from `shape_of`.
      prefix: what they all begin with.
      first: position of their first tokens.
      rows: int [texts], the row of each; by default from `first_fit`.
    """
    sizes, wanted = [tree.size for tree in trees], [*map(len, reads)]
    _, size, length, most, width = shape
    length, most = max(length, *sizes), max(most, *wanted)
    if rows is None:
        rows = first_fit(sizes, wanted, length, most)
    used = -(-int(rows.max() + 1) // size)
    blocks = max(shape.blocks, used)
    count = sum(wanted) if width else 0
    tokens, segments, trunks = np.zeros((3, blocks * size, length), np.int32)
    positions = np.full_like(tokens, -1)
    at, targets = np.zeros((2, blocks * size, most), np.int32)
    number = np.full_like(at, np.iinfo(np.int32).max)
    slots = np.full((count, width), -1, np.int32)
    ends, filled = np.zeros((2, blocks * size), int)
    held = np.zeros(blocks * size, int)
    for tree, some, row in zip(trees, reads, rows, strict=True):
        start, trunk = ends[row], held[row]
        for part in (tree.trunk, *tree.branches):
            here = slice(ends[row], ends[row] + len(part))
            tokens[row, here] = part
            segments[row, here], trunks[row, here] = held[row], trunk
            after = 0 if held[row] == trunk else len(tree.trunk)
            positions[row, here] = first + after + np.arange(len(part))
            ends[row] += len(part)
            held[row] += 1
        for read in some:
            place = row, filled[row]
            at[place], number[place] = start + read.at, read.number
            targets[place] = read.target
            filled[row] += 1
            if width:
                path = np.arange(start, start + read.at + 1)
                # Of the branches before it a prompt has nothing.
                own = segments[row, path]
                path = path[(own == trunk) | (own == own[-1])]
                slots[read.number, width - len(path) :] = row * length + path
    arrays = tokens, positions, segments, trunks, at, number, targets
    filled_rows = Rows(*(array.reshape(blocks, size, -1) for array in arrays))
    return Packed(filled_rows, slots, np.int32(used), prefix)


def trees_of(prompts: Sequence[Sequence[int]], asks: int = 1) -> list[Tree]:
    """Prompts as trees: each, or the first with the second of the same question.

    With two asks all second prompts follow all first ones.
    """
    if asks == 1:
        return [Tree(prompt) for prompt in prompts]
    trees, half = [], len(prompts) // 2
    for one, two in zip(prompts[:half], prompts[half:], strict=True):
        common = agreement(one, two)
        trees.append(Tree(one[:common], (one[common:], two[common:])))
    return trees


def pack_prompts(
    prompts: Sequence[Sequence[int]],
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = None,
    *,
    asks: int = 1,
    shape: Shape | None = None,
) -> Packed | PromptBatch:
    """Prompts as a batch: packed where padding them would compute much more.

    Args:
      prompts: token ids.
      buckets: lengths to pad the longest to, and in a padded batch all.
      parts: as for `share`.
      asks: prompts of a question, see `trees_of`.
      shape: to pack to, from `shape_of_prompts` of several batches.

    Raises:
      ValueError: as `share`.
    """
    shape = shape or shape_of_prompts([prompts], buckets, parts, asks=asks)
    if not shape.blocks:
        return share(prompts, buckets, parts=parts)
    prefix, common = common_prefix(prompts, buckets, parts)
    trees = trees_of([prompt[common:] for prompt in prompts], asks)
    reads = [reads_of_prompts(tree, i, len(trees)) for i, tree in enumerate(trees)]
    return pack(trees, reads, shape, prefix, common)


def shape_of_prompts(
    batches: Sequence[Sequence[Sequence[int]]],
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = None,
    *,
    asks: int = 1,
    coarse: bool = False,
) -> Shape:
    """A shape for batches of prompts; arguments are those of `pack_prompts`.

    For `coarse` see `shape_of`.
    """
    found, longest, width, padded = [], 0, 0, 0
    for prompts in batches:
        _, common = common_prefix(prompts, buckets, parts)
        own = [prompt[common:] for prompt in prompts]
        trees = trees_of(own, asks)
        found.append(([tree.size for tree in trees], [asks] * len(trees)))
        lengths = parts if common and parts is not None else buckets
        width = max(width, bucket(max(map(len, own)), lengths))
        longest = max(longest, *found[-1][0])
        padded = max(padded, width * len(prompts))
    longest = bucket(longest, buckets) if asks == 1 else longest
    limits = {"longest": longest, "width": width, "padded": padded}
    return shape_of(found, **limits, coarse=coarse)


def shared_shapes(
    batches: Sequence[Any],
    lengths: Sequence[int],
    shape: Callable[[Sequence[Any]], Shape],
) -> list[Shape]:
    """The shape of each batch: one for all that have the same length, by a function.

    So batches of the questions of an evaluation compile few programs.
    """
    found = {
        length: shape([b for b, n in zip(batches, lengths, strict=True) if n == length])
        for length in dict.fromkeys(lengths)
    }
    return [found[length] for length in lengths]


def over_blocks(
    function: Callable[[Any, Rows, Any], Any], packed: Packed, carry: Any
) -> Any:
    """The carry after `function(carry, block, number)` of the blocks that hold texts.

    With a single block there is no loop, and reverse differentiation works.
    """

    def step(number: Any, carry: Any) -> Any:
        return function(carry, block_of(packed, number), number)

    if len(packed.rows.tokens) == 1:
        return step(0, carry)
    return jax.lax.fori_loop(0, packed.blocks, step, carry)


def block_of(packed: Packed, number: Any) -> Rows:
    """A block of rows, arrays [R, L] and [R, X]."""
    return jax.tree.map(lambda array: jnp.asarray(array)[number], packed.rows)


def zeros(variables: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros to begin a loop with that goes on with what variables make of them.

    Where devices share members, JAX asks that what a loop begins with is of members
    too.
    """
    own = 0 * jax.tree.leaves(variables)[0].reshape(-1)[0].astype(jnp.int32)
    return jnp.zeros(shape, dtype) + own.astype(dtype)


def text_tokens(batch: Packed | PromptBatch) -> int:
    """Tokens of text that are read: what all begin with counts once."""
    rest = 0 if batch.prefix is None else text_tokens(batch.prefix)
    rows = batch.rows if isinstance(batch, Packed) else batch
    return int((rows.positions >= 0).sum()) + rest


def computed_tokens(batch: Packed | PromptBatch) -> int:
    """Tokens that are computed to read them, with the padding."""
    rest = 0 if batch.prefix is None else computed_tokens(batch.prefix)
    if isinstance(batch, PromptBatch):
        return batch.tokens.size + rest
    return int(batch.blocks) * batch.rows.tokens[0].size + rest
