"""The update: from a generation's key and fitness to the next weights."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jes.core.codes import pack
from jes.core.evolution import SCHEDULES, Evolution
from jes.core.mesh import mesh_of, model_is_spread, replicated
from jes.core.noise import PyTree, generation_key, leaf_path
from jes.core.programs import program
from jes.core.stack import is_stack
from jes.core.tree import is_codes, map_leaves, merge, split
from jes.core.whole_numbers import (
    displaced,
    none_of,
    strength_of,
    whole_fitness,
)
from jes.transforms import (
    anchored_weight_decay,
    count_parts,
    error_feedback,
    es_gradient,
    seed_replay,
    stochastic_rounding,
    update_in_place,
    whole_number_es,
)


class Rates(NamedTuple):
    """What a schedule changes of the update of floats: α, and α λ of the decay.

    In whole numbers α is in the fitness, and `pull` the strength of the decay.
    """

    alpha: Any
    pull: Any


def make_optimizer(
    evolution: Evolution, partitioned: bool = False, rates: Rates | None = None
) -> optax.GradientTransformationExtraArgs:
    """The chain that turns a generation's keys and fitness into updates.

    Its `update` takes the base weights as `anchor`, where there is a decay.

    For `partitioned` see `Noise.partitioned`. `rates` go before those of `evolution`.

    Raises:
      ValueError: for settings that do not go together.
    """
    if evolution.whole_numbers:
        return whole_number_es(
            dataclasses.replace(evolution.noise, partitioned=partitioned),
            evolution.decay,
        )
    if evolution.rounding not in ROUNDINGS:
        names = tuple(ROUNDINGS)
        raise ValueError(f"rounding must be one of {names}, not {evolution.rounding!r}")
    noise = dataclasses.replace(evolution.noise, partitioned=partitioned)
    rate: Any = evolution.rate
    decay: tuple[Any, Any] = evolution.alpha, evolution.decay_coefficient
    if rates is not None:  # inputs of a compiled function: checked before
        rate, decay = rates.alpha, (1.0, lambda _: rates.pull)
    links = [
        es_gradient(noise, shaping=evolution.shaping),
        _scale_by_rates(rate, evolution.scale_alpha),
    ]
    if evolution.decay != "none":
        links.append(anchored_weight_decay(*decay, None, evolution.decay))
    return ROUNDINGS[evolution.rounding](optax.chain(*links), evolution)


def _scale_by_rates(rate: float, scale_rate: float) -> optax.GradientTransformation:
    """Descent by one learning rate for codes, and another for scales beside them."""
    if not scale_rate:
        return optax.scale_by_learning_rate(rate)

    def one(path: Any, leaf: Any, update: jax.Array) -> jax.Array:
        return -(rate if is_codes(leaf) else scale_rate) * update

    return optax.stateless(lambda updates, params: map_leaves(one, params, updates))


def _feedback(evolution: Evolution) -> dict[str, Any]:
    return {
        "decay": evolution.residual_decay,
        "initial": evolution.initial_residual,
        "clip": evolution.residual_clip,
    }


ROUNDINGS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "none": lambda steps, _: optax.with_extra_args_support(steps),
    "replay": lambda steps, evolution: seed_replay(
        steps,
        population=evolution.population,
        window=evolution.window,
        **_feedback(evolution),
    ),
    "residual": lambda steps, evolution: optax.chain(
        steps, error_feedback(dtype=evolution.residual_dtype, **_feedback(evolution))
    ),
    "naive": lambda steps, _: optax.chain(steps, error_feedback(decay=0)),
    "quzo": lambda steps, _: optax.chain(steps, stochastic_rounding()),
}
"""How steps are rounded to whole codes: with the residual replayed or kept
(2602.03120), to the nearest without a residual (naive), or at random (QuZO)."""


def first_centre(evolution: Evolution, params: PyTree) -> PyTree:
    """What a run keeps of its centre, at first: the base weights, or D = 0."""
    return none_of(params) if evolution.whole_numbers else params


def weights_of(
    evolution: Evolution, centre: PyTree, base: PyTree, dtype: Any = jnp.float32
) -> PyTree:
    """θ: what a run keeps of its centre, or in whole numbers θ_0 + u D, in a dtype."""
    if not evolution.whole_numbers:
        return centre
    return displaced(base, centre, evolution.whole_unit, dtype)


def first_state(evolution: Evolution, params: PyTree) -> Any:
    """The optimizer's state before the first generation."""
    trained, _ = split(params, evolution.scale_sigma > 0)
    return replicated(make_optimizer(evolution).init(trained), mesh_of(params))


def tell(
    evolution: Evolution,
    params: PyTree,
    state: Any,
    key: jax.Array,
    fitness: jax.typing.ArrayLike,
    anchor: PyTree = None,
    *,
    share: bool = False,
) -> tuple[PyTree, Any]:
    """One update of the centre; on a mesh, every device computes what it holds of it.

    Args:
      evolution: settings.
      params: the centre, float32 or codes, or for noise 'sign' its displacement in
        whole numbers; what is trained of it is donated.
      state: of the optimizer; donated.
      key: the generation key.
      fitness: float32 [N], raw rewards.
      anchor: the base weights, where there is a decay; see `jes.keep_anchor`.
      share: on a mesh, the devices that hold the same large array of floats each
        compute a part of it and send it to the others; the bits are the same. Codes,
        and models spread over 'model', are not shared so.

    Returns:
      New parameters and optimizer state. What is frozen is the same array as before.
    """
    scales, mesh = evolution.scale_sigma > 0, mesh_of(params)
    trained, frozen = split(params, scales)
    if anchor is not None:
        anchor, _ = split(anchor, scales)
    if evolution.whole_numbers:
        rate, anchor = evolution.alpha / evolution.whole_unit, None
        fitness = whole_fitness(np.asarray(fitness), evolution.shaping, rate)
    evolution, rates = compiled_form(evolution)
    settings = evolution, mesh, share, _shards(trained)
    trained, state = _tell(*settings, trained, state, rates, key, fitness, anchor)
    return merge(trained, frozen), state


def compiled_form(evolution: Evolution) -> tuple[Evolution, Rates | None]:
    """What an update is compiled for, and its inputs: for floats, α and σ are no part.

    So a schedule compiles nothing anew. Codes have rates in what is compiled.
    """
    if evolution.rounding != "none":
        return evolution, None
    pull = evolution.alpha * evolution.decay_coefficient
    rates = Rates(np.float32(evolution.rate), np.float32(pull))
    if evolution.whole_numbers:
        strength = strength_of(evolution.decay, pull, evolution.whole_unit)
        rates = Rates(None, strength)
    same: dict[str, Any] = {"alpha": 1.0, "sigma": 1.0, "decay_coefficient": 0.0}
    same["unit"] = 0.0
    same |= dict.fromkeys(SCHEDULES, 0)
    return dataclasses.replace(evolution, **same), rates


def _shards(params: PyTree) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Paths of the leaves that devices have parts of, and the shapes of these."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and any(sharding.spec):
            found.append((leaf_path(path), sharding.shard_shape(leaf.shape)))
    return tuple(found)


@program(static_argnums=(0, 1, 2, 3), donate_argnums=(4, 5))
def _tell(
    evolution: Evolution,
    mesh: Mesh | None,
    share: bool,
    shards: tuple[tuple[str, tuple[int, ...]], ...],
    params: PyTree,
    state: Any,
    rates: Rates | None,
    key: jax.Array,
    fitness: jax.Array,
    anchor: PyTree,
) -> tuple[PyTree, Any]:
    spread = model_is_spread(mesh)

    own = dict(shards)

    def pieces(path: tuple[Any, ...], leaf: Any) -> int:
        shape = own.get(leaf_path(path))
        return leaf.shape[0] // shape[0] if shape else 1

    def parts(path: tuple[Any, ...], leaf: Any) -> int:
        if evolution.rank and not is_stack(path) and not is_codes(leaf):
            return 1
        if shape := own.get(leaf_path(path)):
            leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
        return count_parts(path, leaf)

    return update_in_place(
        make_optimizer(evolution, partitioned=spread, rates=rates),
        params,
        state,
        key=key,
        fitness=fitness,
        anchor=anchor,
        strength=rates and rates.pull,
        parts=parts,
        pieces=pieces,
        mesh=None if spread else mesh,
        share=share,
    )


def moves_of(state: Any) -> tuple[float, float] | None:
    """How many codes the last update changed, and moves it blocked; None: no codes."""
    counted = optax.tree.get(state, "changed"), optax.tree.get(state, "blocked")
    return None if counted[0] is None else (float(counted[0]), float(counted[1]))


def replay(
    evolution: Evolution,
    params: PyTree,
    state: Any,
    root: jax.Array,
    fitness: Iterable[jax.typing.ArrayLike],
    start: int = 0,
    anchor: PyTree = None,
    *,
    share: bool = False,
) -> tuple[PyTree, Any]:
    """The updates of generations `start`, `start + 1`, ... from their fitness alone.

    Params and state are those before generation `start`, and donated; `fitness` has a
    float32 [N] a generation, `root` is the run's root key. The rest is as for `tell`.
    """
    for generation, values in enumerate(fitness, start):
        key, now = generation_key(root, generation), evolution.at(generation)
        params, state = tell(now, params, state, key, values, anchor, share=share)
    return params, state


def count_trained(params: PyTree, evolution: Evolution) -> int:
    """How many weights are trained: all floats, or the codes (and scales)."""
    trained, _ = split(params, evolution.scale_sigma > 0)
    return sum(leaf.size for leaf in jax.tree.leaves(trained, is_leaf=is_codes))


def flip_rate(evolution: Evolution, generations: int = 30) -> float:
    """Share of codes that a generation changes if fitness is noise: a simulation.

    Of 20,000 codes of 8 bits in the middle of their range, the mean over the last ten
    of so many generations, with the optimizer itself and normal rewards.
    """
    evolution = dataclasses.replace(evolution, decay="none", scale_sigma=0.0)
    if evolution.rounding == "replay":  # the same numbers at less work
        evolution = dataclasses.replace(evolution, rounding="residual")
    params = {"codes": pack(jnp.full((100, 200), 128), bits=8)}
    state, changed = first_state(evolution, params), []
    for generation in range(generations):
        key = generation_key(jax.random.key(0), generation)
        fitness = jax.random.normal(key, (evolution.population,))
        params, state = tell(evolution, params, state, key, fitness)
        changed.append(float(optax.tree.get(state, "changed")))
    return sum(changed[-10:]) / 10 / 20_000
