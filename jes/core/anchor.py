"""The anchor θ_0, a run's base weights: where it is kept, and the distance to it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jes.core.mesh import POPULATION, model_is_spread
from jes.core.noise import PyTree, leaf_path
from jes.core.placement import on_device
from jes.core.tree import (
    is_codes,
    is_quantized,
    map_leaves,
    merge,
    rounded,
    split,
    values_of,
)

PLACES = ("device", "bfloat16", "host", "none")
MOVED = 1e-6
"""A weight that differs by more has moved; the threshold of 2601.20861."""


def keep_anchor(params: PyTree, place: str = "device", stored: Any = None) -> PyTree:
    """A copy of the base weights, for distances and decay.

    Args:
      params: float32 weights, which may be donated afterwards. Of a quantised model
        only codes and scales are copied, and the rest is shared.
      place: 'device' keeps them as they are; 'bfloat16' rounds them, which moves the
        point of the decay by up to 2^-8 of each weight; 'host' keeps them in the host's
        pinned memory, once for all devices that have the whole model, from where an
        update reads one tensor at a time; 'none' gives
        None.
      stored: dtype of the files that the weights were read from. The copy has it where
        that loses nothing: half the memory for a bfloat16 model.

    Raises:
      ValueError: for an unknown place.
    """
    if place not in PLACES:
        raise ValueError(f"an anchor is kept in one of {PLACES}, not {place!r}")
    if place == "none":
        return None
    exact = is_quantized(params)  # its scales take little memory

    def kept(leaf: jax.Array) -> jax.Array:
        copy = jnp.array(leaf) if exact else _narrow(leaf, place, stored)
        return jax.device_put(copy, _on_host(copy)) if place == "host" else copy

    trained, frozen = split(params, scales=True)
    return merge(jax.tree.map(kept, trained), frozen)


def _on_host(leaf: jax.Array) -> Sharding:
    """A place in the host's memory: one, however many devices have the whole model.

    Each keeps a part there. (Not of layers, if possible: an update reads some layers.)
    """
    sharding = leaf.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    if isinstance(mesh, Mesh) and not model_is_spread(mesh):
        for axis in sorted(range(leaf.ndim), key=lambda axis: axis == 0):
            if leaf.shape[axis] % mesh.shape[POPULATION] == 0:
                spec = PartitionSpec(*[None] * axis, POPULATION)
                return NamedSharding(mesh, spec, memory_kind="pinned_host")
    return sharding.with_memory_kind("pinned_host")


def _narrow(leaf: jax.Array, place: str, stored: Any) -> jax.Array:
    """A copy of floats, in the dtype of the files or in bfloat16."""
    dtype = jnp.bfloat16 if place == "bfloat16" else jnp.dtype(stored or leaf.dtype)
    small, exact = _cast(leaf, dtype)
    # A copy in any case: the memory of the centre is donated to the next one.
    same = leaf.dtype == dtype or not (exact or place == "bfloat16")
    return jnp.array(leaf) if same else small


@partial(jax.jit, static_argnums=1)
def _cast(leaf: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The leaf in another dtype, and whether that loses nothing."""
    return leaf.astype(dtype), (rounded(leaf, dtype) == leaf).all()


class Distance(NamedTuple):
    """How far weights are from the anchor.

    Attributes:
      norm: ‖θ - θ_0‖, Euclidean, in units of the weights; of a quantised model in
        codes (and of its scales in units of these).
      relative: that over ‖θ_0‖; of little use for codes, which are not around 0.
      moved: share of the weights, or codes, that differ by more than `MOVED`.
      largest: the largest difference of one weight.
      norms, moved_shares: the norm and the share moved by `kind_of` tensor.
    """

    norm: float
    relative: float
    moved: float
    largest: float
    norms: dict[str, float]
    moved_shares: dict[str, float]


def distance(params: PyTree, anchor: PyTree) -> Distance:
    """Measures ‖θ - θ_0‖ and where in the model it lies; sums in float64 over tensors.

    The pytrees have the same structure, and any floating dtypes.
    """
    params, anchor = split(params, scales=True)[0], split(anchor, scales=True)[0]
    leaves = jax.tree_util.tree_leaves_with_path(_sums(params, anchor), is_leaf=_is_row)
    sums: dict[str, np.ndarray] = {}
    sizes = [leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_codes)]
    for (path, row), size in zip(leaves, sizes, strict=True):
        kind = kind_of(leaf_path(path))
        counts = np.array([*map(float, row[:3]), size])
        sums[kind] = sums.get(kind, np.zeros(4)) + counts
    squares, home, _, _ = sum(sums.values(), np.zeros(4))
    weights = [row for kind, row in sums.items() if kind != "scales"]
    _, _, moved, size = sum(weights, np.zeros(4))
    return Distance(
        norm=float(squares**0.5),
        relative=float((squares / home) ** 0.5) if home else float("inf"),
        moved=float(moved / size),
        largest=max((float(row[3]) for _, row in leaves), default=0.0),
        norms={kind: float(row[0] ** 0.5) for kind, row in sums.items()},
        moved_shares={kind: float(row[2] / row[3]) for kind, row in sums.items()},
    )


def displacement(params: PyTree, anchor: PyTree) -> jax.Array:
    """‖θ - θ_0‖ in the Euclidean norm over all that is trained, float32 scalar."""
    params, anchor = split(params, scales=True)[0], split(anchor, scales=True)[0]
    return _norm(params, anchor)


@jax.jit
def _norm(params: PyTree, anchor: PyTree) -> jax.Array:
    rows = jax.tree.leaves(_sums(params, anchor), is_leaf=_is_row)
    return jnp.sqrt(sum(row[0] for row in rows))


@jax.jit
def _sums(params: PyTree, anchor: PyTree) -> PyTree:
    """For each leaf: squares of difference and anchor, number moved, largest."""

    def row(new: Any, old: Any) -> tuple[jax.Array, ...]:
        old = values_of(old)
        away = values_of(new) - old
        moved = (jnp.abs(away) > MOVED).sum(dtype=jnp.float32)
        return (away**2).sum(), (old**2).sum(), moved, jnp.abs(away).max()

    def of_leaf(path: Any, new: Any, old: Any) -> tuple[jax.Array, ...]:
        del path
        old = jax.tree.map(on_device, old)
        if not is_codes(new) or new.ndim == 2:
            return row(new, old)
        # A matrix at a time: as floats, a stack of codes is eight times as large.
        *sums, largest = jax.lax.map(lambda pair: row(*pair), (new, old))
        return *(part.sum() for part in sums), largest.max()

    return map_leaves(of_leaf, params, anchor)


def _is_row(node: Any) -> bool:
    return isinstance(node, tuple)


def kind_of(path: str) -> str:
    """The kind of tensor that a leaf of this path ('layers/mlp/up/kernel') is."""
    parts = path.split("/")
    by_name = {"bias": "bias", "scale": "norm", "scales": "scales"}
    if parts[-1] in by_name:
        return by_name[parts[-1]]
    known = [part for part in parts if part in ("attention", "mlp", "lm_head")]
    return known[0] if known else "embedding" if parts[0] == "embed" else parts[0]
