"""Prompts as arrays: rendered by the tokenizer, left-padded to a few fixed lengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Default prompt lengths: few enough to compile each once, close enough to waste
little (padding costs as much as text)."""


class PromptBatch(NamedTuple):
    """Left-padded prompts.

    Attributes:
      tokens: int32 [B, T].
      positions: int32 [B, T]: 0, 1, ... from a row's first token on, -1 before it.
    """

    tokens: np.ndarray
    positions: np.ndarray


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt.

    A string is fed as it stands; messages go through the tokenizer's chat template,
    with the header of an answer added, or the last message continued where it is the
    assistant's (a prefill). Thinking is turned off in templates that offer it
    (Qwen3's), as in 2602.02605: short answers have no room for it.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt, add_special_tokens=False))
    prefilled = prompt[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        prompt,
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        return_dict=False,
        enable_thinking=False,
    )
    return list(ids)


def pad(
    prompts: Sequence[Sequence[int]], buckets: Sequence[int] = BUCKETS
) -> PromptBatch:
    """Pads prompts on the left to the shortest bucket that holds them all.

    Raises:
      ValueError: if a prompt is empty, or longer than the longest bucket.
    """
    lengths = [len(p) for p in prompts]
    if not min(lengths, default=0):
        raise ValueError("a prompt is empty: there is nothing to continue")
    width = min((b for b in buckets if b >= max(lengths)), default=None)
    if width is None:
        raise ValueError(
            f"prompt {int(np.argmax(lengths))} has {max(lengths)} tokens, more than "
            f"the longest bucket ({max(buckets)}); add a longer one to `buckets`"
        )
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    positions = np.arange(width) - (width - np.array(lengths)[:, None])
    return PromptBatch(tokens, np.maximum(positions, -1).astype(np.int32))
