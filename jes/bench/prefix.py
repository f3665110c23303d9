"""The row of `jes.bench` about what prompts share: read by each of them, or once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jes.bench.timing import Row, compare
from jes.models.weights import Pretrained, load
from jes.sampling.generate import decode_members, unrolled_members
from jes.sampling.prompts import share

PROMPTS, COMMON, OWN = 32, 600, 60


def texts(vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens that begin alike."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, vocabulary, COMMON).tolist()
    return [common + rng.integers(0, vocabulary, OWN).tolist() for _ in range(PROMPTS)]


def reading(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int]],
    parts: Sequence[int] | None = None,
) -> Callable[[], Any]:
    """A function that reads prompts, up to their first new token."""
    model = pretrained.model
    weights = jax.tree.map(lambda leaf: leaf[None], pretrained.params)
    weights = unrolled_members(model, weights)
    prefix, rest = share(prompts, parts=parts)
    return lambda: decode_members(
        model.unrolled(),
        weights,
        rest,
        jax.random.split(jax.random.key(0), 1),
        max_new_tokens=1,
        eos_ids=(),
        prefix=prefix,
    )


def rows(repeats: int) -> list[Row]:
    """What a shared beginning saves."""
    tiny = load("tiny")
    prompts = texts(tiny.config.vocab_size)
    lengths = f"{PROMPTS} prompts x ({COMMON} + {OWN}) tokens"
    return [
        compare(
            f"prompts read in full / what they share once: tiny, {lengths}",
            ">= 5",
            reading(tiny, prompts, parts=()),
            reading(tiny, prompts),
            repeats,
        )
    ]
