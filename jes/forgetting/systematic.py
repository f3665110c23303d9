r"""How far runs have gone in a common direction: what of their motion is signal.

Displacements :math:`\Delta_a, \Delta_b` of two runs with other seeds share what the
reward asks for and nothing of their noise, so :math:`E[\Delta_a \cdot \Delta_b]` is the
square of the systematic motion. A sharper view, from below: how far they have gone
along the displacement of a policy gradient on the same task, which has little noise.

Systematic motion of z-scored ES is at most α a generation, αT in all; under L2 decay,
with :math:`r = 1 - \alpha\lambda`, it saturates at :math:`r (1 - r^T)/\lambda`, never
more than 1/λ (Cauchy-Schwarz on the update of 2605.30148, Algorithm 1).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jes.core.noise import PyTree
from jes.models.weights import load


class Systematic(NamedTuple):
    """Of several runs of one method.

    Attributes:
      square: mean of Δ_a · Δ_b over the pairs of runs; below zero only by noise.
      error: its standard error if all else is an isotropic walk: |Δ_a| |Δ_b| / √d for
        a pair, over the root of the number of pairs.
      along: mean of Δ · g over the runs, g a unit vector; NaN without one.
      along_error: its standard error, |Δ| / √d over the root of their number.
    """

    square: float
    error: float
    along: float
    along_error: float


def displacements(base: PyTree, folders: Sequence[Path]) -> list[np.ndarray]:
    """θ - θ_0 of the models in these folders, as vectors; float32 [d]."""
    start = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(base)]
    moved = []
    for folder in folders:
        ends = jax.tree.leaves(load(folder).params)
        gone = [(np.asarray(e) - s).ravel() for e, s in zip(ends, start, strict=True)]
        moved.append(np.concatenate(gone).astype(np.float32))
    return moved


def systematic(
    moved: Sequence[np.ndarray], direction: np.ndarray | None = None
) -> Systematic:
    """What runs have in common.

    Args:
      moved: displacements [d] of at least two runs.
      direction: a vector [d] to look along; its length does not matter.
    """
    pairs = list(itertools.combinations(moved, 2))
    lengths = np.linalg.norm(moved, axis=1)
    products = [a * b for a, b in itertools.combinations(lengths, 2)]
    along = np.nan
    if direction is not None:
        along = np.mean(moved @ (direction / np.linalg.norm(direction)))
    return Systematic(
        square=float(np.mean([np.dot(a, b) for a, b in pairs])),
        error=float(np.mean(products) / (len(moved[0]) * len(pairs)) ** 0.5),
        along=float(along),
        along_error=float(lengths.mean() / (len(moved[0]) * len(moved)) ** 0.5),
    )


def reach(alpha: float, generations: int, coefficient: float = 0.0) -> float:
    """The most that systematic motion can be: αT, or with L2 what it saturates to."""
    if not coefficient:
        return alpha * generations
    kept = 1 - alpha * coefficient
    return kept * (1 - kept**generations) / coefficient
