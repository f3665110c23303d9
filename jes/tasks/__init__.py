"""The tasks by name."""

import dataclasses
from collections.abc import Callable
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


def _of_data(load: Callable[[str], Task]) -> Callable[..., Task]:
    return lambda root, seed: load(root)


def _tiny(name: str) -> Callable[..., Task]:
    return lambda root, seed: tiny_task(name, seed)


TASKS: dict[str, Callable[..., Task]] = {
    **{
        name: _of_data(partial(multiple_choice.load, name))
        for name in multiple_choice.KINDS
    },
    "conciseness": _of_data(conciseness.load),
    "countdown": _of_data(countdown.load),
    "gsm8k": _of_data(gsm8k.load),
    "proofwriter": _of_data(proofwriter.load),
    **{
        name: _of_data(partial(open_questions.load, name))
        for name in open_questions.OPEN_TASKS
    },
    **{name: _tiny(name) for name in TINY_TASKS},
}
"""Name of a task -> function of `root` and `seed` that loads it."""


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
        raise InputError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    task = TASKS[name](root=root, seed=seed)
    return dataclasses.replace(
        task, train=task.train[: train or None], test=task.test[: test or None]
    )


__all__ = ["TASKS", "Example", "Prompt", "Reward", "Task", "load_task"]
