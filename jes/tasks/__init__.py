"""The tasks by name; one file each, or a table of those that differ in their rows."""

import dataclasses
from collections.abc import Callable
from functools import partial

from jes.errors import InputError
from jes.tasks import (
    arc_c,
    arc_c_cot,
    conciseness,
    countdown,
    gsm8k,
    hellaswag,
    mmlu_pro,
    open_questions,
    piqa,
    proofwriter,
    winogrande,
)
from jes.tasks.task import Example, Prompt, Reward, Task
from jes.tasks.tiny import TINY_TASKS, tiny_task


def _tiny(name: str, root: str, seed: int) -> Task:
    del root  # drawn, not read
    return tiny_task(name, seed)


TASKS: dict[str, Callable[..., Task]] = {
    "arc_c": arc_c.load,
    "arc_c_cot": arc_c_cot.load,
    "conciseness": conciseness.load,
    "countdown": countdown.load,
    "gsm8k": gsm8k.load,
    "hellaswag": hellaswag.load,
    "mmlu_pro": mmlu_pro.load,
    "piqa": piqa.load,
    "proofwriter": proofwriter.load,
    "winogrande": winogrande.load,
    **{name: partial(open_questions.load, name) for name in open_questions.OPEN_TASKS},
    **{name: partial(_tiny, name) for name in TINY_TASKS},
}
"""Name of a task -> function of (root, seed) that loads it."""


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
      InputError: for an unknown name or data that cannot be had.
    """
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    task = TASKS[name](root=root, seed=seed)
    return dataclasses.replace(
        task, train=task.train[: train or None], test=task.test[: test or None]
    )


__all__ = ["TASKS", "Example", "Prompt", "Reward", "Task", "load_task"]
