"""Rows of `jes.bench` about noise: its distributions, low rank, and noise of codes."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.bench.cases import Case, generation, model_of
from jes.bench.timing import Row, Run, compare, row_of
from jes.core import random, signs
from jes.core.codes import Codes, pack
from jes.core.evolution import Evolution
from jes.core.integer_noise import dense_noise
from jes.core.members import Members, unperturbed
from jes.core.noise import Noise, generation_key, leaf_key
from jes.core.population import perturb_members
from jes.core.tree import map_leaves
from jes.sampling.generate import Sampling, decode, unrolled, unrolled_params
from jes.sampling.prompts import pad
from jes.transforms import error_feedback, es_gradient
from jes.update import first_centre, first_state, tell

SHAPE = (4000, 2500)
"""Of one leaf: ten million numbers."""
DRAWS: dict[str, Any] = {
    "jax.random.normal": jax.random.normal,
    "normal": random.normal,
    "table": random.table,
    "sign": signs.sign,
}
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def distributions(repeats: int) -> Iterator[Row]:
    """The time to draw normal numbers over that by the table, in each use of them.

    Then that to perturb by them, and to update by members, over that with signs.
    """
    for name, goal in (("jax.random.normal", ">= 1.8"), ("normal", "")):
        for use in USES:
            runs = drawing(use, name), drawing(use, "table")
            yield compare(f"{name} / table noise, {use}", goal, runs, repeats)

    name, use = "jax.random.normal", "theta + sigma x noise"
    runs = drawing(use, name), drawing(use, "sign")
    yield compare(f"{name} / sign noise, {use}", ">= 4", runs, repeats)
    for name in ("normal", "table"):
        what = f"{name} / sign noise, update of {MEMBERS} members"
        yield compare(what, ">= 3.5", (updating(name), updating("sign")), repeats)


def updating(name: str) -> Run:
    """A function that updates a leaf by members with this noise."""
    evolution = Evolution(
        population=MEMBERS, sigma=SIGMA, alpha=SIGMA, distribution=name
    )
    params = {"kernel": jnp.zeros(SHAPE)}
    centre, state = first_centre(evolution, params), first_state(evolution, params)
    return repeated(partial(tell, evolution), centre, state, 0, MEMBERS)


def drawing(use: str, name: str) -> Run:
    """A function that draws as many numbers for one of `USES`, by one of `DRAWS`."""
    key, centre = jax.random.key(0), jnp.zeros(SHAPE)
    run = jax.jit(lambda key, centre: USES[use](DRAWS[name], key, centre))
    return lambda: run(key, centre)


def _summed(draw: Draw, key: jax.Array, centre: jax.Array) -> jax.Array:
    def add(member: jax.Array, total: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, member)
        return total - (member + 0.5) * draw(own, centre.shape)

    return jax.lax.fori_loop(0, 2, add, jnp.zeros_like(centre))


USES: dict[str, Callable[[Draw, jax.Array, jax.Array], jax.Array]] = {
    "drawn": lambda draw, key, centre: draw(key, centre.shape),
    "theta + sigma x noise": lambda draw, key, centre: (
        centre + 0.01 * draw(key, centre.shape)
    ),
    "summed over 2 members": _summed,
}

MEMBERS, PROMPTS, PROMPT, NEW, POPULATION = 32, 4, 16, 128, 64
"""Of decoding with low rank, where all members answer at once; and the population of a
generation."""
SIGMA = 1e-3
GOALS = {1: 0.91, 4: 0.80}
"""Throughput as a share of that of the unperturbed model, by rank."""


def low_rank(repeats: int) -> Iterator[Row]:
    """Throughput by rank; then time and memory of full-rank over those of rank 1."""
    cases = {
        name: Case(model_of(name), PROMPTS, PROMPT, NEW) for name in ("tiny", "4.5M")
    }
    for name, case in cases.items():
        shape = f"{name}, {MEMBERS} members x {case}"
        for rank, goal in GOALS.items():
            what = f"tokens/s with noise of rank {rank} / without noise: {shape}"
            runs = without_noise(case), with_noise(case, rank)
            yield compare(what, f">= {goal}", runs, repeats)
    for name, case in cases.items():
        shape = f"{name}, {POPULATION} members x {case}"
        settings: dict[str, Any] = {"population": POPULATION, "alpha": 0.0}
        full, low = (
            generation(case, Evolution(sigma=SIGMA, rank=rank, **settings))
            for rank in (0, 1)
        )
        what = f"generation, noise of full rank / rank 1: {shape}"
        yield compare(what, "", (full, low), repeats)
        sides = [decoding_bytes(case, rank) / 1e6 for rank in (0, 1)]
        what = f"memory of decoding, noise of full rank / rank 1: {shape}"
        yield row_of(what, "", np.array([sides[0] / sides[1]]), sides, "MB")


def without_noise(case: Case) -> Run:
    """A function that answers the prompts of all members with the model itself."""
    model, sampling = case.model.model, Sampling(max_new_tokens=case.new)
    itself = unperturbed(unrolled_params(model, case.model.params))
    batch = pad(case.prompts() * MEMBERS, (case.prompt,))
    return partial(decode, model.unrolled(), itself, batch, sampling)


def with_noise(case: Case, rank: int) -> Run:
    """A function that draws members with noise of a rank, which answer the prompts."""
    model, sampling = case.model.model, Sampling(max_new_tokens=case.new)
    shared = unrolled_params(model, case.model.params)

    def run() -> Any:
        own = members_of(case, rank, MEMBERS).replace(params=shared)
        batch = pad(case.prompts(), (case.prompt,))
        return decode(model.unrolled(), unrolled(model, own), batch, sampling)

    return run


def members_of(case: Case, rank: int, count: int) -> Members:
    """Members with noise of a rank, 0 for full, not unrolled."""
    noise, numbers = Noise(sigma=SIGMA, rank=rank), jnp.arange(count)
    return perturb_members(case.model.params, jax.random.key(0), numbers, noise)


def decoding_bytes(case: Case, rank: int) -> int:
    """Of all members, of the weights that they share, and of the program, compiled."""
    model, params = case.model.model, case.model.params

    def members() -> Members:
        own = members_of(case, rank, POPULATION)
        if rank:
            own = own.replace(params=unrolled_params(model, params))
        return unrolled(model, own)

    batch, sampling = pad(case.prompts(), (PROMPT,)), Sampling(max_new_tokens=case.new)
    lowered = decode.lower(model.unrolled(), jax.eval_shape(members), batch, sampling)
    found = lowered.compile().memory_analysis()
    new = found.output_size_in_bytes + found.temp_size_in_bytes
    return found.argument_size_in_bytes + new


CODES = (896, 4864)
"""Shape of a feed-forward matrix of Qwen2.5-0.5B: a layer has 13 million codes."""
CODES_POPULATION = WINDOW = 50
SIGMAS = {0.001: ">= 200", 0.005: "", 0.01: ">= 50"}
"""Sigma in codes, and the goal for a dense draw over a sparse one."""


def rounding(repeats: int) -> Iterator[Row]:
    """What sparse noise of codes saves (2602.03120), on the matrices of a layer."""
    dense, sparse = 2, 100
    for sigma, goal in SIGMAS.items():
        what = f"dense / sparse noise of codes, sigma = {sigma}"
        runs = dense_estimate(sigma, dense), sparse_estimate(sigma, sparse)
        yield compare(what, goal, runs, repeats, dense / sparse)
    for sigma in (0.001, 0.01):
        what = f"seed-replay update / dense-noise update, sigma = {sigma}"
        runs = replayed_update(sigma), dense_update(sigma)
        yield compare(what, "<= 0.5", runs, repeats)


def feed_forward() -> dict[str, Codes]:
    """Parameters of one layer's feed-forward, of codes of 4 bits."""
    rng = np.random.default_rng(0)
    shapes = {"gate": CODES, "up": CODES, "down": CODES[::-1]}
    return {
        name: pack(jnp.asarray(rng.integers(0, 16, shape)), bits=4)
        for name, shape in shapes.items()
    }


def evolution_of(sigma: float, rounding: str) -> Evolution:
    """As in the published runs, but every member has noise of its own: no pairs."""
    settings: dict[str, Any] = {
        "alpha": 2 * sigma,
        "rounding": rounding,
        "window": WINDOW,
    }
    return Evolution(population=CODES_POPULATION, sigma=sigma, **settings)


def rewards(members: int) -> jax.Array:
    """Of all members."""
    return jax.random.normal(jax.random.key(3), (members,))


def sparse_estimate(sigma: float, members: int) -> Run:
    """A function that draws so many members again, and sums them with weights."""
    transform = es_gradient(evolution_of(sigma, "residual").noise)
    params = feed_forward()

    @jax.jit
    def run(fitness: jax.Array) -> Any:
        key = jax.random.key(0)
        return transform.update(params, (), key=key, fitness=fitness)[0]

    return partial(run, rewards(members))


def dense_estimate(sigma: float, members: int) -> Run:
    """The same by Eq. (3) as it stands, every entry of every member drawn."""
    params = feed_forward()
    run = jax.jit(lambda key, weights: dense_sums(params, sigma, weights, key))
    return partial(run, jax.random.key(0), rewards(members))


def dense_sums(params: Any, sigma: float, weights: jax.Array, key: jax.Array) -> Any:
    """Sums of members' noise for each leaf."""

    def one(path: Any, leaf: Codes) -> jax.Array:
        def add(member: jax.Array, total: jax.Array) -> jax.Array:
            own = leaf_key(jax.random.fold_in(key, member), path)
            return total + weights[member] * dense_noise(own, leaf.shape, sigma)

        return jax.lax.fori_loop(0, weights.shape[0], add, jnp.zeros(leaf.shape))

    return map_leaves(one, params)


def replayed_update(sigma: float) -> Run:
    """A function that updates by seed replay, with a window that is full."""
    evolution = evolution_of(sigma, "replay")
    params = feed_forward()
    state = first_state(evolution, params)
    keys = [generation_key(jax.random.key(1), g) for g in range(WINDOW)]
    data = jnp.stack([jax.random.key_data(key) for key in keys])
    fitness = jnp.stack([rewards(CODES_POPULATION)] * WINDOW)
    state = state._replace(
        count=jnp.int32(WINDOW), keys=data.astype(state.keys.dtype), fitness=fitness
    )
    return repeated(partial(tell, evolution), params, state, WINDOW)


def dense_update(sigma: float) -> Run:
    """A function that updates with dense noise and a kept residual."""
    feedback = error_feedback(decay=0.9)
    rate = evolution_of(sigma, "residual").rate / CODES_POPULATION

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, key: jax.Array, fitness: jax.Array) -> Any:
        sums = dense_sums(params, sigma, fitness, key)
        steps = jax.tree.map(lambda total: rate * total, sums)
        updates, state = feedback.update(steps, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = feed_forward()
    return repeated(update, params, feedback.init(params), 0)


def repeated(
    update: Callable[..., Any],
    params: Any,
    state: Any,
    first: int,
    members: int = 0,
) -> Run:
    """A function that makes the next update, from generation `first` on."""
    generations = itertools.count(first)
    fitness = rewards(members or CODES_POPULATION)

    def run() -> Any:
        nonlocal params, state
        key = generation_key(jax.random.key(1), next(generations))
        params, state = update(params, state, key, fitness)
        return params

    return run
