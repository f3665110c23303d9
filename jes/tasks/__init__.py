"""The tasks by name."""

import dataclasses
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from jes.errors import InputError
from jes.tasks import (
    conciseness,
    countdown,
    gsm8k,
    multiple_choice,
    open_questions,
    proofwriter,
)
from jes.tasks.task import Example, Prompt, Reward, Task
from jes.tasks.tiny import TINY_TASKS, tiny_task

TASKS: dict[str, Callable[..., Task]] = {
    **{name: partial(multiple_choice.load, name) for name in multiple_choice.KINDS},
    "conciseness": conciseness.load,
    "countdown": countdown.load,
    "gsm8k": gsm8k.load,
    "proofwriter": proofwriter.load,
    **{name: partial(open_questions.load, name) for name in open_questions.OPEN_TASKS},
    **{name: partial(tiny_task, name) for name in TINY_TASKS},
}
"""Name of a task -> function of `root`, or of `seed` for tiny tasks, that loads it."""


def load_task(
    name: str, *, root: str = "", seed: int = 0, train: int = 0, test: int = 0
) -> Task:
    """Loads a task, with its first `train` and `test` examples (0 for all).

    Args:
      name: a name in `TASKS`.
      root: folder of parquet files for tasks on public data; '' for the hub.
      seed: for tasks whose examples are drawn.
      train, test: how many examples to keep.

    Raises:
      InputError: for an unknown name or data that cannot be read.
    """
    if name not in TASKS:
        close = get_close_matches(name, TASKS, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]!r}? There" if close else "there"
        raise InputError(f"there is no task {name!r}; {hint} are {', '.join(TASKS)}")
    task = TASKS[name](seed) if name in TINY_TASKS else TASKS[name](root)
    return dataclasses.replace(
        task, train=task.train[: train or None], test=task.test[: test or None]
    )


__all__ = ["TASKS", "Example", "Prompt", "Reward", "Task", "load_task"]
