"""How a model is evaluated on a task, and the task's questions as tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jes.errors import InputError
from jes.sampling.generate import Sampling
from jes.sampling.likelihood import Choices, pack_choices, shape_of_choices
from jes.sampling.packing import Packed, Shape, pack_prompts, shape_of_prompts
from jes.sampling.prompts import (
    BUCKETS,
    PromptBatch,
    encode,
    encode_continuation,
    share,
)
from jes.tasks.task import Example, Task

Batch = Packed | PromptBatch | Choices
"""Questions as tokens: prompts, or prompts with choices."""
MODES = ("generate", "likelihood")
DRAWS = ("member", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model is evaluated on a task.

    Attributes:
      model, tokenizer: from `jes.load`.
      task: its prompts and rewards.
      sampling: how answers are generated; for at most the task's `max_new_tokens`
        where it sets none.
      mode: 'generate' rewards the generated text; 'likelihood' takes the choice with
        the highest log-likelihood per token as the answer.
      dtype: of the weights that answer; those that are trained stay in float32.
      buckets: prompt lengths to pad to.
      draw: when noise of full rank is drawn: 'member', all of it before a member
        answers; 'layer', again in every pass through a layer, to hold one layer only.
      parts: lengths to pad a common prefix and the rest of the prompts to: None for
        `buckets`, () to compute every prompt in full.
      shape: that all batches are packed to; None for that of each.
      slots: prompts that a member answers at a time by continuous batching; 0 for all.
      slice_tokens: of continuous batching, most tokens between two looks of the host.
    """

    model: Any
    tokenizer: Any
    task: Task
    sampling: Sampling
    mode: str = "generate"
    dtype: Any = jnp.float32
    buckets: tuple[int, ...] = BUCKETS
    draw: str = "member"
    parts: tuple[int, ...] | None = None
    shape: Shape | None = None
    slots: int = 0
    slice_tokens: int = 32

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("draw", DRAWS)):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} must be one of {allowed}, not {value!r}")
        task = f"task {self.task.name}"
        if self.mode == "likelihood" and self.task.meta is not None:
            both = "asks two questions, whose answers must be generated"
            raise InputError(f"{task} {both}: use mode 'generate'")
        if self.mode == "likelihood" and self.task.choices is None:
            raise InputError(f"{task} has no choices: use mode 'generate'")
        if not self.max_new_tokens:
            new = self.task.max_new_tokens
            sampling = dataclasses.replace(self.sampling, max_new_tokens=new)
            object.__setattr__(self, "sampling", sampling)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.sampling.eos_ids

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""
        return self.sampling.max_new_tokens


class Question(NamedTuple):
    """An example as token ids; `meta` is empty where the task asks nothing more."""

    example: Example
    prompt: list[int]
    choices: list[list[int]]
    meta: Sequence[int] = ()


def prepare(evaluation: Evaluation, examples: Sequence[Example]) -> list[Question]:
    """Renders and encodes examples.

    Raises:
      InputError: for a prompt that no bucket holds.
    """
    task, tokenizer = evaluation.task, evaluation.tokenizer
    questions = []
    for number, example in enumerate(examples):
        prompt = encode(tokenizer, task.prompt(example))
        choices: list[list[int]] = []
        if evaluation.mode == "likelihood" and task.choices is not None:
            choices = [
                encode_continuation(tokenizer, choice)
                for choice in task.choices(example)
            ]
        meta = () if task.meta is None else encode(tokenizer, task.meta(example))
        questions.append(Question(example, prompt, choices, meta))
        length = len(longest_text(questions[-1]))
        if length > max(evaluation.buckets):
            raise InputError(
                f"{task.name}: the prompt of example {number} has {length} tokens, "
                f"more than the longest bucket ({max(evaluation.buckets)}): add a "
                "longer one to `buckets`, or leave such examples out"
            )
    return questions


def longest(questions: Sequence[Question]) -> int:
    """Tokens of the longest prompt, with its longest choice."""
    return max(len(longest_text(question)) for question in questions)


def longest_text(question: Question) -> list[int]:
    """The longer of its two prompts, or the prompt with its longest choice."""
    text = [*question.prompt, *max(question.choices, key=len, default=[])]
    return max(text, list(question.meta), key=len)


def padded_lengths(
    evaluation: Evaluation, questions: Sequence[Question]
) -> tuple[int, int]:
    """Tokens of the common prefix, 0 for none, and of the rest, both padded."""
    prompts = prompts_of(evaluation, questions)
    batch = share(prompts, evaluation.buckets, parts=evaluation.parts)
    prefix = 0 if batch.prefix is None else batch.prefix.tokens.shape[1]
    return prefix, batch.tokens.shape[1]


def prompts_of(
    evaluation: Evaluation, questions: Sequence[Question]
) -> list[list[int]]:
    """All prompts; then, where the task has second ones, all of these."""
    prompts = [question.prompt for question in questions]
    if evaluation.task.meta is not None:
        prompts += [list(question.meta) for question in questions]
    return prompts


def batch_of(
    evaluation: Evaluation, questions: Sequence[Question], size: int = 0
) -> Batch:
    """Questions as a batch of prompts; in mode 'likelihood', of prompts with choices.

    All prompts first, then, where the task has second ones, all of these. The last
    question is repeated up to `size`, for one shape of all batches.
    """
    filled = [*questions, *[questions[-1]] * (size - len(questions))]
    prompts = prompts_of(evaluation, filled)
    lengths = evaluation.buckets, evaluation.parts
    if evaluation.mode == "likelihood":
        choices = [question.choices for question in filled]
        return pack_choices(prompts, choices, *lengths, evaluation.shape)
    if 0 < evaluation.slots < len(prompts):
        return share(prompts, lengths[0], parts=lengths[1])
    asks = 1 if evaluation.task.meta is None else 2
    return pack_prompts(prompts, *lengths, asks=asks, shape=evaluation.shape)


def rows_of(batch: Batch) -> int:
    """How many prompts each member answers."""
    if isinstance(batch, Choices):
        return len(batch.lengths)
    return len(batch.next_position)


def texts_in(batch: Batch) -> Packed | PromptBatch:
    """What of a batch is read."""
    return batch.texts if isinstance(batch, Choices) else batch


def shape_for(evaluation: Evaluation, batches: Sequence[Sequence[Question]]) -> Shape:
    """The shape to pack each of some batches of questions to."""
    lengths = evaluation.buckets, evaluation.parts
    if evaluation.mode == "likelihood":
        choices = [[question.choices for question in batch] for batch in batches]
        prompts = [[question.prompt for question in batch] for batch in batches]
        return shape_of_choices([*zip(prompts, choices, strict=True)], *lengths)
    asks = 1 if evaluation.task.meta is None else 2
    texts = [prompts_of(evaluation, batch) for batch in batches]
    return shape_of_prompts(texts, *lengths, asks=asks)
