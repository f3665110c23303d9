"""Rollouts whose answers differ in length, of which `jes.bench` times two ways.

Lengths are log-normal, the longest 20 times the median: what reasoning models write.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import numpy as np

from jes.io import memory
from jes.models.weights import Pretrained
from jes.sampling.generate import decode_members, unrolled_members
from jes.sampling.prompts import PromptBatch, pad
from jes.sampling.slots import decode_in_slots

PROMPTS, PROMPT_TOKENS, MEDIAN, LONGEST = 200, 32, 20, 20
MEMBERS = 4


def long_tailed(count: int, median: float, longest: float) -> np.ndarray:
    """Log-normal lengths in tokens, int32 [count] in random order: its quantiles.

    Args:
      count: how many.
      median: in tokens.
      longest: the greatest, in medians.
    """
    ranks = (np.arange(count) + 0.5) / count
    normal = np.array([NormalDist().inv_cdf(rank) for rank in ranks])
    lengths = median * np.exp(normal * math.log(longest) / normal.max())
    lengths = np.maximum(np.rint(lengths), 1).astype(np.int32)
    return np.random.default_rng(0).permutation(lengths)


def rollouts(
    pretrained: Pretrained, slots: int, slice_tokens: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same answers by the plain loop and in slots, to be timed.

    Both take members in chunks as `memory` gives them for their rows.
    """
    model = pretrained.model.unrolled()
    rng = np.random.default_rng(0)
    vocabulary = pretrained.config.vocab_size
    prompts = pad(
        rng.integers(0, vocabulary, (PROMPTS, PROMPT_TOKENS)).tolist(),
        (PROMPT_TOKENS,),
    )
    limits = long_tailed(PROMPTS, MEDIAN, LONGEST)
    settings = {"max_new_tokens": int(limits.max()), "eos_ids": (), "limits": limits}
    in_slots = partial(decode_in_slots, slots=slots, slice_tokens=slice_tokens)
    return (
        _in_chunks(decode_members, model, pretrained, prompts, PROMPTS, settings),
        _in_chunks(in_slots, model, pretrained, prompts, slots, settings),
    )


def _in_chunks(
    decode: Callable[..., Any],
    model: Any,
    pretrained: Pretrained,
    prompts: PromptBatch,
    rows: int,
    settings: dict[str, Any],
) -> Callable[[], Any]:
    chunk = min(MEMBERS, memory.most_members(rows) or MEMBERS)
    members = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (chunk, *leaf.shape)), pretrained.params
    )
    weights = unrolled_members(pretrained.model, members)
    keys = jax.random.split(jax.random.key(0), MEMBERS).reshape(-1, chunk)
    return lambda: [decode(model, weights, prompts, key, **settings) for key in keys]
