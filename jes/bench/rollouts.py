"""Rollouts whose answers differ in length, of which `jes.bench` times two ways.

Lengths are log-normal, the longest 20 times the median: what reasoning models write.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import numpy as np

from jes.bench.cases import larger_model
from jes.bench.timing import Row, compare
from jes.core.members import Members
from jes.io import memory
from jes.models.weights import Pretrained, load
from jes.sampling.continuous_batching import Batching, decode_in_slots
from jes.sampling.generate import Sampling, decode, unrolled
from jes.sampling.prompts import PromptBatch, pad

PROMPTS, PROMPT_TOKENS, MEDIAN, LONGEST = 200, 32, 15, 20
MEMBERS = 2
DESCRIPTION = f"{PROMPTS} prompts x {PROMPT_TOKENS} + 1 to {MEDIAN * LONGEST} tokens"


def long_tailed(count: int, median: float, longest: float, seed: int = 0) -> np.ndarray:
    """Log-normal lengths in tokens, int32 [count]: quantiles in random order.

    Args:
      count: how many.
      median: in tokens.
      longest: the greatest, in medians.
      seed: of the order.
    """
    ranks = (np.arange(count) + 0.5) / count
    normal = np.array([NormalDist().inv_cdf(rank) for rank in ranks])
    lengths = median * np.exp(normal * math.log(longest) / normal.max())
    lengths = np.maximum(np.rint(lengths), 1).astype(np.int32)
    return np.random.default_rng(seed).permutation(lengths)


def chosen_slots(pretrained: Pretrained) -> int:
    """Those that a run with these prompts has by default."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
    weights = memory.weight_bytes(pretrained.config, parameters, np.float32)
    return memory.choose_slots(
        pretrained.config,
        weights,
        np.float32,
        PROMPTS,
        PROMPT_TOKENS,
        MEDIAN * LONGEST,
        budget=memory.free_bytes(),
    )


def rollouts(
    pretrained: Pretrained, slots: int = 0, slice_tokens: int = 32
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same answers by the plain loop and in slots, to be timed.

    Both take members in chunks as `memory` gives them for their rows.

    Args:
      pretrained: the model.
      slots: of a member; 0 for what a run has by default.
      slice_tokens: see `decode_in_slots`.
    """
    slots = slots or chosen_slots(pretrained)
    model = pretrained.model.unrolled()
    rng = np.random.default_rng(0)
    vocabulary = pretrained.config.vocab_size
    prompts = pad(
        rng.integers(0, vocabulary, (PROMPTS, PROMPT_TOKENS)).tolist(),
        (PROMPT_TOKENS,),
    )
    sampling = Sampling(max_new_tokens=MEDIAN * LONGEST)
    batching = Batching(sampling=sampling, slots=slots, slice_tokens=slice_tokens)
    return (
        _in_chunks(partial(decode, model), pretrained, prompts, PROMPTS, sampling),
        _in_chunks(
            partial(decode_in_slots, model), pretrained, prompts, slots, batching
        ),
    )


def _in_chunks(
    decode: Callable[..., Any],
    pretrained: Pretrained,
    prompts: PromptBatch,
    rows: int,
    settings: Sampling | Batching,
) -> Callable[[], Any]:
    chunk = min(MEMBERS, memory.most_members(rows) or MEMBERS)
    weights = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (chunk, *leaf.shape)), pretrained.params
    )
    keys = jax.random.split(jax.random.key(0), MEMBERS).reshape(-1, chunk)
    members = unrolled(pretrained.model, Members({"params": weights}, keys[0]))
    # A member's answers are as long as those of another, to other prompts.
    lengths = (long_tailed(PROMPTS, MEDIAN, LONGEST, seed) for seed in range(MEMBERS))
    limits = np.stack(list(lengths)).reshape(-1, chunk, PROMPTS)
    return lambda: [
        decode(dataclasses.replace(members, keys=key), prompts, settings, some)
        for key, some in zip(keys, limits, strict=True)
    ]


def rows(repeats: int) -> list[Row]:
    """What slots save where a few answers are far longer than most."""
    return [
        compare(
            f"plain loop / slots: {name}, {DESCRIPTION}",
            ">= 2",
            *rollouts(model),
            repeats,
        )
        for name, model in (("tiny", load("tiny")), ("4.5M", larger_model()))
    ]
