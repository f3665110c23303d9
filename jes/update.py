"""Tell: from keys and fitness to the next weights, as an optax chain."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jes.baselines.quzo import stochastic_rounding
from jes.core.codes import pack
from jes.core.drift import drift_norm
from jes.core.fitness import typical_spread
from jes.core.integer_noise import variance
from jes.core.low_rank import is_stack
from jes.core.mesh import (
    POPULATION,
    mesh_of,
    model_is_spread,
    on_mesh_of,
    population_devices,
    replicated,
)
from jes.core.noise import Noise, PyTree, generation_key
from jes.core.placement import on_device
from jes.core.tree import is_codes, map_leaves, merge, split, structure
from jes.transforms import (
    anchored_weight_decay,
    error_feedback,
    es_gradient,
    seed_replay,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """Everything the update depends on beside keys and fitness; kept in the ledger.

    Attributes:
      population: N, members a generation.
      sigma: standard deviation of the perturbation, in units of the weights, or codes.
      alpha: learning rate. For floats the factor 1/σ of the gradient is folded in, so
        it is a length in weight space too (2509.24372, section 3.2). For codes it is
        not: α is that of 2602.03120 Eq. (6), and α/σ is what moves a weight.
      alpha_half_life, sigma_half_life: generations after which α or σ is halved, each
        time; 0 for never. See `at`.
      antithetic: whether members come in pairs θ ± σε.
      shaping: see `jes.shape_fitness`.
      decay: 'none', or the kind of anchored weight decay, 'l2' or 'l1'.
      decay_coefficient: its λ.
      anchor: where the base weights are kept; see `jes.keep_anchor`.
      rounding: how steps of a quantised model come to whole codes, see `ROUNDINGS`;
        'none' for floats.
      residual_decay: γ, of 'replay' and 'residual'.
      window: K, generations that 'replay' goes back.
      residual_dtype: of what 'residual' keeps.
      initial_residual, residual_clip: see `jes.error_feedback`.
      divide_by_population: False leaves out the 1/N of Eq. (5), as the published code
        does; the same as N times the α.
      scale_sigma, scale_alpha: of the scales of a quantised model, in units of these,
        with 1/σ folded in; 0 keeps them frozen.
      law: the distribution of the noise, `config.noise`; see `jes.core.noise.LAWS`.
        Ledgers that do not say have 'normal'.
      rank: of the noise of matrices, `config.rank`; 0 for full rank, which ledgers that
        do not say have.
    """

    population: int
    sigma: float
    alpha: float
    alpha_half_life: int = 0
    sigma_half_life: int = 0
    antithetic: bool = False
    shaping: str = "zscore"
    decay: str = "none"
    decay_coefficient: float = 0.0
    anchor: str = "device"
    rounding: str = "none"
    residual_decay: float = 0.9
    window: int = 50
    residual_dtype: str = "float32"
    initial_residual: str = "zero"
    residual_clip: float = 0.0
    divide_by_population: bool = True
    scale_sigma: float = 0.0
    scale_alpha: float = 0.0
    law: str = "normal"
    rank: int = 0

    def at(self, generation: int) -> "Evolution":
        """The settings of a generation: in steps, each of which is compiled anew."""
        alpha, sigma = (
            value * 0.5 ** (generation // half_life if half_life else 0)
            for value, half_life in (
                (self.alpha, self.alpha_half_life),
                (self.sigma, self.sigma_half_life),
            )
        )
        return dataclasses.replace(self, alpha=alpha, sigma=sigma)

    @property
    def noise(self) -> Noise:
        """How members differ from the centre."""
        return Noise(
            sigma=self.sigma,
            antithetic=self.antithetic,
            rounds=2 if self.rounding == "quzo" else 1,
            scale_sigma=self.scale_sigma,
            law=self.law,
            rank=self.rank,
        )

    @property
    def rate(self) -> float:
        """What the mean of members' noise, weighted with their fitness, moves by."""
        if self.rounding == "none":
            return self.alpha
        mean = 1 if self.divide_by_population else self.population
        return self.alpha / self.sigma * mean


def make_optimizer(
    evolution: Evolution, anchor: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """The chain that turns a generation's keys and fitness into updates.

    Args:
      evolution: settings.
      anchor: the base weights, if the optimizer is to update with a decay (and not
        only to be checked, or to give its first state).
    """
    if evolution.rounding not in ROUNDINGS:
        names = tuple(ROUNDINGS)
        raise ValueError(f"rounding must be one of {names}, not {evolution.rounding!r}")
    links = [
        es_gradient(evolution.noise, shaping=evolution.shaping),
        _scale_by_rates(evolution.rate, evolution.scale_alpha),
    ]
    if evolution.decay != "none":
        alpha, coefficient = evolution.alpha, evolution.decay_coefficient
        links.append(anchored_weight_decay(alpha, coefficient, anchor, evolution.decay))
    return ROUNDINGS[evolution.rounding](optax.chain(*links), evolution)


def _scale_by_rates(rate: float, scale_rate: float) -> optax.GradientTransformation:
    """Descent by one learning rate for codes, and another for scales beside them."""
    if not scale_rate:
        return optax.scale_by_learning_rate(rate)

    def scaled(updates: PyTree, params: PyTree) -> PyTree:
        def one(path: Any, leaf: Any, update: jax.Array) -> jax.Array:
            return -(rate if is_codes(leaf) else scale_rate) * update

        return map_leaves(one, params, updates)

    return optax.stateless(scaled)


def _keep_residual(
    steps: optax.GradientTransformation, evolution: Evolution
) -> optax.GradientTransformationExtraArgs:
    feedback = error_feedback(
        decay=evolution.residual_decay,
        dtype=evolution.residual_dtype,
        initial=evolution.initial_residual,
        clip=evolution.residual_clip,
    )
    return optax.chain(steps, feedback)


def _replay_residual(
    steps: optax.GradientTransformation, evolution: Evolution
) -> optax.GradientTransformationExtraArgs:
    return seed_replay(
        steps,
        population=evolution.population,
        decay=evolution.residual_decay,
        window=evolution.window,
        initial=evolution.initial_residual,
        clip=evolution.residual_clip,
    )


ROUNDINGS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "none": lambda steps, evolution: optax.with_extra_args_support(steps),
    "replay": _replay_residual,
    "residual": _keep_residual,
    "naive": lambda steps, evolution: optax.chain(steps, error_feedback(decay=0)),
    "quzo": lambda steps, evolution: optax.chain(steps, stochastic_rounding()),
}
"""How steps become whole codes: by the residual replayed or kept (2602.03120), to the
nearest and no more (naive), or at random (QuZO)."""


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
      params: the centre; what is trained of it is donated, float32 masters or codes.
      state: of the optimizer; donated.
      key: the generation key.
      fitness: float32 [N], raw rewards.
      anchor: the base weights, where there is a decay; see `jes.keep_anchor`.
      share: on a mesh, the devices that hold the same large array of floats each move
        a part of it, and send it to the others; the bits are the same. They hold a part
        a device beside it. Codes, and models spread over 'model', are not shared so.

    Returns:
      New parameters and optimizer state. What is frozen is the same array as before.
    """
    scales = evolution.scale_sigma > 0
    trained, frozen = split(params, scales)
    if anchor is not None:
        anchor, _ = split(anchor, scales)
    with on_mesh_of(params):
        trained, state = _tell(evolution, share, trained, state, key, fitness, anchor)
    return merge(trained, frozen), state


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _tell(
    evolution: Evolution,
    share: bool,
    params: PyTree,
    state: Any,
    key: jax.Array,
    fitness: jax.Array,
    anchor: PyTree,
) -> tuple[PyTree, Any]:
    def moved(params: PyTree, anchor: PyTree, **part: Any) -> tuple[PyTree, Any]:
        # Only shapes are read of the incoming updates: these zeros are never stored.
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, next_state = make_optimizer(evolution, anchor).update(
            zeros, state, params, key=key, fitness=fitness, anchor=anchor, **part
        )
        return optax.apply_updates(params, updates), next_state

    if evolution.rounding != "none" or model_is_spread():
        return moved(params, anchor)

    devices = population_devices() if share else 1
    return _part_by_part(
        moved, params, anchor, whole=evolution.rank > 0, devices=devices
    )


def _part_by_part(
    moved: Callable, params: PyTree, anchor: PyTree, *, whole: bool, devices: int
) -> tuple[PyTree, Any]:
    """What `moved` gives; each leaf moves alone, and a large one by parts, in place.

    What moves floats looks at one number at a time, and its state only counts. All at
    once, the updates would take as much memory as the weights. Matrices stay `whole`
    where their noise is of low rank; stacks of them do not. Several `devices` each
    move a part at a time, and hold what all of them have moved.
    """

    def one(path: tuple[Any, ...], leaf: jax.Array, home: Any) -> jax.Array:
        count = 1 if whole and not is_stack(path) else parts(leaf.shape)
        if count == 1:
            return jax.tree.leaves(moved(_at(path, leaf), _at(path, home))[0])[0]
        home = None if home is None else on_device(home)
        rows = leaf.shape[0] // count

        def new_part(number: jax.Array, leaf: jax.Array) -> jax.Array:
            def own(array: Any) -> Any:
                if array is None:
                    return None
                start = number * rows
                return _at(path, jax.lax.dynamic_slice_in_dim(array, start, rows))

            new, _ = moved(own(leaf), own(home), matrix=number)
            (new,) = jax.tree.leaves(new)
            return new

        def put(leaf: jax.Array, new: jax.Array, number: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(leaf, new, number * rows, 0)

        def move(number: jax.Array, leaf: jax.Array) -> jax.Array:
            return put(leaf, new_part(number, leaf), number)

        if devices == 1:
            return jax.lax.fori_loop(0, count, move, leaf)

        def move_some(turn: jax.Array, leaf: jax.Array) -> jax.Array:
            def number(device: jax.Array) -> jax.Array:
                return jnp.minimum(turn * devices + device, count - 1)

            mine = new_part(number(jax.lax.axis_index(POPULATION)), leaf)
            new = jax.lax.all_gather(mine, POPULATION)
            return jax.lax.fori_loop(
                0, devices, lambda i, leaf: put(leaf, new[i], number(i)), leaf
            )

        turns = -(-count // devices)
        everywhere = PartitionSpec()
        return jax.shard_map(
            lambda leaf: jax.lax.fori_loop(0, turns, move_some, leaf),
            in_specs=everywhere,
            out_specs=everywhere,
            check_vma=False,
        )(leaf)

    if anchor is None:
        anchor = jax.tree.map(lambda leaf: None, params)
    homes = structure(params).flatten_up_to(anchor)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    new = [one(*leaf, home) for leaf, home in zip(leaves, homes, strict=True)]
    _, state = moved({}, {})
    return structure(params).unflatten(new), state


PART = 2**20
"""Weights that move at once, at least: enough to keep all cores of a CPU busy."""


def parts(shape: tuple[int, ...]) -> int:
    """Number of equal parts of the first axis that an array of this shape moves in."""
    most = min(shape[0], math.prod(shape) // PART) if shape else 1
    return next((n for n in range(most, 0, -1) if shape[0] % n == 0), 1)


def _at(path: tuple[Any, ...], leaf: Any) -> Any:
    """A tree with this leaf alone, where the path says; None for none."""
    for key in reversed(path):
        leaf = None if leaf is None else {key.key: leaf}
    return leaf


def moves_of(state: Any) -> tuple[float, float] | None:
    """How many codes the last update changed, and how many moves were blocked.

    None where the state does not say: of floats.
    """
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

    Args:
      evolution: settings.
      params, state: as they were before generation `start`; donated.
      root: the run's root key.
      fitness: a float32 [N] a generation.
      anchor: the base weights, where there is a decay.
      share: as for `tell`.
    """
    for generation, values in enumerate(fitness, start):
        key = generation_key(root, generation)
        values = jnp.asarray(values)
        now = evolution.at(generation)
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
    state = first_state(evolution, params)
    root = jax.random.key(0)
    shares = []
    for generation in range(generations):
        key = generation_key(root, generation)
        fitness = jax.random.normal(key, (evolution.population,))
        params, state = tell(evolution, params, state, key, fitness)
        shares.append(float(optax.tree.get(state, "changed")) / 20_000)
    return sum(shares[-10:]) / 10


def drift(evolution: Evolution, parameters: int, generations: int) -> float:
    """‖θ - θ_0‖ that noise alone would reach in so many generations; see `drift_norm`.

    Of a quantised model in codes, and of the weights with their residual, W + e: on
    the grid it is less while steps wait in the residual, and later up to 1/12 a weight
    more, squared. NaN where rounding loses steps or adds some, for a decay of codes or
    with a falling α, and for shaping 'none', whose steps are as long as the rewards are
    far apart.

    Args:
      evolution: settings.
      parameters: how many weights are trained.
      generations: how many updates.
    """
    step, steps = evolution.alpha, float(generations)
    if evolution.alpha_half_life:
        if evolution.decay != "none":
            return math.nan
        steps = _equal_steps(generations, evolution.alpha_half_life)
    if evolution.rounding != "none":
        kept = {"residual": math.inf, "replay": evolution.window}
        lossless = evolution.residual_decay == 1 and evolution.decay == "none"
        if not lossless or generations > kept.get(evolution.rounding, 0):
            return math.nan
        step = evolution.rate * math.sqrt(variance(evolution.sigma))
    return drift_norm(
        alpha=step,
        population=evolution.population,
        parameters=parameters,
        generations=steps,
        kind=evolution.decay,
        coefficient=evolution.decay_coefficient,
        spread=typical_spread(evolution.shaping, evolution.population),
    )


def _equal_steps(generations: int, half_life: int) -> float:
    """How many steps of the first length have the squares of so many halving ones."""
    halvings, rest = divmod(generations, half_life)
    return half_life * (1 - 0.25**halvings) / 0.75 + rest * 0.25**halvings
