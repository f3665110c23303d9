"""What a task is: examples, a prompt for each, and a reward for any answer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Example = Mapping[str, Any]
"""One row of a data set."""

Prompt = str | list[dict[str, str]]
"""Raw text to be continued, or chat messages (`role`, `content`) for the model's chat
template; a last message of the assistant is a prefill, which the model continues."""


class Reward(NamedTuple):
    """The score of an answer. Those of the package never raise, whatever was written.

    Attributes:
      value: what ES maximises (the mean over prompts is a member's fitness).
      correct: whether the leniently extracted answer is right ("accuracy"); None where
        answers are graded and none is right or wrong.
      strict: whether it is right and in exactly the format that was asked for.
      formatted: whether the format is right, whatever the answer.
      yes: where the task asks for it, whether the model says that it knows the answer.
      parts: numbers by the names in `Task.parts`, to be logged.
    """

    value: float
    correct: bool | None = None
    strict: bool | None = None
    formatted: bool | None = None
    yes: bool | None = None
    parts: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples with their prompts and rewards; plain host-side functions of text.

    Attributes:
      name: as in `jes.tasks.TASKS`, or any other.
      train, test: examples to train on, and held out.
      prompt: the prompt of an example.
      reward: scores an answer, given the example and the text that the model wrote
        (without the prompt); with `meta`, given the answer to that as well.
      max_new_tokens: the length to which answers are cut.
      choices, answer: for tasks that can be scored by likelihood, the possible
        continuations of the prompt, and the index of the right one.
      meta: for tasks about knowledge, a second prompt, asked in a context of its own:
        does the model know the answer to the first?
      claims: the words that answer `meta`: yes, and no.
      rewards: scores texts [R] for examples [R] at once, in place of `reward`.
      parts: names of the `parts` of its rewards.
      source: the text that the reward was read from, part of a run's identity.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    prompt: Callable[[Example], Prompt]
    reward: Callable[..., Reward]
    max_new_tokens: int
    choices: Callable[[Example], Sequence[str]] | None = None
    answer: Callable[[Example], int] | None = None
    meta: Callable[[Example], Prompt] | None = None
    claims: tuple[str, str] | None = None
    rewards: Callable[..., Sequence[Reward]] | None = None
    parts: tuple[str, ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the examples of tasks come from, and how many are used.

    Attributes:
      root: folder of parquet files laid out as on the hub, for the package's tasks on
        public data; '' is the hub.
      train, test: rows of a task of one's own: a file (jsonl, json, csv, parquet), a
        folder, or a data set on the hub, 'owner/name[:config][:split]'.
      holdout: share of `train` that is held out where there is no `test`.
      train_examples, test_examples: how many are used; 0 for all.
    """

    root: str = ""
    train: str = ""
    test: str = ""
    holdout: float = 0.1
    train_examples: int = 0
    test_examples: int = 0
