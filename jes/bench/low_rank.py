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
from jes.core.noise import Noise
from jes.core.population import draw_deviations, draw_members
from jes.models.weights import Pretrained, load
from jes.sampling.generate import decode_members, unrolled_centre, unrolled_members
from jes.sampling.prompts import pad

MEMBERS, PROMPTS, PROMPT, NEW = 32, 4, 16, 128
SIGMA = 1e-3
GOALS = {1: 0.91, 4: 0.80}
"""Throughput as a share of that of the unperturbed model, by rank."""

POPULATION = 64
"""Of the generations."""

_draw = jax.jit(draw_deviations, static_argnums=(3, 4))


def texts(pretrained: Pretrained) -> list[list[int]]:
    """Random prompts, the same for all members."""
    rng = np.random.default_rng(0)
    words = pretrained.config.vocab_size
    return rng.integers(0, words, (PROMPTS, PROMPT)).tolist()


def unperturbed(pretrained: Pretrained) -> Callable[[], Any]:
    """A function that answers the prompts of all members with the model itself."""
    model = pretrained.model
    one = jax.tree.map(lambda leaf: leaf[None], pretrained.params)
    return partial(
        decode_members,
        model.unrolled(),
        unrolled_members(model, one),
        pad(texts(pretrained) * MEMBERS, (PROMPT,)),
        jax.random.split(jax.random.key(0), 1),
        max_new_tokens=NEW,
        eos_ids=(),
    )


def members(pretrained: Pretrained, rank: int) -> Callable[[], Any]:
    """A function that draws members with noise of a rank, which answer the prompts."""
    model, params = pretrained.model, pretrained.params
    centre = unrolled_centre(model, params)
    key, numbers = jax.random.key(0), jnp.arange(MEMBERS)
    noise = Noise(sigma=SIGMA, rank=rank)

    def run() -> Any:
        deviations = _draw(params, key, numbers, noise, "float32")
        return decode_members(
            model.unrolled(),
            unrolled_members(model, deviations),
            pad(texts(pretrained), (PROMPT,)),
            jax.random.split(key, MEMBERS),
            max_new_tokens=NEW,
            eos_ids=(),
            centre=centre,
        )

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
            unperturbed(model),
            members(model, rank),
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
    draw = draw_deviations if rank else draw_members

    def drawn(key: jax.Array) -> Any:
        return unrolled_members(model, draw(params, key, numbers, noise, "float32"))

    key = jax.random.key(0)
    program = decode_members.lower(
        model.unrolled(),
        jax.eval_shape(drawn, key),
        pad(texts(pretrained), (PROMPT,)),
        jax.random.split(key, POPULATION),
        max_new_tokens=NEW,
        eos_ids=(),
        centre=unrolled_centre(model, params) if rank else None,
    ).compile()
    found: Any = program.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
    )
