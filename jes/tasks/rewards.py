"""Reward functions of users: the forms they may have, and how they are called.

    def reward(answer): ...                           # any name, any of these forms
    def reward(answer, row): ...
    async def reward(answer, row): ...                # many answers wait together
    def reward(prompts, completions, **columns): ...  # that of TRL: a list of numbers

A reward is a number, a bool (which also says whether the answer is right), a `Reward`,
or a dict of named numbers, of which `correct` says the same. Several functions, or
names, are added up by weights.
"""

import asyncio
import dataclasses
import inspect
import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from jes.errors import InputError
from jes.tasks.task import Example, Prompt, Reward

ERRORS = "errors"
"""Name of the part that counts what failed, where failures count as 0."""
SHOWN = 300
"""Characters of an answer or a row in a message."""


class RewardError(InputError):
    """A reward function raised, took too long, or returned what is no reward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarding:
    """How reward functions are called.

    Attributes:
      weights: of named rewards, 'name=number,...'; 1 for a name that is not there.
      errors: 'stop' raises `RewardError`; 'zero' scores the answer 0 and counts it.
      timeout: seconds for an answer (or a batch, in TRL's form); 0 for no limit.
      concurrency: answers that an `async` function scores at a time.
    """

    weights: str = ""
    errors: str = "stop"
    timeout: float = 60.0
    concurrency: int = 16


class Function(NamedTuple):
    """A reward function and what it is called with.

    `takes` is ('answer',), ('answer', 'row'), or what TRL's form takes of 'prompts',
    'completions' and the columns, where '*' are all columns.
    """

    name: str
    call: Callable[..., Any]
    takes: tuple[str, ...]


def function_of(call: Any) -> Function:
    """Recognises the form of a reward function by its parameters.

    Raises:
      InputError: if it has none of them.
    """
    name = getattr(call, "__name__", type(call).__name__)
    if not callable(call):
        raise InputError(f"{name} is no function, which a reward must be")
    signature = inspect.signature(call)
    names = {one.name: one.kind for one in signature.parameters.values()}
    if "completions" in names:
        every = inspect.Parameter.VAR_KEYWORD
        columns = ("*" if kind is every else one for one, kind in names.items())
        return Function(name, call, tuple(columns))
    for takes in (("answer", "row"), ("answer",)):
        with suppress(TypeError):
            signature.bind(*takes)
            return Function(name, call, takes)
    raise InputError(
        f"{name}{signature} is no reward function: it must take (answer), (answer, "
        "row), or as in TRL (prompts, completions, **columns)"
    )


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Scores answers by one function or several: the `rewards` of a `Task`.

    Attributes:
      functions: in order.
      prompt: of the task, which functions in TRL's form see.
      settings: how they are called.
      names: of the numbers that are added up; none for one function of one number.
    """

    functions: tuple[Function, ...]
    prompt: Callable[[Example], Prompt]
    settings: Rewarding
    names: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the `parts` of each reward."""
        return self.names + (ERRORS,) * (self.settings.errors == "zero")

    def __call__(
        self, examples: Sequence[Example], texts: Sequence[str]
    ) -> list[Reward]:
        """Rewards of answers to examples.

        Raises:
          RewardError: with the answer and the row, if a function fails.
        """
        weights, found = weights_of(self.settings.weights), []
        columns = [
            self._called(function, examples, texts) for function in self.functions
        ]
        counts = self.settings.errors == "zero"
        for number, values in enumerate(zip(*columns, strict=True)):
            try:
                reward, named = self._added(values, weights)
                self._check_names(named)
            except ValueError as error:
                if not counts:
                    where = shown(examples[number], texts[number])
                    raise RewardError(f"the reward {error}\n{where}") from error
                zeros = (0.0,) * len(self.names)
                found.append(Reward(0.0, parts=(*zeros, 1.0)))
                continue
            parts = tuple(map(named.__getitem__, self.names))
            found.append(reward._replace(parts=parts + (0.0,) * counts))
        if any(reward.correct is not None for reward in found):
            failed = [reward.correct is None for reward in found]
            pairs = zip(found, failed, strict=True)
            found = [one._replace(correct=False) if bad else one for one, bad in pairs]
        return found

    def _check_names(self, named: Mapping[str, float]) -> None:
        """Raises ValueError for other numbers than those of the first answer."""
        if named.keys() != set(self.names):
            now, then = (", ".join(names) or "one" for names in (named, self.names))
            raise ValueError(f"gave the numbers {now} here, and {then} before")

    def _names_by(self, example: Example, texts: Sequence[str]) -> dict[str, float]:
        """The numbers by name for the first of these answers that is scored."""
        for text in texts:
            try:
                columns = [
                    self._called(one, [example], [text]) for one in self.functions
                ]
                return self._added([column[0] for column in columns], {})[1]
            except ValueError:  # a `RewardError` is one
                if text is texts[-1]:
                    raise
        raise AssertionError("no texts")

    def _called(
        self, function: Function, examples: Sequence[Example], texts: Sequence[str]
    ) -> list[Any]:
        """What a function returns for each answer; its exception, if that may be."""
        values = call(function, self.prompt, examples, texts, self.settings)
        for example, text, value in zip(examples, texts, values, strict=True):
            if isinstance(value, Exception) and self.settings.errors == "stop":
                told = describe(function, value, self.settings.timeout)
                raise RewardError(f"{told}\n{shown(example, text)}") from value
        return values

    def _added(
        self, values: Sequence[Any], weights: Mapping[str, float]
    ) -> tuple[Reward, dict[str, float]]:
        """The sum of what the functions gave an answer, and the numbers by name.

        Raises:
          ValueError: if a value is no reward, or the exception of a function.
        """
        if any(isinstance(value, Exception) for value in values):
            raise ValueError("failed")
        named: dict[str, float] = {}
        correct: list[Reward] = []
        for function, value in zip(self.functions, values, strict=True):
            if isinstance(value, Mapping):
                own = {str(key): reward_of(one).value for key, one in value.items()}
                named |= own
                if "correct" in own:
                    correct.append(Reward(0.0, bool(own["correct"])))
                continue
            reward = reward_of(value)
            if len(values) == 1:
                return reward, {}
            named[function.name] = reward.value
            correct += [reward] * (reward.correct is not None)
        total = sum(weights.get(name, 1.0) * one for name, one in named.items())
        return next(iter(correct), Reward(0.0))._replace(value=total), named


def make_rewards(
    functions: Sequence[Any],
    prompt: Callable[[Example], Prompt],
    example: Example,
    settings: Rewarding,
) -> Rewards:
    """Reward functions as one; an empty answer to `example` shows what they return.

    Where failures count as 0, and that fails, the answer in the row or "0" shows it.

    Raises:
      InputError: if that does not work, before anything costly has begun.
    """
    made = tuple(map(function_of, functions))
    if len({function.name for function in made}) < len(made):
        raise InputError("two reward functions have the same name")
    rewards = Rewards(made, prompt, dataclasses.replace(settings, errors="stop"))
    right = [str(example["answer"])] if "answer" in example else []
    texts = ["", *right, "0"] if settings.errors == "zero" else [""]
    try:
        named = rewards._names_by(example, texts)
    except RewardError as error:
        tried = "before the run, an empty answer was tried, as models give some"
        raise RewardError(f"{error}\n  ({tried})") from error
    except ValueError as error:
        raise RewardError(f"the reward {error}\n{shown(example, '')}") from error
    for name in weights_of(settings.weights):
        if name not in named:
            there = (
                f"there are {', '.join(named)}" if named else "there is one, unnamed"
            )
            raise InputError(f"reward_weights: there is no reward {name!r}; {there}")
    return Rewards(made, prompt, settings, tuple(named))


def weights_of(text: str) -> dict[str, float]:
    """The weights in 'name=number,...'.

    Raises:
      InputError: if it is not of that form.
    """
    found = {}
    for entry in filter(None, text.split(",")):
        name, _, number = entry.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise InputError(
                f"reward_weights are name=number,...: not {text!r}"
            ) from None
    return found


def reward_of(value: Any) -> Reward:
    """A reward from what a function may return for one answer.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(value, Reward):
        return value
    if isinstance(value, bool | np.bool_):
        return Reward(float(value), bool(value))
    if isinstance(value, int | float) or (  # or a scalar of numpy, torch or jax
        hasattr(value, "item") and np.ndim(value) == 0
    ):
        return Reward(float(value))
    raise ValueError(
        f"gave {shorten(repr(value))}, which is no number, bool, dict of numbers or "
        "jes.Reward"
    )


def call(
    function: Function,
    prompt: Callable[[Example], Prompt],
    examples: Sequence[Example],
    texts: Sequence[str],
    settings: Rewarding,
) -> list[Any]:
    """What a function returns for each answer, or the exception it raised there."""
    if "completions" in function.takes:
        arguments = columns(
            function, [prompt(one) for one in examples], examples, texts
        )
        (values,) = _in_time(
            lambda _: _awaited(function.call(**arguments)), [()], settings
        )
        if isinstance(values, Exception):
            return [values] * len(texts)
        if not isinstance(values, Sequence) or len(values) != len(texts):
            error = ValueError(
                f"returned {shorten(repr(values))} for {len(texts)} answers"
            )
            return [error] * len(texts)
        return list(values)
    count = len(function.takes)
    given = [pair[:count] for pair in zip(texts, examples, strict=True)]
    if inspect.iscoroutinefunction(function.call):
        with ThreadPoolExecutor(1) as pool:  # where a notebook's loop does not run
            return pool.submit(
                asyncio.run, _gathered(function, given, settings)
            ).result()
    return _in_time(lambda pair: _awaited(function.call(*pair)), given, settings)


def columns(
    function: Function,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    texts: Sequence[str],
) -> dict[str, list[Any]]:
    """The arguments of a function in TRL's form.

    Answers to chat messages are messages of the assistant, answers to text are text.
    """
    completions = [
        text if isinstance(one, str) else [{"role": "assistant", "content": text}]
        for one, text in zip(prompts, texts, strict=True)
    ]
    names = dict.fromkeys(name for example in examples for name in example)
    found: dict[str, list[Any]] = {
        name: [example.get(name) for example in examples] for name in names
    }
    found |= {"prompts": list(prompts), "completions": completions}
    if "*" in function.takes:
        return found
    return {name: found[name] for name in function.takes if name in found}


async def _gathered(
    function: Function, given: Sequence[tuple[Any, ...]], settings: Rewarding
) -> list[Any]:
    """The values of an `async` function, so many at a time."""
    limit = asyncio.Semaphore(settings.concurrency)

    async def one(arguments: tuple[Any, ...]) -> Any:
        async with limit:
            waiting = function.call(*arguments)
            return await asyncio.wait_for(waiting, settings.timeout or None)

    return await asyncio.gather(*map(one, given), return_exceptions=True)


def _awaited(value: Any) -> Any:
    """The value of a coroutine, or what is none."""
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _in_time(
    function: Callable[[Any], Any], items: Sequence[Any], settings: Rewarding
) -> list[Any]:
    """The value or the exception of each item, which may take so many seconds.

    A thread works through the items. Nothing in Python can stop it where it hangs: it
    is left behind, and another one goes on after that item.
    """
    found: list[Any] = []
    while len(found) < len(items):
        left = items[len(found) :]
        futures: list[Future] = [Future() for _ in left]
        Thread(target=_work, args=(function, left, futures), daemon=True).start()
        for future in futures:
            try:
                found.append(future.result(settings.timeout or None))
            except Exception as error:
                found.append(error)
                if not future.done():  # it hangs; what comes after is not begun
                    for other in futures:
                        other.cancel()
                    break
    return found


def _work(
    function: Callable[[Any], Any], items: Sequence[Any], futures: Sequence[Future]
) -> None:
    for item, future in zip(items, futures, strict=True):
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)


def describe(function: Function, error: Exception, timeout: float) -> str:
    """What went wrong in a reward function, with the user's own line."""
    told = f"{function.name} raised {type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, TimeoutError) and not str(error):
        told = f"{function.name} took more than reward_timeout={timeout:g} seconds"
    code = getattr(inspect.unwrap(function.call), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    if own:
        file, number = own[-1].filename, own[-1].lineno or 0
        line = linecache.getline(file, number).strip()
        told += f"\n  {Path(file).name}, line {number}: {line}"
    return told


def source_of(function: Any) -> str:
    """The lines that define a function; '' where they cannot be had."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError, ValueError):
        return ""


def shown(example: Example, text: str) -> str:
    """An answer and its row, for a message."""
    return f"  answer: {shorten(repr(text))}\n  row: {shorten(repr(dict(example)))}"


def shorten(text: str) -> str:
    """The text, or its beginning."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
