"""Countdown: reach a target with every number once; 2509.24372 and 2605.30148.

Asked through the chat template as in 2605.30148, and graded as in both papers: 0.1 for
the format and 1 for the answer. Searches of linear work replace the papers' regular
expressions, and a small parser replaces `eval`: `**` and `//`, which would pass the
papers' filter, are wrong here.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from jes.errors import InputError
from jes.tasks.extract import last_between
from jes.tasks.rows import read_train_and_test
from jes.tasks.task import Example, Prompt, Reward, Task

TRAIN, TEST = 200, 2000
REPOSITORY = "Jiayi-Pan/Countdown-Tasks-3to4"
SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in your "
    "mind and then provide the user with the answer."
)
TEXT = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use "
    "basic arithmetic operations (+, -, *, /) and each number can only be used once. "
    "Show your work in <think> </think> tags. And return the final answer in <answer> "
    "</answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
PREFILL = "Let me solve this step by step.\n<think>"

READ = 16384
"""Characters at the end of an answer that are read."""

LONGEST = 128
"""Characters in an expression that is read at all; it bounds the parser's depth."""
TOKEN = re.compile(r" *(0+(?![0-9])|[1-9][0-9]*|[-+*/()]) *")


def load(root: str = "") -> Task:
    """The task; 200 problems to train on and 2000 held out.

    A `root` has the 2200 problems of 2509.24372 in the folder `countdown`. They are not
    on the hub: without a root the problems are the first rows of `REPOSITORY`, which
    are of the same kind.
    """
    numbers = "numbers" if root else "nums"
    splits = read_train_and_test(REPOSITORY, (numbers, "target"), root, (TRAIN, TEST))
    train, test = (
        [_example(row[numbers], row["target"]) for row in rows] for rows in splits
    )
    return Task("countdown", train, test, prompt, reward, max_new_tokens=1024)


def _example(numbers: list[int], target: Any) -> Example:
    try:
        finite = math.isfinite(float(target))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise InputError(f"countdown: the target {target!r} is not a number")
    if not isinstance(numbers, list) or {type(n) for n in numbers} != {int}:
        raise InputError(f"countdown: {numbers!r} are not whole numbers")
    return {"numbers": numbers, "target": target}


def prompt(example: Example) -> Prompt:
    """Chat messages: the numbers and the target, and the beginning of the answer."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": TEXT.format(**example)},
        {"role": "assistant", "content": PREFILL},
    ]


def reward(example: Example, text: str) -> Reward:
    """0.1 for the format and 1 for the last `<answer>`, read literally.

    Leniently (`correct`), white space around the answer is ignored, so that it may be
    on a line of its own; strictly, the format is right too.
    """
    text = text[-READ:]
    share = format_score(text)
    found = last_between(text, "<answer>", "</answer>") or ""
    # The papers allow spaces, and their `$` one line break at the end.
    plain = found.removesuffix("\n").strip(" ")
    right = _solves(plain, example)
    correct = right or _solves(found.strip(), example)
    return Reward(
        0.1 * share + right, correct, right and share == 1.0, formatted=share == 1.0
    )


def format_score(text: str) -> float:
    r"""1 for '...</think>\n<answer>...</answer>' and nothing after it.

    Otherwise 0.1 for '</think>' and 0.5 for an '<answer>' that is closed. '<think>' is
    the end of the prompt; one line break may follow the text.
    """
    body = text.removesuffix("\n").removesuffix("</answer>")
    middle = text.find("</think>\n<answer>")
    closed = text.rfind("</answer>") == len(body)
    if closed and 0 <= middle <= len(body) - len("</think>\n<answer>"):
        return 1.0
    answer = text.find("<answer>")
    answered = answer >= 0 and text.find("</answer>", answer) >= 0
    return 0.1 * ("</think>" in text) + 0.5 * answered


def _solves(expression: str, example: Example) -> bool:
    if len(expression) > LONGEST:
        return False
    used = sorted(int(n) for n in re.findall("[0-9]+", expression))
    if used != sorted(example["numbers"]):
        return False
    value = evaluate(expression)
    return value is not None and abs(value - float(example["target"])) < 1e-5


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of + - * / ( ), whole numbers and spaces.

    None for anything else: other characters, a leading zero, unbalanced parentheses,
    division by zero, more than `LONGEST` characters. The work is bounded.
    """
    if len(expression) > LONGEST:
        return None
    tokens: list[str] = TOKEN.findall(expression)
    if sum(map(len, tokens)) != len(expression) - expression.count(" "):
        return None
    stream = iter([*tokens, ""])
    try:
        value, end = _sum(stream)
    except (ValueError, ZeroDivisionError):
        return None
    return value if end == "" else None


def _sum(stream: Iterator[str]) -> tuple[Fraction, str]:
    """The value of a sum, and the token after it."""
    total, token = _product(stream)
    while token in ("+", "-"):
        sign = 1 if token == "+" else -1
        value, token = _product(stream)
        total += sign * value
    return total, token


def _product(stream: Iterator[str]) -> tuple[Fraction, str]:
    value, token = _atom(next(stream), stream), next(stream)
    while token in ("*", "/"):
        factor = _atom(next(stream), stream)
        value = value * factor if token == "*" else value / factor
        token = next(stream)
    return value, token


def _atom(token: str, stream: Iterator[str]) -> Fraction:
    if token in ("+", "-"):
        value = _atom(next(stream), stream)
        return value if token == "+" else -value
    if token == "(":
        value, token = _sum(stream)
        if token != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if not token.isdigit():
        raise ValueError("a number is missing")
    return Fraction(token)
