"""How much memory there is, and how much a member of the population takes."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jes.core.integer_noise import entries
from jes.core.population import chunk_size

SHARE = 0.6
"""Of the free memory to plan with: compilers and allocators need room too."""


MMAP_THRESHOLD = 4 * 2**20
"""Bytes of a block above which glibc gives it back to the system when it is freed."""

CPU_ROWS = 64
"""Prompts that keep a CPU busy: further members at once would only leave its caches
(measured: 16 members of 64 prompts each take 1.4 times as long at once as in turn).
Members with noise of low rank, whose products with the weights are one, gain nothing by
more either: of 64 prompts each, eight at once take 1.4 times as long as one."""

LONG_ANSWERS = 256
"""New tokens from which answers are expected to differ much in length."""


def give_back_freed_blocks() -> None:
    """Makes glibc return freed blocks, such as a member's layers, to the system.

    It raises the threshold for that by itself, up to 32 MB, and then keeps what is
    below: with a model of 0.5B parameters 4 GB in all. Does nothing elsewhere.
    """
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3  # in malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_threshold, MMAP_THRESHOLD)


def most_members(rows: int) -> int | None:
    """Members worth holding at once with `rows` prompts each; None for no limit."""
    return -(-CPU_ROWS // rows) if jax.default_backend() == "cpu" else None


def free_bytes() -> int:
    """Memory to plan with, on one accelerator or, without one, of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free //= jax.local_device_count()  # which share it
    return int(SHARE * free)


def growth(work: Callable[[], Any], devices: int = 1) -> int | None:
    """By how much memory in use grows while `work` runs, at its peak, on each device.

    Beyond what was there before, and what a first run of it leaves there for others.

    Args:
      work: gives arrays.
      devices: how many it keeps busy.

    Returns:
      Bytes; without an accelerator those of a second run, because the first compiles.
      None where the system does not say: an accelerator knows the highest peak since
      the start alone, which may lie before.
    """
    before = allocated()
    jax.block_until_ready(work())
    if before:
        pairs = zip(before, allocated(), strict=True)
        rises = [peak - now for (was, _), (peak, now) in pairs if peak > was]
        return max(rises, default=None)
    if jax.default_backend() != "cpu":
        return None
    try:
        start = start_of_growth()
        jax.block_until_ready(work())
        return (resident(peak=True) - start) // devices
    except OSError:
        return None


def allocated() -> list[tuple[int, int]]:
    """Bytes on each accelerator at most so far, and now; nothing where none says it."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("peak_bytes_in_use" in stats for stats in found):
        return []
    # What running programs have for themselves is in use, or reserved beside it.
    return [
        (
            stats["peak_bytes_in_use"] + stats.get("peak_bytes_reserved", 0),
            stats["bytes_in_use"] + stats.get("bytes_reserved", 0),
        )
        for stats in found
    ]


def start_of_growth() -> int:
    """Lets the peak of this process begin anew: the bytes of it in memory now.

    Raises:
      OSError: anywhere but on Linux.
    """
    gc.collect()
    time.sleep(0.1)  # a thread of the runtime may be about to free a result
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed would be there already
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since `start_of_growth`."""
    field = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def bytes_per_member(
    config: Any,
    weights: int,
    dtype: Any,
    rows: int,
    prompt: int,
    new: int,
    prefix: int = 0,
) -> int:
    """Estimate of what one member takes while it answers.

    Its weights, the cache, the activations of the widest layer over the prompts, and a
    few arrays of logits.

    Args:
      config: `ModelConfig`.
      weights: bytes of the weights that are its own: see `weight_bytes`.
      dtype: of the member's weights.
      rows, prompt, new: prompts, tokens of a padded prompt, new tokens.
      prefix: tokens that all prompts begin with, which count once.
    """
    size = jnp.dtype(dtype).itemsize
    heads, slots = config.num_attention_heads, prompt + new
    head_rows = config.num_key_value_heads * config.head_dim
    kept = 2 * rows * slots + prefix  # the cache is copied to make room, a prefix not
    cache = 2 * config.num_hidden_layers * kept * head_rows * size
    pairs = max(rows * prompt * (prefix + prompt), prefix * prefix)
    scores = 2 * heads * pairs * 4
    widest = 3 * config.intermediate_size + 4 * config.hidden_size
    hidden = max(rows * prompt, prefix) * widest * 4
    logits = 3 * rows * config.vocab_size * 4
    return weights + cache + max(scores, hidden) + logits


def weight_bytes(
    config: Any,
    parameters: int,
    dtype: Any,
    noise: Any = None,
    *,
    by_layer: bool = False,
) -> int:
    """Estimate of the bytes of weights that a member has for itself.

    Those of floats twice, stacked and by layer; or one layer, where noise is drawn
    `by_layer`; with noise of low rank, its factors twice. Of a quantised model, for
    which `noise` is given too, where its codes differ, and the floats of one matrix.
    """
    size = jnp.dtype(dtype).itemsize
    if by_layer:
        stacked = parameters - config.vocab_size * config.hidden_size
        return size * max(1, stacked // config.num_hidden_layers)
    if noise is None:
        return 2 * parameters * size
    if noise.rank:
        return 2 * noise.rank * _rows_and_columns(config) * size
    few = entries(parameters, noise.sigma, noise.rounds)
    matrix = config.intermediate_size * config.hidden_size
    return 6 * few + 2 * size * matrix


def _rows_and_columns(config: Any) -> int:
    """Of all matrices of a model together: the numbers in a member's factors a rank."""
    hidden, words = config.hidden_size, config.vocab_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    attention = 4 * hidden + heads * config.head_dim
    layer = attention + 3 * (hidden + config.intermediate_size)
    ends = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + ends * (hidden + words)


def rows_of_gradient(
    config: Any, parameters: int, prompt: int, new: int, *, budget: int
) -> int:
    """How many answers to take a gradient of at once; at least 1.

    An estimate: every layer's activations are kept for the way back, and four arrays
    of logits.

    Args:
      config: `ModelConfig`.
      parameters: number of weights; a gradient and two moments of them come on top.
      prompt, new: tokens of a padded prompt, new tokens.
      budget: bytes to spend.
    """
    tokens = prompt + new
    hidden = tokens * (3 * config.intermediate_size + 8 * config.hidden_size) * 4
    scores = 2 * config.num_attention_heads * tokens * tokens * 4
    logits = 4 * new * config.vocab_size * 4
    row = config.num_hidden_layers * (hidden + scores) + logits
    return max(1, (budget - 3 * 4 * parameters) // row)


def choose_chunk(*member: Any, population: int, budget: int) -> int:
    """How many members to hold at once.

    Args:
      *member: what a member is and does, the arguments of `bytes_per_member`.
      population: number of members.
      budget: bytes to spend on them.
    """
    rows = member[3]
    each = bytes_per_member(*member)
    return chunk_size(population, each, budget, most_members(rows))


def choose_slots(*member: Any, budget: int) -> int:
    """How many prompts a member answers at a time; 0 for all.

    All, where answers are short and their cache fits. Else a fourth of them, so that
    most of the time all slots are in use, and fewer where that does not fit.

    Args:
      *member: what a member is and does, the arguments of `bytes_per_member`.
      budget: bytes to spend on it.
    """
    rows, new = member[3], member[5]

    def fits(rows: int) -> bool:
        fewer: Any = (*member[:3], rows, *member[4:])
        return bytes_per_member(*fewer) <= budget

    if fits(rows) and new < LONG_ANSWERS:
        return 0
    slots = -(-rows // 4)
    if jax.default_backend() == "cpu":
        slots = min(slots, CPU_ROWS)
    while slots > 1 and not fits(slots):
        slots = -(-slots // 2)
    return slots if slots < rows else 0
