"""How a model is examined on a task: the settings, and the questions as tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jes.errors import InputError
from jes.sampling.generate import GREEDY, Sampling
from jes.sampling.likelihood import pad_choices
from jes.sampling.prompts import BUCKETS, PromptBatch, encode, share
from jes.tasks.task import Example, Task

MODES = ("generate", "likelihood")
DRAWS = ("member", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model is examined on a task.

    Attributes:
      model, tokenizer: from `jes.load`.
      task: its prompts and rewards.
      eos_ids: tokens that end an answer.
      mode: 'generate' rewards the generated text; 'likelihood' takes the choice with
        the highest log-likelihood per token as the answer.
      dtype: of the weights that answer. The centre stays in float32 (its master),
        because an ES step is smaller than half a bfloat16 ulp of a typical weight.
      max_new_tokens: longest answer; by default the task's.
      sampling: how the next token is chosen.
      buckets: prompt lengths to pad to.
      draw: when a member's noise is drawn: 'member', all of it before it answers; or
        'layer', again for every pass through a layer, so that of all members' weights
        one layer is there at a time. The numbers are the same.
      parts: lengths to pad what prompts share and the rest to, as for `prompts.share`:
        None for `buckets`, () to compute every prompt in full.
      slots: prompts that a member answers at a time, see
        `jes.sampling.continuous_batching`; 0 for all, until the longest has ended.
      slice_tokens: most tokens until the host sees to slots that are free.
    """

    model: Any
    tokenizer: Any
    task: Task
    eos_ids: tuple[int, ...]
    mode: str = "generate"
    dtype: Any = jnp.float32
    max_new_tokens: int = 0
    sampling: Sampling = GREEDY
    buckets: tuple[int, ...] = BUCKETS
    draw: str = "member"
    parts: tuple[int, ...] | None = None
    slots: int = 0
    slice_tokens: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {MODES}, not {self.mode!r}")
        if self.draw not in DRAWS:
            raise InputError(f"draw must be one of {DRAWS}, not {self.draw!r}")
        if self.mode == "likelihood" and self.task.meta is not None:
            raise InputError(
                f"task {self.task.name} asks two questions, whose answers must be "
                "generated: use mode 'generate'"
            )
        if self.mode == "likelihood" and self.task.choices is None:
            raise InputError(
                f"task {self.task.name} has no choices: use mode 'generate'"
            )
        if not self.max_new_tokens:
            object.__setattr__(self, "max_new_tokens", self.task.max_new_tokens)


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
            choices = [encode(tokenizer, choice) for choice in task.choices(example)]
        meta = () if task.meta is None else encode(tokenizer, task.meta(example))
        questions.append(Question(example, prompt, choices, meta))
        length = longest(questions[-1:])
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
    """Tokens of what all prompts share, 0 for nothing, and of the rest, both padded."""
    if evaluation.mode == "likelihood":
        choices = [question.choices for question in questions]
        prompts = [question.prompt for question in questions]
        batch = pad_choices(prompts, choices, evaluation.buckets, evaluation.parts)
        prefix, rest = batch.prefix, batch.rows
    else:
        prefix, rest = split_prompts(evaluation, questions)
    return 0 if prefix is None else prefix.tokens.shape[1], rest.tokens.shape[1]


def split_prompts(
    evaluation: Evaluation, questions: Sequence[Question]
) -> tuple[PromptBatch | None, PromptBatch]:
    """What the prompts have in common, and the rest of all first, then all second."""
    prompts = [question.prompt for question in questions]
    if evaluation.task.meta is not None:
        prompts += [list(question.meta) for question in questions]
    return share(prompts, evaluation.buckets, parts=evaluation.parts)
