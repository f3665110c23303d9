"""The tasks by name."""

import dataclasses
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from jes.errors import InputError
from jes.tasks import (
    conciseness,
    countdown,
    gsm8k,
    multiple_choice,
    open_questions,
    proofwriter,
)
from jes.tasks.own import Asking, Given, is_own, own_task
from jes.tasks.rewards import Rewarding
from jes.tasks.task import Data, Example, Prompt, Reward, Task
from jes.tasks.tiny import TINY_TASKS, tiny_task

TASKS: dict[str, Callable[..., Task]] = {
    **{name: partial(multiple_choice.load, name) for name in multiple_choice.KINDS},
    **{
        f"{name}/published": partial(multiple_choice.load, name, published=True)
        for name in ("arc_c_cot", "hellaswag", "piqa", "mmlu_pro")
    },
    "gsm8k/published": partial(gsm8k.load, published=True),
    "conciseness": conciseness.load,
    "countdown": countdown.load,
    "gsm8k": gsm8k.load,
    "proofwriter": proofwriter.load,
    **{name: partial(open_questions.load, name) for name in open_questions.OPEN_TASKS},
    **{name: partial(tiny_task, name) for name in TINY_TASKS},
}
"""Name of a task -> function of `root`, or of `seed` for tiny tasks, that loads it."""


def load_task(
    name: str,
    *,
    seed: int = 0,
    asking: Asking = Asking(),  # noqa: B008  frozen
    given: Given | None = None,
    **data: Any,
) -> Task:
    """Loads a task, with its first examples.

    Args:
      name: a name in `TASKS`, or a file or module, see `jes.tasks.own`.
      seed: for tasks whose examples are drawn.
      asking: how a task of one's own asks.
      given: such a task, in place of what the name stands for.
      data: the fields of `Data`.

    Raises:
      InputError: for an unknown name or data that cannot be read.
    """
    source = Data(**data)
    if (given is not None and given.what is not None) or is_own(name):
        task = own_task(name, source, asking, seed, given)
    elif name not in TASKS:
        close = get_close_matches(name, TASKS, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]!r}? There" if close else "there"
        groups = dict.fromkeys(re.sub("/.*", "/...", known) for known in TASKS)
        raise InputError(
            f"there is no task {name!r}; {hint} are {', '.join(groups)}; or give a "
            "file of your own, mytask.py"
        )
    elif given or source.train or source.test or asking.prompt or asking.system:
        raise InputError(
            f"data.train, data.test, prompt and system are for tasks of your own: "
            f"{name} has its examples and its prompts"
        )
    else:
        own = {"seed": seed} if name in TINY_TASKS else {"root": source.root}
        task = TASKS[name](**own)
    return dataclasses.replace(
        task,
        train=task.train[: source.train_examples or None],
        test=task.test[: source.test_examples or None],
    )


__all__ = [
    "TASKS",
    "Asking",
    "Data",
    "Example",
    "Given",
    "Prompt",
    "Reward",
    "Rewarding",
    "Task",
    "load_task",
]
