"""Tell: from keys and fitness to the next weights, as an optax chain."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jes.core.noise import Noise, PyTree, generation_key
from jes.transforms import es_gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """Everything the update depends on beside keys and fitness; kept in the ledger.

    Attributes:
      population: N, members a generation.
      sigma: standard deviation of the perturbation, in units of the weights.
      alpha: learning rate. The factor 1/σ of the gradient is folded in, so it is a
        length in weight space too (2509.24372, section 3.2).
      antithetic: whether members come in pairs θ ± σε.
      shaping: see `jes.shape_fitness`.
    """

    population: int
    sigma: float
    alpha: float
    antithetic: bool = False
    shaping: str = "zscore"

    @property
    def noise(self) -> Noise:
        """How members differ from the centre."""
        return Noise(sigma=self.sigma, antithetic=self.antithetic)


def make_optimizer(evolution: Evolution) -> optax.GradientTransformationExtraArgs:
    """The chain that turns a generation's keys and fitness into updates."""
    return optax.chain(
        es_gradient(evolution.noise, shaping=evolution.shaping),
        optax.scale_by_learning_rate(evolution.alpha),
    )


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def tell(
    evolution: Evolution,
    params: PyTree,
    state: Any,
    key: jax.Array,
    fitness: jax.Array,
) -> tuple[PyTree, Any]:
    """One update of the centre.

    Args:
      evolution: settings.
      params: float32 master weights; donated.
      state: of the optimizer; donated.
      key: the generation key.
      fitness: float32 [N], raw rewards.

    Returns:
      New parameters and optimizer state.
    """
    # Only shapes are read of the incoming updates, so these zeros are never stored.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = make_optimizer(evolution).update(
        zeros, state, params, key=key, fitness=fitness
    )
    return optax.apply_updates(params, updates), state


def replay(
    evolution: Evolution,
    params: PyTree,
    state: Any,
    root: jax.Array,
    fitness: Iterable[jax.typing.ArrayLike],
    start: int = 0,
) -> tuple[PyTree, Any]:
    """The updates of generations `start`, `start + 1`, ... from their fitness alone.

    Args:
      evolution: settings.
      params, state: as they were before generation `start`; donated.
      root: the run's root key.
      fitness: a float32 [N] a generation.
    """
    for generation, values in enumerate(fitness, start):
        key = generation_key(root, generation)
        params, state = tell(evolution, params, state, key, jnp.asarray(values))
    return params, state


@jax.jit
def displacement(params: PyTree, base: PyTree) -> jax.Array:
    """‖θ - θ_0‖ in the Euclidean norm over all weights, float32 scalar."""

    def squares(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.sum((new.astype(jnp.float32) - old.astype(jnp.float32)) ** 2)

    return jnp.sqrt(optax.tree.sum(jax.tree.map(squares, params, base)))


def drift(evolution: Evolution, parameters: int, generations: int) -> float:
    """‖θ - θ_0‖ that noise alone would reach: α√(Td/N), 2605.30148 and section 1.3
    of our reading of 2509.24372 (z-scored fitness independent of the noise)."""
    return evolution.alpha * (generations * parameters / evolution.population) ** 0.5
