"""The rows of `jes.bench` about the laws of noise: ten million numbers, for each use.

Of one leaf, as in `jes.perturb` and `jes.es_gradient`, with any function that draws.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jes.bench.timing import Row, compare
from jes.core.random import normal, table

SIZE = 10_000_000
MEMBERS = 2
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]

LAWS: dict[str, Draw] = {
    "jax.random.normal": jax.random.normal,
    "normal": normal,
    "table": table,
}
"""Whose speeds are compared: that of jax, and those of `config.noise`."""


def drawn(draw: Draw, key: jax.Array, centre: jax.Array) -> jax.Array:
    """The noise alone."""
    return draw(key, centre.shape)


def perturbed(draw: Draw, key: jax.Array, centre: jax.Array) -> jax.Array:
    """A member's weights, θ + σε."""
    return centre + 0.01 * draw(key, centre.shape)


def summed(draw: Draw, key: jax.Array, centre: jax.Array) -> jax.Array:
    """The estimate of the gradient from `MEMBERS` members."""

    def add(member: jax.Array, total: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, member)
        return total - (member + 0.5) * draw(own, centre.shape)

    return jax.lax.fori_loop(0, MEMBERS, add, jnp.zeros_like(centre))


USES = {
    "drawn": drawn,
    "theta + sigma x noise": perturbed,
    f"summed over {MEMBERS} members": summed,
}


def used(use: str, law: str) -> Callable[[], Any]:
    """A function that draws noise of a law, for one of `USES`."""
    key, centre = jax.random.key(0), jnp.zeros(SIZE)
    run = jax.jit(lambda key, centre: USES[use](LAWS[law], key, centre))
    return lambda: run(key, centre)


def rows(repeats: int) -> list[Row]:
    """What the table saves, over jax's normal numbers and over the fused ones."""
    return [
        compare(
            f"{law} / table noise, {use}",
            goal,
            used(use, law),
            used(use, "table"),
            repeats,
        )
        for law, goal in (("jax.random.normal", ">= 1.8"), ("normal", ""))
        for use in USES
    ]
