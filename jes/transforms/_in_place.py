"""Updates in place: one leaf, or a part of a large one, after the other."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jes.core.mesh import POPULATION
from jes.core.noise import PartKey, PyTree
from jes.core.placement import on_device
from jes.core.tree import is_codes, leaves_with_path, structure

PART = 2**20
"""Floats that are updated at once, at least: enough to keep all cores of a CPU busy."""

LANES = 128
"""Rows of a part, or a multiple, if possible: where the first axis is the minor one of
its layout, a TPU would make a copy of the leaf for others."""


def count_parts(path: tuple[Any, ...], leaf: Any) -> int:
    """Into how many equal parts of its first axis `update_in_place` cuts a leaf.

    A stack of codes into its matrices, floats into parts of at least `PART` numbers.
    """
    del path
    shape = leaf.shape
    if is_codes(leaf):
        return math.prod(shape[:-2])
    most = min(shape[0], math.prod(shape) // PART) if shape else 1
    even = [n for n in range(most, 0, -1) if shape[0] % n == 0] or [1]
    aligned = (n for n in even if not (shape and shape[0] // n % LANES))
    return next((n for n in aligned if 4 * n > even[0]), even[0])


def update_in_place(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    state: optax.OptState,
    *,
    key: jax.Array,
    fitness: jax.Array,
    parts: Callable[[tuple[Any, ...], Any], int] = count_parts,
    pieces: Callable[[tuple[Any, ...], Any], int] = lambda path, leaf: 1,
    mesh: Mesh | None = None,
    share: bool = False,
    **extra_args: Any,
) -> tuple[PyTree, optax.OptState]:
    """`optimizer.update` and `optax.apply_updates`, with little memory beside `params`.

    Under `jax.jit` with `params` and `state` donated, only the updates of one part of a
    leaf are in memory at a time, where the two calls hold those of the whole model. The
    weights are the same, bit for bit.

    Every part is updated by the optimizer itself, for a tree in which all other leaves
    are None. So it has to treat each weight by itself, as the transformations of jes
    and optax's scaling by learning rates do (clipping by a global norm does not). Trees
    like the parameters in the state (a residual) and among the extra arguments (an
    anchor) are cut in the same way. Floating-point scalars in the state are taken for
    sums over the weights, and added up; all else in the state is what an update of no
    weights makes of it.

    Args:
      optimizer: any chain of such transformations.
      params: pytree of floats or `Codes`.
      state: of the optimizer.
      key: the generation key. Transformations receive it for a part of a leaf as a
        `PartKey`, and draw the noise of that part.
      fitness: float [N].
      parts: number of parts of a leaf. Matrices with noise of low rank, unless stacked,
        need 1.
      pieces: number of equal pieces of the first axis of a leaf, of which each part has
        as many rows: of floats that so many devices have a piece each of.
      mesh: of devices that each have `params` whole. What is only read, and of which
        they have parts, they gather a leaf at a time.
      share: where the state has only counts, each device of the mesh computes parts of
        a leaf of floats and sends them to the others.
      **extra_args: of the optimizer, such as `anchor`.

    Returns:
      New parameters and optimizer state.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, jes
      >>> optimizer = optax.chain(
      ...     jes.es_gradient(jes.Noise(sigma=0.1)), optax.scale_by_learning_rate(0.5))
      >>> update = jax.jit(
      ...     functools.partial(jes.update_in_place, optimizer), donate_argnums=(0, 1))
      >>> params, key, fitness = {'w': jnp.zeros(3)}, jax.random.key(0), jnp.eye(4)[0]
      >>> params, state = update(
      ...     params, optimizer.init(params), key=key, fitness=fitness)
    """
    moved, read = _Trees((params, state), params), _Trees(extra_args, params)
    optimizer = optax.with_extra_args_support(optimizer)

    def update(number: int | None, own: list, read_own: list, key: Any) -> Any:
        """Updates a leaf, or a part of it: it and its state, and the state's rest."""
        params, state = moved.alone(number, own)
        zeros, given = optax.tree.zeros_like(params), read.alone(number, read_own)
        updates, state = optimizer.update(
            zeros, state, params, key=key, fitness=fitness, **given
        )
        return moved.split((optax.apply_updates(params, updates), state))

    nothing = totals = update(None, [], [], key)[1]
    counts_only = not any(map(_is_sum, nothing))
    new = []
    for number, (path, leaf) in enumerate(leaves_with_path(params)):
        cut = parts(path, leaf), pieces(path, leaf)
        loop = _Loop(partial(update, number), key, *cut, nothing)
        own = moved.leaf(number)
        read_own = jax.tree.map(on_device, read.leaf(number))
        if mesh is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            read_own = jax.lax.with_sharding_constraint(read_own, whole)
        alone = counts_only and len(own) == 1 and not is_codes(leaf)
        if share and mesh is not None and loop.parts > 1 and alone:
            own = loop.shared(own, read_own, mesh)
        else:
            own, totals = loop.in_turn(own, read_own, totals)
        new.append(own)
    return moved.build(list(zip(*new, strict=True)), totals)


class _Trees:
    """A tree, of which the subtrees like the parameters are taken leaf by leaf."""

    def __init__(self, tree: PyTree, params: PyTree) -> None:
        outer = self.outer = structure(params)
        shapes = [leaf.shape for leaf in outer.flatten_up_to(params)]

        def like(node: PyTree) -> bool:
            if structure(node) != outer:
                return False
            leaves = outer.flatten_up_to(node)
            return [getattr(leaf, "shape", None) for leaf in leaves] == shapes

        self.treedef: Any
        items, self.treedef = jax.tree.flatten(tree, is_leaf=like)
        self.like = [like(item) for item in items]
        self.trees = [outer.flatten_up_to(item) for item in items if like(item)]
        self.rest = [item for item in items if not like(item)]

    def leaf(self, number: int) -> list[Any]:
        """This leaf of every subtree like the parameters."""
        return [leaves[number] for leaves in self.trees]

    def alone(self, number: int | None, own: list[Any]) -> PyTree:
        """The tree with these values for this leaf, and None for all other leaves."""
        places = range(self.outer.num_leaves)
        own = own if number is not None else [None] * len(self.trees)
        leaves = [[x if place == number else None for place in places] for x in own]
        return self.build(leaves, self.rest)

    def split(self, tree: PyTree) -> tuple[list[Any], list[Any]]:
        """What `alone` put together, taken apart: values of the leaf, and the rest."""
        items = list(zip(self.treedef.flatten_up_to(tree), self.like, strict=True))
        trees = [item for item, like in items if like]
        rest = [item for item, like in items if not like]
        return jax.tree.leaves(trees, is_leaf=is_codes), rest

    def build(self, trees: Sequence[Sequence[Any]], rest: list[Any]) -> PyTree:
        """The tree from the leaves of each such subtree, and the rest."""
        cut, other = iter(trees), iter(rest)
        return self.treedef.unflatten(
            self.outer.unflatten(next(cut)) if like else next(other)
            for like in self.like
        )


class _Loop(NamedTuple):
    """Updates one leaf by parts: `update` takes its values, those only read, and a key.

    `nothing` is the rest of the state after an update of no weights.
    """

    update: Callable[..., tuple[list[Any], list[Any]]]
    key: jax.Array
    parts: int
    pieces: int
    nothing: list[Any]

    def part(self, own: list[Any], read: list[Any], part: jax.Array) -> Any:
        rows = part
        if self.pieces > 1:
            size = jax.tree.leaves(own)[0].shape[0]
            rows = self._cut(part, jnp.arange(size))
        own, read = jax.tree.map(partial(self._cut, part), (own, read))
        return self.update(own, read, PartKey(self.key, rows))

    def _cut(self, part: jax.Array, array: jax.Array) -> jax.Array:
        apart = self._pieces(array)
        rows = apart.shape[1] // self.parts
        cut = jax.lax.dynamic_slice_in_dim(apart, part * rows, rows, 1)
        return cut.reshape(-1, *array.shape[1:])

    def _put(self, part: jax.Array, array: jax.Array, new: jax.Array) -> jax.Array:
        own, start = self._pieces(new), part * (len(new) // self.pieces)
        put = jax.lax.dynamic_update_slice_in_dim(self._pieces(array), own, start, 1)
        return put.reshape(array.shape)

    def _pieces(self, array: jax.Array) -> jax.Array:
        return array.reshape(self.pieces, -1, *array.shape[1:])

    def in_turn(self, own: list[Any], read: list[Any], totals: list[Any]) -> Any:
        """Part after part: the values of the leaf, and the state's sums added up."""

        def add(totals: list[Any], found: list[Any]) -> list[Any]:
            rows = zip(totals, found, self.nothing, strict=True)
            return [t + new - old if _is_sum(old) else t for t, new, old in rows]

        def move(part: jax.Array, carry: tuple[list[Any], list[Any]]) -> Any:
            own, totals = carry
            new, found = self.part(own, read, part)
            return jax.tree.map(partial(self._put, part), own, new), add(totals, found)

        if self.parts == 1:
            own, found = self.update(own, read, self.key)
            return own, add(totals, found)
        return jax.lax.fori_loop(0, self.parts, move, (own, totals))

    def shared(self, own: list[Any], read: list[Any], mesh: Mesh) -> list[Any]:
        """The devices of a mesh compute a part each at a time, and gather them all."""
        devices = mesh.shape[POPULATION]

        def part(turn: jax.Array, device: jax.Array) -> jax.Array:
            return jnp.minimum(turn * devices + device, self.parts - 1)

        def move(turn: jax.Array, own: list[Any]) -> list[Any]:
            mine, _ = self.part(own, read, part(turn, jax.lax.axis_index(POPULATION)))
            new = jax.lax.all_gather(mine, POPULATION)

            def put(device: jax.Array, own: list[Any]) -> list[Any]:
                row = jax.tree.map(lambda rows: rows[device], new)
                return jax.tree.map(partial(self._put, part(turn, device)), own, row)

            return jax.lax.fori_loop(0, devices, put, own)

        turns = -(-self.parts // devices)
        return jax.shard_map(
            lambda own: jax.lax.fori_loop(0, turns, move, own),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(own)


def _is_sum(scalar: Any) -> bool:
    dtype = getattr(scalar, "dtype", np.dtype(type(scalar)))
    return jnp.ndim(scalar) == 0 and jnp.issubdtype(dtype, jnp.floating)
