"""Trees of parameters in which the codes of a matrix are one leaf."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jes.core.codes import Codes, unpack
from jes.core.noise import PyTree
from jes.core.programs import program


def is_codes(node: Any) -> bool:
    """For `is_leaf` of tree functions."""
    return isinstance(node, Codes)


def structure(tree: PyTree) -> Any:
    """`jax.tree.structure`."""
    return jax.tree.structure(tree, is_leaf=is_codes)


def values_of(leaf: Codes | jax.Array) -> jax.Array:
    """Codes, or weights of any dtype, as float32."""
    return (unpack(leaf) if isinstance(leaf, Codes) else leaf).astype(jnp.float32)


def is_quantized(params: Any) -> bool:
    """Whether some leaf of the parameters is codes."""
    return any(map(is_codes, jax.tree.leaves(params, is_leaf=is_codes)))


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`tree_map_with_path` where codes are one leaf."""
    return jax.tree_util.tree_map_with_path(function, tree, *others, is_leaf=is_codes)


def leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    """`tree_leaves_with_path` where codes are one leaf."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_codes)


def split(params: Any, scales: bool = False) -> tuple[Any, Any]:
    """What is trained of the parameters, and the rest, each with None for the other.

    Everything, in a model of floats. In a quantised one only what may move on a grid:
    the codes, and the scales if they are to be trained; norms, biases, embeddings and
    zero points stay as they are (2602.03120).
    """
    if not is_quantized(params):
        return params, jax.tree.map(lambda leaf: None, params)

    def part(path: tuple[Any, ...], leaf: Any, trained: bool) -> Any:
        chosen = is_codes(leaf) or (scales and _is_scales(path))
        return leaf if chosen == trained else None

    return tuple(map_leaves(partial(part, trained=x), params) for x in (True, False))


def merge(trained: Any, frozen: Any) -> Any:
    """What `split` took apart."""
    return jax.tree.map(
        lambda first, second: second if first is None else first,
        trained,
        frozen,
        is_leaf=lambda node: node is None or is_codes(node),
    )


def with_dtype(params: Any, dtype: Any) -> Any:
    """The parameters with all floats in this dtype, but for the scales of codes.

    Arrays that are so already are not copied.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        keep = is_codes(leaf) or _is_scales(path) or leaf.dtype == dtype
        keep = keep or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if keep else _cast(leaf, dtype)

    return map_leaves(cast, params)


@program(static_argnums=1)
def _cast(leaf: jax.Array, dtype: Any) -> jax.Array:
    return leaf.astype(dtype)


def rounded(values: jax.Array, dtype: Any) -> jax.Array:
    """Float32 values as another float dtype holds them, in float32.

    There and back by `astype` is what the compilers of accelerators leave out.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:  # of other dtypes it drops the subnormals
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return jax.lax.optimization_barrier(values.astype(dtype)).astype(jnp.float32)


def _is_scales(path: tuple[Any, ...]) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "scales"


def transpose(params: PyTree, out: PyTree, width: int) -> tuple[PyTree, ...]:
    """A tree of tuples, one for each leaf of the parameters, as a tuple of trees."""
    outer = structure(params)
    rows = outer.flatten_up_to(out)
    return tuple(outer.unflatten([row[n] for row in rows]) for n in range(width))


def total(tree: PyTree) -> jax.Array:
    """Sum of a tree of scalars, float32."""
    return sum(jax.tree.leaves(tree), jnp.zeros([], jnp.float32))


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """Two sums of the bits of all arrays, uint32 [2]: of the words and their squares.

    Exact in any order, and so the same on any number of devices.
    """
    sums = jnp.zeros(2, jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        size = 8 * leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{size}"))
        words = bits.astype(jnp.uint32)
        sums = 3 * sums + jnp.stack([words.sum(), (words * words).sum()])
    return sums
