"""The row of `jes.bench` about what prompts share: read by each of them, or once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jes.bench.timing import Row, compare
from jes.core.members import unperturbed
from jes.models.weights import Pretrained, load
from jes.sampling.generate import Sampling, decode, unrolled_params
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
    itself = unperturbed(unrolled_params(model, pretrained.params))
    batch = share(prompts, parts=parts)
    return lambda: decode(model.unrolled(), itself, batch, Sampling(max_new_tokens=1))


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
