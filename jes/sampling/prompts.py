"""Prompts as arrays: rendered by the tokenizer, left-padded to a few fixed lengths.

`share` takes out what all prompts of a batch begin with (a system text, worked
examples), and `batches` puts prompts together that share.
"""

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np

from jes.errors import InputError

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Default prompt lengths: few to compile, close enough to waste little on padding."""
TEMPLATE_KWARGS = "jes_template_kwargs"
"""Attribute of a tokenizer: what its chat template is called with, beside messages."""
SHORTEST = 16
"""Fewest tokens that are worth sharing."""
MOST = 0.75
"""Sharing must leave at most this part of the tokens, to pay for a second pass."""
STEP = 8
"""Shared tokens, and rows of a family, are multiples of this: few shapes to compile."""
IDLE_ROWS = 64
"""A step of fewer rows takes as long as one of so many: it is bound by the weights."""


class PromptBatch(NamedTuple):
    """Left-padded prompts.

    Attributes:
      tokens: int32 [B, T].
      positions: int32 [B, T]: 0, 1, ... from a row's first token on (or what follows
        the prefix), -1 before it.
      prefix: one row that all prompts begin with, left out of `tokens`; None where
        nothing is shared.
    """

    tokens: np.ndarray
    positions: np.ndarray
    prefix: "PromptBatch | None" = None

    @property
    def next_position(self) -> np.ndarray:
        """Of the token that follows each prompt: int32 [B, 1]."""
        return self.positions[:, -1:] + 1


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt.

    A string is fed as it stands, after the token that begins texts where the model was
    trained with one (Llama); messages go through the tokenizer's chat template, and a
    last one of the assistant's is continued (a prefill). Thinking is turned off in
    templates that offer it (Qwen3's), as in 2602.02605: short answers have no room;
    `jes_template_kwargs` of the tokenizer is passed on too.

    Raises:
      InputError: if there is no chat template, or it refuses the messages.
    """
    if isinstance(prompt, str):
        ids = encode_continuation(tokenizer, prompt)
        begin = tokenizer.bos_token_id
        begins = begin is not None and tokenizer.encode(prompt)[:1] == [begin]
        return ids if not begins or ids[:1] == [begin] else [begin, *ids]
    if not tokenizer.chat_template:
        raise InputError(
            "this model has no chat template (is it a base model?), and the task asks "
            "with chat messages: give a template with --config.chat_template=FILE"
        )
    prefilled = prompt[-1]["role"] == "assistant"
    settings = {"enable_thinking": False, **getattr(tokenizer, TEMPLATE_KWARGS, {})}
    try:
        ids = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            return_dict=False,
            **settings,
        )
    except Exception as error:  # a template is a program, and may raise anything
        roles = ", ".join(message["role"] for message in prompt)
        raise InputError(
            f"the model's chat template refuses messages of {roles}: {error}"
        ) from error
    return list(ids)


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that follows a prompt."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def pad(
    prompts: Sequence[Sequence[int]],
    buckets: Sequence[int] = BUCKETS,
    *,
    first: int = 0,
) -> PromptBatch:
    """Pads prompts on the left to the shortest bucket that holds them all.

    `first` is the position of their first tokens.

    Raises:
      ValueError: if a prompt is empty, or longer than the longest bucket.
    """
    check_lengths(prompts, buckets)
    lengths = [len(p) for p in prompts]
    width = bucket(max(lengths), buckets)
    tokens = np.array([[0] * (width - len(p)) + list(p) for p in prompts], np.int32)
    numbers = np.arange(width) - (width - np.array(lengths)[:, None])
    positions = np.where(numbers < 0, -1, numbers + first)
    return PromptBatch(tokens, positions.astype(np.int32))


def check_lengths(prompts: Sequence[Sequence[int]], buckets: Sequence[int]) -> None:
    """Raises as `pad`."""
    lengths = [len(p) for p in prompts]
    if not min(lengths, default=0):
        raise ValueError("a prompt is empty: there is nothing to continue")
    if max(lengths) > max(buckets):
        raise ValueError(
            f"prompt {int(np.argmax(lengths))} has {max(lengths)} tokens, more than "
            f"the longest bucket ({max(buckets)}); add a longer one to `buckets`"
        )


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The shortest bucket that holds a length; the length where none does."""
    return min((b for b in buckets if b >= length), default=length)


def share(
    prompts: Sequence[Sequence[int]],
    buckets: Sequence[int] = BUCKETS,
    *,
    parts: Sequence[int] | None = None,
) -> PromptBatch:
    """Prompts as a batch, with their common prefix apart where that saves tokens.

    Args:
      prompts: token ids.
      buckets: lengths to pad whole prompts to.
      parts: lengths to pad the prefix and the rest to; None for `buckets`, () to share
        nothing.

    Raises:
      ValueError: as `pad`.
    """
    prefix, count = common_prefix(prompts, buckets, parts)
    if prefix is None:
        return pad(prompts, buckets)
    parts = buckets if parts is None else parts
    rest = pad([prompt[count:] for prompt in prompts], parts, first=count)
    return rest._replace(prefix=prefix)


def common_prefix(
    prompts: Sequence[Sequence[int]],
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = None,
) -> tuple[PromptBatch | None, int]:
    """What all prompts begin with where reading it once saves tokens, and its length.

    Arguments and errors are those of `share`.
    """
    check_lengths(prompts, buckets)
    parts = buckets if parts is None else parts
    lengths = [len(prompt) for prompt in prompts]
    # What the least and the greatest in the order of lists agree in, all do.
    common = agreement(min(prompts, key=tuple), max(prompts, key=tuple))
    common = min(common, min(lengths) - 1)
    count, _ = prefix_to_share(lengths, common, len(prompts), buckets, parts)
    return (pad([prompts[0][:count]], parts) if count else None), count


def prefix_to_share(
    lengths: Sequence[int],
    common: int,
    rows: int,
    buckets: Sequence[int],
    parts: Sequence[int],
) -> tuple[int, int]:
    """How many common tokens a batch shares, and its size in padded tokens.

    Prompts of these lengths all begin with, and can spare, `common` tokens.
    """
    longest = max(lengths)
    whole = rows * bucket(longest, buckets)
    count = min(common, max(parts, default=0))
    count = count - count % STEP if count >= SHORTEST else 0
    if not count or longest - count > max(parts):
        return 0, whole
    less = bucket(count, parts) + rows * bucket(longest - count, parts)
    return (count, less) if less <= MOST * whole else (0, whole)


def agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two prompts."""
    return sum(takewhile(bool, map(operator.eq, first, second)))


def batches(
    prompts: Sequence[Sequence[int]],
    size: int,
    new_tokens: int,
    buckets: Sequence[int] = BUCKETS,
    parts: Sequence[int] | None = None,
) -> list[tuple[list[int], int]]:
    """Which prompts to answer together, so that the fewest tokens are computed.

    Prompts of similar length; or, where that is less, those of one family, found by
    cutting the prompts in the order of lists where neighbours share less than a bucket.

    Args:
      prompts: token ids.
      size: most prompts of a batch.
      new_tokens: that are generated for each.
      buckets, parts: lengths to pad to, as for `share`.

    Returns:
      For each batch the numbers of its prompts, by length, and of rows to fill up to.
    """
    parts = buckets if parts is None else parts
    ordered = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    shared = [agreement(prompts[i], prompts[j]) for i, j in pairwise(ordered)]
    best, least_work = [], np.inf
    for least in (0, *(b for b in sorted(parts) if b >= SHORTEST)):
        plan, work = [], 0
        for family, common in _families(ordered, shared, least):
            rows = min(size, len(family))
            if len(family) < len(prompts):  # even parts, and again few shapes
                rows = -(-len(family) // -(-len(family) // size))
                rows = min(size, rows + -rows % STEP)
            family.sort(key=lambda i: (len(prompts[i]), i))
            for start in range(0, len(family), rows):
                chosen = family[start : start + rows]
                plan.append((chosen, rows))
                lengths = [len(prompts[i]) for i in chosen]
                spare = min(common, min(lengths) - 1)
                _, tokens = prefix_to_share(lengths, spare, rows, buckets, parts)
                work += tokens + max(rows, IDLE_ROWS) * new_tokens
        if work < least_work:
            best, least_work = plan, work
    return best


def _families(
    ordered: Sequence[int], shared: Sequence[int], least: int
) -> Iterator[tuple[list[int], int]]:
    """Prompts that each share `least` tokens with the next, and how many all share."""
    start = 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or shared[stop - 1] < least:
            yield list(ordered[start:stop]), min(shared[start : stop - 1], default=0)
            start = stop
