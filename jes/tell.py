"""Tell: from keys and fitness to the next weights, as an optax chain."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jes.core.drift import drift_norm
from jes.core.fitness import typical_spread
from jes.core.noise import Noise, PyTree, generation_key
from jes.transforms import anchored_weight_decay, es_gradient


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
      decay: 'none', or the kind of anchored weight decay, 'l2' or 'l1'.
      decay_coefficient: its λ.
      anchor: where the base weights are kept; see `jes.keep_anchor`.
    """

    population: int
    sigma: float
    alpha: float
    antithetic: bool = False
    shaping: str = "zscore"
    decay: str = "none"
    decay_coefficient: float = 0.0
    anchor: str = "device"

    @property
    def noise(self) -> Noise:
        """How members differ from the centre."""
        return Noise(sigma=self.sigma, antithetic=self.antithetic)


def make_optimizer(
    evolution: Evolution, anchor: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """The chain that turns a generation's keys and fitness into updates.

    Args:
      evolution: settings.
      anchor: the base weights, if the optimizer is to update with a decay (and not
        only to be checked, or to give its first state).
    """
    links = [
        es_gradient(evolution.noise, shaping=evolution.shaping),
        optax.scale_by_learning_rate(evolution.alpha),
    ]
    if evolution.decay != "none":
        alpha, coefficient = evolution.alpha, evolution.decay_coefficient
        links.append(anchored_weight_decay(alpha, coefficient, anchor, evolution.decay))
    return optax.chain(*links)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def tell(
    evolution: Evolution,
    params: PyTree,
    state: Any,
    key: jax.Array,
    fitness: jax.Array,
    anchor: PyTree = None,
) -> tuple[PyTree, Any]:
    """One update of the centre.

    Args:
      evolution: settings.
      params: float32 master weights; donated.
      state: of the optimizer; donated.
      key: the generation key.
      fitness: float32 [N], raw rewards.
      anchor: the base weights, where there is a decay; see `jes.keep_anchor`.

    Returns:
      New parameters and optimizer state.
    """
    # Only shapes are read of the incoming updates, so these zeros are never stored.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = make_optimizer(evolution, anchor).update(
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
    anchor: PyTree = None,
) -> tuple[PyTree, Any]:
    """The updates of generations `start`, `start + 1`, ... from their fitness alone.

    Args:
      evolution: settings.
      params, state: as they were before generation `start`; donated.
      root: the run's root key.
      fitness: a float32 [N] a generation.
      anchor: the base weights, where there is a decay.
    """
    for generation, values in enumerate(fitness, start):
        key = generation_key(root, generation)
        values = jnp.asarray(values)
        params, state = tell(evolution, params, state, key, values, anchor)
    return params, state


def drift(evolution: Evolution, parameters: int, generations: int) -> float:
    """‖θ - θ_0‖ that noise alone would reach in so many generations; see `drift_norm`.

    NaN for shaping 'none', whose steps are as long as the rewards are far apart.
    """
    return drift_norm(
        alpha=evolution.alpha,
        population=evolution.population,
        parameters=parameters,
        generations=generations,
        kind=evolution.decay,
        coefficient=evolution.decay_coefficient,
        spread=typical_spread(evolution.shaping, evolution.population),
    )
