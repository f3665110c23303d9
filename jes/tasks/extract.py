"""Extraction of answers from text: the rules of 2605.30148 that several tasks share.

The rules are those of the paper's code, with their known false positives (a letter of
an ordinary word, the first digit of an explanation), so that accuracies are comparable;
`formatted` says whether the text has exactly the format asked for.
"""

import re
from typing import NamedTuple

from jes.tasks.task import Reward

READ = 8192
"""Characters that are read: 1024 tokens of text have about half as many."""


class Found(NamedTuple):
    """An extracted answer, None where there is none, and whether it is in the format
    asked for."""

    answer: str | None
    formatted: bool


def graded(found: Found, gold: str, format_share: float = 0.0) -> Reward:
    """1 for the right answer, and `format_share` for the format."""
    answer, formatted = found
    correct = answer == gold
    value = correct + format_share * formatted
    return Reward(value, correct, correct and formatted, formatted)


def without_thoughts(text: str) -> str:
    """What follows the last '</think>', or all of it."""
    # One character is found at once, a word takes milliseconds in a million of them.
    return text.rpartition("</think>")[2] if "<" in text else text


def option(text: str, options: str, lenient: re.Pattern[str]) -> Found:
    """The label of an option: alone as asked for, else the first match of `lenient`.

    Reads the first `READ` characters; a longer text does not have the format.
    """
    strict = re.fullmatch(rf"\s*([{options}])\s*", text[: READ + 1])
    if strict is not None and len(text) <= READ:
        return Found(strict[1], True)
    found = lenient.search(text[:READ])
    return Found(None if found is None else found[0], False)


def letter(text: str, last: str, published: bool = False) -> Found:
    """The letter A to `last` that a chain of thought ends with.

    The format is a last 'The answer is (X)', and a text that ends so is graded by that
    (a departure: the paper's extraction would take the first). Leniently, the first
    'answer is (X)', else the first 'answer is X' (where X may begin a word: 'the answer
    is clearly (B)' is C), else the first letter that stands alone ('A dog' is A). Upper
    and lower case are the same. Reads the last `READ` characters. Unless as published,
    'answer: X' counts too, and a letter that begins a word only where nothing else is.
    """
    text = text[-READ:].upper()
    x = f"([A-{last}])"
    if strict := re.search(rf"THE ANSWER IS\s*\({x}\)\.?\s*$", text):
        return Found(strict[1], True)
    stages = [rf"ANSWER IS\s*\({x}\)", rf"ANSWER IS\s*{x}", rf"\b{x}\b"]
    if not published:
        stages.insert(1, rf"\bANSWER(?: IS)?:?\s{{0,9}}\**\(?{x}\b")
    for stage in stages:
        if found := re.search(stage, text):
            return Found(found[1], False)
    return Found(None, False)


def last_line(text: str) -> str:
    """The last line that is not blank, stripped."""
    return text[-READ:].strip().rpartition("\n")[2].strip()


def last_between(text: str, start: str, end: str) -> str | None:
    """The text in the last `start`...`end`, found from the left; linear work."""
    found, position = None, 0
    while (left := text.find(start, position)) >= 0:
        left += len(start)
        right = text.find(end, left)
        if right < 0:
            break
        found, position = text[left:right], right + len(end)
    return found
