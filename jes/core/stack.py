"""Two layouts of a decoder's layers: stacked on an axis, or one subtree a layer."""

from collections.abc import Callable
from typing import Any

import jax

STACK = "layers"
"""Leaves below this name are stacks of layers, on their first axis."""


def is_stack(path: tuple[Any, ...]) -> bool:
    """Whether the first axis of a leaf counts layers."""
    return jax.tree_util.keystr(path[:1], simple=True) == STACK


def has_matrices(path: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a matrix or a stack of them; others have noise in full."""
    return len(shape) - is_stack(path) >= 2


def layer_name(number: int) -> str:
    """The name of a layer's subtree."""
    return f"{STACK}_{number}"


def unstacked(tree: Any, layer: Callable[[Any, int], Any]) -> dict[str, Any]:
    """A tree with one subtree a layer: `layer` of the stack and the layer's number."""
    apart = {name: part for name, part in tree.items() if name != STACK}
    (count,) = {leaf.shape[0] for leaf in jax.tree.leaves(tree[STACK])}
    for number in range(count):
        apart[layer_name(number)] = layer(tree[STACK], number)
    return apart
