"""What a task is: examples, a prompt for each, and a reward for any answer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Example = Mapping[str, Any]
"""One row of a data set."""

Prompt = str | list[dict[str, str]]
"""Text to be continued as it stands, or chat messages (`role`, `content`) for the
model's chat template; a last message of the assistant is a prefill to be continued."""


class Reward(NamedTuple):
    """What an answer earns. Rewards never raise, whatever the model wrote.

    Attributes:
      value: what ES maximises (the mean over prompts is a member's fitness).
      correct: whether the leniently extracted answer is right ("accuracy").
      strict: whether it is right and in exactly the format that was asked for.
      formatted: whether the format is right, whatever the answer.
      yes: where the task asks for it, whether the model says that it knows the answer.
    """

    value: float
    correct: bool
    strict: bool
    formatted: bool
    yes: bool | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples with their prompts and rewards; plain host-side functions of text.

    Attributes:
      name: as in `jes.tasks.TASKS`.
      train, test: examples to train on, and held out.
      prompt: what the model is asked.
      reward: scores the text that the model answers with (the completion alone);
        takes an example and the text, and with `meta` a second text.
      max_new_tokens: room for an answer.
      choices, answer: for tasks that can be scored by likelihood, the possible
        continuations of the prompt, and the index of the right one.
      meta: for tasks that ask about knowledge, a second prompt, which asks whether the
        model knows the answer to the first. It is asked in a context of its own.
      claims: the words that `meta` is answered by: yes, and no.
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
