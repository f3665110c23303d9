r"""Parts of a displacement, by magnitude or at random: what makes it sparse, or not.

The displacement Δ = θ - θ_0 of a run, or its largest entries alone, is added to the
base model (2602.02605). Large entries that do most of the work are no evidence of
sparsity by themselves: the largest 10 % of a random walk hold 44 % of ‖Δ‖². The
controls here have as many entries, the same norm, or both.

All functions take trees of floats, in which None is an excluded tensor, and return new
trees of float32 on the host.
"""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jes.core.noise import PyTree, leaf_path

PIECE = 2**22
"""Entries of a leaf that are held in float64 at once."""


def keep_largest(delta: PyTree, share: float) -> PyTree:
    """The largest entries by magnitude, and 0 for the rest (2602.02605).

    One threshold for all tensors, the k-th smallest magnitude of n with
    k = max(int(n (1 - share)), 1); entries of at least this magnitude are kept:
    n - k + 1, or more with ties. A share of 0 keeps nothing, where the published code
    keeps the largest entry.

    Raises:
      ValueError: for a share outside of [0, 1].
    """
    return _masked(delta, _largest(delta, share))


def keep_smallest(delta: PyTree, share: float) -> PyTree:
    """The entries that `keep_largest` does not keep (2602.02605)."""
    return _masked(delta, [~mask for mask in _largest(delta, share)])


def keep_like(delta: PyTree, other: PyTree, share: float) -> PyTree:
    """The entries of Δ where the displacement of another run has its largest.

    Raises:
      ValueError: for trees of different shapes.
    """
    if _shapes(delta) != _shapes(other):
        raise ValueError("the displacements are not of one model")
    return _masked(delta, _largest(other, share))


def keep_random(delta: PyTree, share: float, seed: int) -> PyTree:
    """As many entries as `keep_largest` keeps, drawn uniformly from all.

    With the same seed a larger share contains a smaller one. Each entry draws one of
    2^32 numbers: a tie, which is rare, keeps one entry more.
    """
    kept = sum(int(mask.sum()) for mask in _largest(delta, share))
    rng, leaves = np.random.default_rng(seed), _leaves(delta)
    drawn = [rng.integers(2**32, size=x.shape, dtype=np.uint32) for x in leaves]
    return _masked(delta, _highest(drawn, kept))


def keep_random_by_tensor(delta: PyTree, share: float, seed: int) -> PyTree:
    """In each tensor as many entries as `keep_largest` keeps there, drawn uniformly.

    Each layer of a stacked leaf [L, ...], one whose path begins with 'layers/', is a
    tensor.
    """
    rng = np.random.default_rng(seed)
    masks = _largest(delta, share)
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(delta)]
    for path, mask in zip(paths, masks, strict=True):
        for tensor in mask if path.startswith("layers/") else mask[None]:
            rng.shuffle(tensor.reshape(-1))  # a view, as masks are contiguous
    return _masked(delta, masks)


def rescale(delta: PyTree, norm: float) -> PyTree:
    """Δ with another Euclidean norm over all leaves; a Δ of 0 stays so."""
    before = norm_of(delta)
    factor = np.float32(norm / before if before else 0.0)
    return jax.tree.map(lambda leaf: _float32(leaf) * factor, delta)


def shrink(delta: PyTree, share: float) -> PyTree:
    """√share Δ, which has this share of ‖Δ‖²."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share is from 0 to 1, not {share}")
    factor = np.float32(share**0.5)
    return jax.tree.map(lambda leaf: _float32(leaf) * factor, delta)


def random_walk(delta: PyTree, seed: int) -> PyTree:
    """Independent Gaussian entries, with the shapes and the norm of Δ.

    The displacement of a run with uninformative rewards, up to rounding.
    """
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), delta)
    return rescale(drawn, norm_of(delta))


def norm_share(part: PyTree, whole: PyTree) -> float:
    """‖part‖² over ‖whole‖²; NaN where the whole is 0."""
    total = norm_of(whole)
    return (norm_of(part) / total) ** 2 if total else float("nan")


def norm_of(delta: PyTree) -> float:
    """The Euclidean norm over all leaves, summed in float64."""
    squares = 0.0
    for leaf in map(np.ravel, _leaves(delta)):
        for start in range(0, leaf.size, PIECE):
            wide = leaf[start : start + PIECE].astype(np.float64)
            squares += float(wide @ wide)
    return squares**0.5


def exclude(delta: PyTree, prefixes: Sequence[str]) -> PyTree:
    """Δ with None for tensors whose paths begin with one of these (2602.02605).

    Paths are such as 'embed/embedding' or 'layers/mlp/up/kernel'.

    Raises:
      ValueError: for a prefix that no path has.
    """
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(delta)]
    for prefix in prefixes:
        if not any(path.startswith(prefix) for path in paths):
            raise ValueError(f"no tensor is named {prefix}...: {', '.join(paths)}")
    kept = tuple(prefixes)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if leaf_path(path).startswith(kept) else leaf, delta
    )


def _largest(delta: PyTree, share: float) -> list[np.ndarray]:
    """For each leaf, the mask of `keep_largest`."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share is from 0 to 1, not {share}")
    # Bits of a float32 without its sign have the order of the magnitudes.
    sizes = [np.abs(leaf).view(np.uint32) for leaf in _leaves(delta)]
    total = sum(size.size for size in sizes)
    count = total - max(int(total * (1 - share)), 1) + 1
    return _highest(sizes, count if share else 0)


def _highest(numbers: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Masks of the `count` highest numbers in arrays, and of those that tie."""
    if not count:
        return [np.zeros(part.shape, bool) for part in numbers]
    flat = np.concatenate([part.ravel() for part in numbers])
    flat.partition(flat.size - count)
    return [part >= flat[flat.size - count] for part in numbers]


def _masked(delta: PyTree, masks: Iterable[np.ndarray]) -> PyTree:
    """Δ where the masks of its leaves are true, and 0 elsewhere."""
    leaves, structure = jax.tree.flatten(delta)
    kept = [
        np.where(mask, _float32(leaf), np.float32(0))
        for leaf, mask in zip(leaves, masks, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def _leaves(delta: PyTree) -> list[np.ndarray]:
    return [_float32(leaf) for leaf in jax.tree.leaves(delta)]


def _float32(leaf: jax.typing.ArrayLike) -> np.ndarray:
    """The leaf itself where it is float32 on the host."""
    return np.asarray(leaf, np.float32, order="C")


def _shapes(delta: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_leaves_with_path(delta)
    return [(leaf_path(path), leaf.shape) for path, leaf in leaves]
