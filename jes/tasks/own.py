"""Tasks from outside the package: a file or a module, rows, and a reward.

    mytask.py                 what it calls `task`, `load`, `rewards` or `reward`
    mytask.py:name            one of its names
    package.module:name       the same of a module that Python can import

What is found is a `Task`, a function that loads one (of nothing, `root` or `seed`), or
reward functions (see `jes.tasks.rewards`), whose rows come from `Data` and whose
prompts from a template over their columns.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import string
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from jes.errors import InputError
from jes.tasks.rewards import Rewarding, make_rewards, source_of
from jes.tasks.rows import read_data
from jes.tasks.task import Data, Example, Prompt, Task

NAMES = ("task", "load", "rewards", "reward")
"""What is looked for in a file, in this order."""
COLUMNS = ("prompt", "question")
"""Columns that are the prompt where no template is given."""
IN_PYTHON = "python:"
"""What the name of a task begins with that was given in Python, and is in no file."""
MAX_NEW_TOKENS = 256
LOADER = {"root", "seed"}
"""What a function that loads a task may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How the rows of one's own task become prompts, and how its rewards are called.

    Attributes:
      prompt: a template over the columns, such as 'Q: {question}', or the name of a
        column with text or chat messages; '' for a column of `COLUMNS`.
      system: a system message before it.
      chat: whether text becomes a chat message, as a model with a template expects.
      rewarding: how reward functions are called.
    """

    prompt: str = ""
    system: str = ""
    chat: bool = False
    rewarding: Rewarding = Rewarding()  # noqa: RUF009  frozen


class Given(NamedTuple):
    """What is given in Python: rewards or a `Task`, and rows; None where a name is."""

    what: Any = None
    train: Sequence[Example] | None = None
    test: Sequence[Example] | None = None


def is_own(name: str) -> bool:
    """Whether a name is that of a file or of something in a module."""
    return name.partition(":")[0].endswith(".py") or ":" in name


def own_task(
    name: str, data: Data, asking: Asking, seed: int = 0, given: Given | None = None
) -> Task:
    """The task that a name stands for, or that is given in its place.

    Raises:
      InputError: if the file, the rows, the template and the reward do not fit.
    """
    rows = given or Given()
    found, source = found_at(name) if rows.what is None else (rows.what, "")
    if callable(found) and is_loader(found):
        takes = inspect.signature(found).parameters
        values = {"root": data.root, "seed": seed}
        task = found(**{key: values[key] for key in takes})
        if not isinstance(task, Task):
            raise InputError(
                f"{name} loads {type(task).__name__}, which is no jes.Task"
            )
        found = task
    if isinstance(found, Task):
        if data.train or data.test or rows.train or rows.test:
            raise InputError(f"{name} has its own examples: leave data.train out")
        return dataclasses.replace(found, name=name, source=found.source or source)
    functions = list(found) if isinstance(found, list | tuple) else [found]
    source = source or "\n".join(map(source_of, functions))
    train, test = splits(name, data, rows.train, rows.test)
    prompt = prompt_of(asking, train[0])
    for number, row in enumerate([*train, *test]):
        try:
            prompt(row)
        except InputError as error:
            raise InputError(f"{name}: row {number}: {error}") from error
    rewards = make_rewards(functions, prompt, train[0], asking.rewarding)
    return Task(
        name=name,
        train=train,
        test=test,
        prompt=prompt,
        reward=lambda example, text: rewards([example], [text])[0],
        rewards=rewards,
        parts=rewards.parts,
        max_new_tokens=MAX_NEW_TOKENS,
        source=source,
    )


def found_at(name: str) -> tuple[Any, str]:
    """What a name stands for, and the text of its file.

    Raises:
      InputError: if there is no such file, module or name, or it cannot be imported.
    """
    if name.startswith(IN_PYTHON):
        raise InputError(f"{name} was given in Python, and cannot be found again")
    place, _, wanted = name.partition(":")
    module = imported(place)
    public = [key for key in vars(module) if not key.startswith("_")]
    defined = [
        key
        for key in public
        if getattr(getattr(module, key), "__module__", None) == module.__name__
        and inspect.isfunction(getattr(module, key))
    ]
    names = [wanted] if wanted else [key for key in NAMES if key in public]
    if not names and len(defined) == 1:
        names = defined
    if not names or not hasattr(module, names[0]):
        close = get_close_matches(wanted, public, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        what = repr(wanted) if wanted else f"any of {', '.join(NAMES)}"
        there = f"; it defines {', '.join(defined)}" if defined else ""
        raise InputError(f"{place} does not define {what}{hint or there}")
    file = getattr(module, "__file__", None)
    return getattr(module, names[0]), Path(file).read_text() if file else ""


def imported(place: str) -> ModuleType:
    """A module by its name, or the path of its file.

    Raises:
      InputError: with the line at fault, if it cannot be imported.
    """
    path = Path(place).expanduser()
    if place.endswith(".py") and not path.is_file():
        raise InputError(f"there is no file {place}")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        folder = str(path.resolve().parent)
        if folder not in sys.path:  # as for a script: it may import its neighbours
            sys.path.append(folder)
        # Under a name that is no other module's.
        spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # it is a program, and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        own = [one for one in frames if Path(one.filename).resolve() == path.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else None
        line = line or (own[-1].lineno if own else None)
        where = f"{place}, line {line}" if line else place
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def is_loader(found: Callable[..., Any]) -> bool:
    """Whether a function loads a task: it takes nothing, or what `LOADER` has."""
    return set(inspect.signature(found).parameters) <= LOADER


def splits(
    name: str,
    data: Data,
    train: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Rows to train on and held out: those of `data`, where none are given.

    What is held out of the rows to train on is the same for all seeds of a run.
    """
    if train is None and not data.train:
        raise InputError(
            f"{name} is a reward: say where its rows are, with "
            "--config.data.train=FILE (jsonl, json, csv, parquet, a folder, a hub id)"
        )
    rows = list(read_data(data.train) if train is None else train)
    other = list(read_data(data.test) if test is None and data.test else test or [])
    for number, row in enumerate([*rows, *other]):
        if not isinstance(row, Mapping):
            raise InputError(f"{name}: row {number} is no object of columns: {row!r}")
    if not rows:
        raise InputError(f"{data.train or name}: there are no rows")
    if other:
        return rows, other
    if not 0 < data.holdout < 1:
        raise InputError(
            f"data.holdout is a share between 0 and 1, not {data.holdout:g}: without "
            "data.test, nothing would be held out"
        )
    count = round(data.holdout * len(rows)) or 1
    if count >= len(rows):
        raise InputError(f"{name}: {len(rows)} rows are too few to hold some out")
    drawn = np.random.default_rng(0).permutation(len(rows))
    held = set(drawn[:count].tolist())
    return (
        [row for number, row in enumerate(rows) if number not in held],
        [rows[number] for number in sorted(held)],
    )


def prompt_of(asking: Asking, row: Example) -> Callable[[Example], Prompt]:
    """The prompt of rows like this one.

    Raises:
      InputError: if the template names what is no column, or a system message has no
        chat template to go in.
    """
    template = asking.prompt.replace("\\n", "\n")
    template = template or next((name for name in COLUMNS if name in row), "")
    if not template:
        raise InputError(
            "say what the prompt is, with --config.prompt='{column} ...': the columns "
            f"are {', '.join(map(str, row))}"
        )
    if asking.system and not asking.chat:
        raise InputError(
            "system is for models with a chat template, and this one has none: put it "
            "into the prompt"
        )
    column = template if template in row else ""
    if not column and "{" not in template:
        raise InputError(
            f"prompt={template!r} is no column and no template such as "
            f"'{{{next(iter(row))}}}'"
        )
    head = [{"role": "system", "content": asking.system}] if asking.system else []

    def prompt(example: Example) -> Prompt:
        given = example.get(column) if column else filled(template, example)
        if isinstance(given, str):
            message = {"role": "user", "content": given}
            return [*head, message] if asking.chat else given
        if not _is_chat(given):
            raise InputError(f"{column!r} is neither text nor chat messages: {given!r}")
        messages = [{key: one[key] for key in ("role", "content")} for one in given]
        return [*head, *messages]

    return prompt


def filled(template: str, example: Example) -> str:
    """The template with the columns of an example, none of which may be null."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        for name in names:
            if example[name.partition(".")[0].partition("[")[0]] is None:
                raise InputError(f"{name!r}, which the prompt needs, is null")
        return template.format_map(example)
    except KeyError as error:
        there = ", ".join(map(str, example))
        raise InputError(
            f"the prompt needs {error}, and the columns are {there}"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"prompt={template!r}: {error}") from None


def _is_chat(given: Any) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether a value is a list of chat messages."""
    return (
        isinstance(given, Sequence)
        and len(given) > 0
        and all(
            isinstance(one, Mapping)
            and isinstance(one.get("role"), str)
            and isinstance(one.get("content"), str)
            for one in given
        )
    )
