"""Rows of `jes.bench`: answers that differ in length, and prompts that begin alike."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from jes.bench.cases import Case, long_tailed, model_of
from jes.bench.timing import Row, Run, compare
from jes.core.members import Members, unperturbed
from jes.memory import slot_choices, useful_members
from jes.models.weights import Pretrained
from jes.sampling.continuous_batching import Batching, decode_in_slots
from jes.sampling.generate import Sampling, decode, unrolled, unrolled_params
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.packing import computed_tokens, pack_prompts, text_tokens
from jes.sampling.prompts import pad, share

PROMPTS, PROMPT_TOKENS, MEDIAN, LONGEST = 200, 32, 15, 20
"""Lengths of answers are log-normal, the longest 20 times the median: as reasoning
models write."""
MEMBERS = 2
COMMON, OWN = 600, 60
"""Tokens of a prompt that all share, and of its own."""


def long_tails(repeats: int) -> Iterator[Row]:
    """What continuous batching saves where a few answers are far longer than most."""
    slots = next(filter(None, slot_choices(PROMPTS, MEDIAN * LONGEST)))
    for name in ("tiny", "4.5M"):
        tokens = f"{PROMPT_TOKENS} + 1 to {MEDIAN * LONGEST} tokens"
        what = f"plain loop / slots: {name}, {PROMPTS} prompts x {tokens}"
        yield compare(what, ">= 2", both_ways(model_of(name), slots), repeats)


def both_ways(
    pretrained: Pretrained, slots: int, slice_tokens: int = 32
) -> tuple[Run, Run]:
    """The same answers by the plain loop and in slots, to be timed.

    Both hold as many members at once as are useful for their rows.
    """
    model = pretrained.model.unrolled()
    sampling = Sampling(max_new_tokens=MEDIAN * LONGEST)
    batching = Batching(sampling=sampling, slots=slots, slice_tokens=slice_tokens)
    plain, in_slots = partial(decode, model), partial(decode_in_slots, model)
    return (
        in_chunks(plain, pretrained, PROMPTS, sampling),
        in_chunks(in_slots, pretrained, slots, batching),
    )


def in_chunks(
    decode: Callable[..., Any], pretrained: Pretrained, rows: int, settings: Any
) -> Run:
    """A function by which all members answer, `useful_members` at a time."""
    chunk = useful_members(MEMBERS, rows)
    prompts = Case(pretrained, PROMPTS, PROMPT_TOKENS, 0).prompts()
    batch = pad(prompts, (PROMPT_TOKENS,))
    weights = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (chunk, *leaf.shape)), pretrained.params
    )
    keys = jax.random.split(jax.random.key(0), MEMBERS).reshape(-1, chunk)
    members = unrolled(pretrained.model, Members({"params": weights}, keys[0]))
    # Answers of all members are as long, but to other prompts.
    lengths = [long_tailed(PROMPTS, MEDIAN, LONGEST, seed) for seed in range(MEMBERS)]
    limits = np.stack(lengths).reshape(-1, chunk, PROMPTS)
    return lambda: [
        decode(dataclasses.replace(members, keys=key), batch, settings, some)
        for key, some in zip(keys, limits, strict=True)
    ]


def shared_prefix(repeats: int) -> Iterator[Row]:
    """Prompts read in full over those whose common prefix is read once."""
    tiny, count = model_of("tiny"), 32
    prompts = alike(tiny.config.vocab_size, count)
    what = "prompts read in full / what they share once: tiny"
    what += f", {count} prompts x ({COMMON} + {OWN}) tokens"
    runs = (reading(tiny, share(prompts, parts=parts)) for parts in ((), None))
    yield compare(what, ">= 5", [*runs], repeats)


def ragged(repeats: int) -> Iterator[Row]:
    """What packing saves for prompts of all lengths, and likelihoods in one read."""
    case = Case(model_of("4.5M"), 64, 84, 1, ragged=True)
    model, prompts, count = case.model, case.prompts(), case.rows
    tokens = f"{count} prompts x {min(case.lengths())} to {max(case.lengths())} tokens"
    padded, packed = pad(prompts), pack_prompts(prompts)
    runs = reading(model, padded), reading(model, packed)
    text = computed_tokens(packed) / text_tokens(packed)
    what = f"prompts padded / packed: 4.5M, {tokens} ({text:.2f} computed a token)"
    yield compare(what, ">= 2", runs, repeats)
    letters = pack_choices(prompts, [[[1], [2], [3], [4]]] * count)
    itself = unperturbed(model.params)
    likelihoods = partial(log_likelihoods, model.model, itself, letters)
    what = f"likelihoods of four letters / one generated: 4.5M, {tokens}"
    yield compare(what, "<= 1.2", (likelihoods, reading(model, packed)), repeats)


def alike(vocabulary: int, count: int) -> list[list[int]]:
    """Prompts of random tokens that begin with the same ones."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, vocabulary, COMMON).tolist()
    return [common + rng.integers(0, vocabulary, OWN).tolist() for _ in range(count)]


def reading(pretrained: Pretrained, batch: Any) -> Run:
    """A function that reads prompts, up to their first new token."""
    model, sampling = pretrained.model, Sampling(max_new_tokens=1)
    itself = unperturbed(unrolled_params(model, pretrained.params))
    return lambda: decode(model.unrolled(), itself, batch, sampling)
