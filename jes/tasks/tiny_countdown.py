"""Countdown with three small numbers: reach a target with + - * and parentheses.

`22 from 3 5 7:` is answered by `3*5+7`, or by any other expression of that value
that uses every number once. A small parser of bounded work reads expressions, never
`eval`.
"""

import re

import numpy as np

from jes.tasks import countdown
from jes.tasks.task import Example, Reward

LONGEST = 24
"""Longest expression that is read."""
SHAPES = ("{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})")
ANSWER = re.compile(r"\(*[0-9]\)*([-+*]\(*[0-9]\)*)*")
OTHER = re.compile(r"[^-+*()0-9]|(?:^|[-+*(])[-+]|[0-9]{3}")
"""What is not allowed: other characters, unary signs, long numbers."""


def draw(rng: np.random.Generator) -> Example:
    """A puzzle that has a solution; `answer` is one of its solutions.

    The target is 1 to 99; parentheses appear only where they change the value.
    """
    while True:
        numbers = rng.integers(1, 10, 3).tolist()
        a, b, c = rng.permutation(numbers).tolist()
        first, second = rng.choice(list("+-*"), 2).tolist()
        plain, *others = (shape.format(a, first, b, second, c) for shape in SHAPES)
        answer = (plain, *others)[rng.integers(3)]
        target = evaluate(answer)
        if target is None or not 1 <= target <= 99:
            continue
        if evaluate(plain) == target:
            answer = plain
        return {
            "prompt": f"{target} from {' '.join(map(str, numbers))}:",
            "same_as": f"{target} from {sorted(numbers)}",
            "answer": answer,
            "numbers": numbers,
            "target": target,
        }


def reward(example: Example, text: str) -> Reward:
    """0.1 for the format and 0.9 for a right answer.

    The format is an expression and nothing else; leniently, spaces and what follows
    an equals sign or a line break are ignored.
    """
    formatted = len(text) <= LONGEST and ANSWER.fullmatch(text) is not None
    lenient = re.split(r"[=\n]", text[: 2 * LONGEST])[0].replace(" ", "")
    correct = solves(lenient, example["numbers"], example["target"])
    strict = correct and formatted and lenient == text
    return Reward(0.1 * formatted + 0.9 * correct, correct, strict, formatted)


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Whether an expression has the target's value and uses every number once."""
    used = sorted(int(n) for n in re.findall(r"[0-9]+", expression[: LONGEST + 1]))
    return used == sorted(numbers) and evaluate(expression) == target


def evaluate(expression: str) -> int | None:
    """The value of an expression of + - * ( ) and numbers below 100, or None.

    None for anything else: other characters, a unary sign, unbalanced parentheses,
    more than `LONGEST` characters.
    """
    if len(expression) > LONGEST or OTHER.search(expression):
        return None
    value = countdown.evaluate(expression)
    return None if value is None else int(value)
