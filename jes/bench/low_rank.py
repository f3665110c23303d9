"""The rows of `jes.bench` about noise of low rank: decoding by many members at once.

The same prompts, as many rows and as many new tokens, once with the weights as they
are and once with those of members whose factors are drawn in the same call. Then whole
generations, over those with noise of full rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.bench.cases import Case, generation, larger_model
from jes.bench.timing import Row, compare, row_of
from jes.core.evolution import Evolution
from jes.core.members import Members, unperturbed
from jes.core.noise import Noise
from jes.core.population import perturb_members
from jes.models.weights import Pretrained, load
from jes.sampling.generate import Sampling, decode, unrolled, unrolled_params
from jes.sampling.prompts import pad

MEMBERS, PROMPTS, PROMPT, NEW = 32, 4, 16, 128
SIGMA = 1e-3
GOALS = {1: 0.91, 4: 0.80}
"""Throughput as a share of that of the unperturbed model, by rank."""

POPULATION = 64
"""Of the generations."""

SAMPLING = Sampling(max_new_tokens=NEW)


def texts(pretrained: Pretrained) -> list[list[int]]:
    """Random prompts, the same for all members."""
    rng = np.random.default_rng(0)
    words = pretrained.config.vocab_size
    return rng.integers(0, words, (PROMPTS, PROMPT)).tolist()


def without_noise(pretrained: Pretrained) -> Callable[[], Any]:
    """A function that answers the prompts of all members with the model itself."""
    model = pretrained.model
    return partial(
        decode,
        model.unrolled(),
        unperturbed(unrolled_params(model, pretrained.params)),
        pad(texts(pretrained) * MEMBERS, (PROMPT,)),
        SAMPLING,
    )


def with_noise(pretrained: Pretrained, rank: int) -> Callable[[], Any]:
    """A function that draws members with noise of a rank, which answer the prompts."""
    model = pretrained.model
    shared = unrolled_params(model, pretrained.params)
    noise = Noise(sigma=SIGMA, rank=rank)

    def run() -> Any:
        own = perturb_members(
            pretrained.params, jax.random.key(0), jnp.arange(MEMBERS), noise
        )
        own = unrolled(model, own.replace(params=shared))
        prompts = pad(texts(pretrained), (PROMPT,))
        return decode(model.unrolled(), own, prompts, SAMPLING)

    return run


def rows(repeats: int) -> list[Row]:
    """Throughput by rank, and the time of a generation by full and by low rank."""
    models = {"tiny": load("tiny"), "4.5M": larger_model()}
    decoding = [decoding_rows(*model, repeats) for model in models.items()]
    return [
        *(row for rows in decoding for row in rows),
        *(generation_row(*model, repeats) for model in models.items()),
        *(memory_row(*model) for model in models.items()),
    ]


def decoding_rows(name: str, model: Pretrained, repeats: int) -> list[Row]:
    """Throughput as a share of the model's own."""
    shape = f"{name}, {MEMBERS} members x {PROMPTS} prompts, {PROMPT} + {NEW} tokens"
    return [
        compare(
            f"tokens/s with noise of rank {rank} / without noise: {shape}",
            f">= {goal}",
            without_noise(model),
            with_noise(model, rank),
            repeats,
        )
        for rank, goal in GOALS.items()
    ]


def generation_row(name: str, model: Pretrained, repeats: int) -> Row:
    """A generation with noise of full rank over one with rank 1."""
    case = Case(name, model, PROMPTS, PROMPT, NEW)

    def run(rank: int) -> Callable[[], Any]:
        evolution = Evolution(population=POPULATION, sigma=SIGMA, alpha=0.0, rank=rank)
        return generation(case, evolution)

    shape = f"{name}, {POPULATION} members x {PROMPTS} prompts"
    what = f"generation, noise of full rank / rank 1: {shape}, {PROMPT} + {NEW} tokens"
    return compare(what, "", run(0), run(1), repeats)


def memory_row(name: str, model: Pretrained) -> Row:
    """What decoding takes with all members held, by the compiler's analysis."""
    sides = [held(model, rank) / 1e6 for rank in (0, 1)]
    shape = f"{name}, {POPULATION} members x {PROMPTS} prompts, {PROMPT} + {NEW} tokens"
    what = f"memory of decoding, noise of full rank / rank 1: {shape}"
    return row_of(what, "", np.array([sides[0] / sides[1]]), sides, "MB")


def held(pretrained: Pretrained, rank: int) -> int:
    """Bytes of all members, of the centre if they share it, and of the program."""
    model, params = pretrained.model, pretrained.params
    noise, numbers = Noise(sigma=SIGMA, rank=rank), jnp.arange(POPULATION)

    def drawn(key: jax.Array) -> Members:
        own = perturb_members(params, key, numbers, noise)
        if rank:
            own = own.replace(params=unrolled_params(model, params))
        return unrolled(model, own)

    program = decode.lower(
        model.unrolled(),
        jax.eval_shape(drawn, jax.random.key(0)),
        pad(texts(pretrained), (PROMPT,)),
        SAMPLING,
    ).compile()
    found: Any = program.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
    )
