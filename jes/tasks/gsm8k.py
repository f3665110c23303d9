"""GSM8K (2110.14168): grade-school arithmetic in words; a target task of 2605.30148."""

import re
from functools import partial
from typing import Any

from jes.errors import InputError
from jes.tasks import extract
from jes.tasks.rows import read_rows
from jes.tasks.task import Example, Prompt, Reward, Task

TRAIN, TEST = 200, 500
SOURCE, COLUMNS = ("openai/gsm8k", "main"), ("question", "answer")
TEXT = """\
Solve this grade-school math word problem step by step.

Problem: {question}

Write short calculations and check the final result.
On the last line, write only: #### <number>"""

READ = 8192
"""Characters at the end of an answer that are read."""
PUBLISHED_READ = 4096
NUMBER = r"(?:-?\$|\$?-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
STRICT = re.compile(r"####\s*([-0-9.,]+)")
MARKED = re.compile(rf"####\s*({NUMBER})")
LINE = re.compile(r"####([^\n#]{0,200})")
PUBLISHED_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\}){0,200})\}")
FIRST = re.compile(NUMBER)
GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
WITHIN = re.compile(
    rf"(?<![0-9.,])([-+]?)\s?\$?((?:{GROUPED})(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)(?!,?[0-9])"
)
"""A number within other text; '1,2,3' has none."""
CALCULATION = re.compile(r"<<[^<>]*>>")
"""Calculator annotations in the solutions of the data set."""
PARSED = re.compile(r"(-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?:/([0-9]+))?")


def load(root: str = "", published: bool = False) -> Task:
    """The task; the first 200 of `train` and the first 500 of `test`.

    `published` reads answers as 2605.30148 does, with its false negatives.
    """
    train, test = (
        [_example(row) for row in read_rows(*SOURCE, split, COLUMNS, root)[:count]]
        for split, count in (("train", TRAIN), ("test", TEST))
    )
    name = "gsm8k/published" if published else "gsm8k"
    rewarded = partial(reward, published=published)
    return Task(name, train, test, prompt, rewarded, max_new_tokens=1024)


def _example(row: dict[str, Any]) -> Example:
    for name in COLUMNS:
        if not isinstance(row[name], str):
            raise InputError(f"openai/gsm8k: {name} is {row[name]!r}, which is no text")
    answer = number(row["answer"].rpartition("####")[2])
    if answer is None:
        raise InputError(
            f"openai/gsm8k: {row['question'][:40]!r}: the answer has no '#### <number>'"
        )
    solution = CALCULATION.sub("", row["answer"])
    return {"question": row["question"], "answer": answer, "solution": solution}


def prompt(example: Example) -> Prompt:
    """Chat messages: the problem, from the user alone."""
    return [{"role": "user", "content": TEXT.format(**example)}]


def reward(example: Example, text: str, published: bool = False) -> Reward:
    """0.1 for the format and 1 for the right number (within 1e-6).

    The format is a last line '#### <number>'.
    """
    text = text[-READ:]
    strict = STRICT.fullmatch(extract.last_line(text))
    formatted = strict is not None and number(strict[1]) is not None
    found = find(text, published)
    correct = found is not None and abs(found - example["answer"]) < 1e-6
    return Reward(0.1 * formatted + correct, correct, formatted and correct, formatted)


def find(text: str, published: bool = False) -> float | None:
    r"""The number in an answer, read after the last '</think>'.

    After the last '####', else in the last '\boxed{...}', else in the last
    '<answer>...</answer>', with whatever else is written there ('x = 12', '**12**',
    '12 apples'); only where none of these is, the first number of all. `published` is
    the rule of the code of 2605.30148, for which the marks hold a number and no more.
    """
    if published:
        text, patterns, read = text[-PUBLISHED_READ:], (MARKED, PUBLISHED_BOXED), number
    else:
        text, patterns, read = text[-READ:].replace("{,}", ","), (LINE, BOXED), within
    text = text.rpartition("</think>")[2]
    for pattern in patterns:
        if found := pattern.findall(text):
            return read(found[-1])
    answer = extract.last_between(text, "<answer>", "</answer>")
    if answer is not None:
        return read(answer)
    first = FIRST.search(text)
    return None if first is None else number(first[0])


def within(text: str) -> float | None:
    """The number in a marked answer: after an equals sign, if there is one."""
    text = text[-200:].rpartition("=")[2].replace("\\", "").replace("*", "")
    found = WITHIN.search(text.replace("$-", "-$"))
    return None if found is None else number(found[1] + found[2])


def number(text: str) -> float | None:
    """A decimal number or a fraction of whole ones; commas, $ and % are ignored."""
    parsed = PARSED.fullmatch(re.sub("[,$%]", "", text).strip().removeprefix("+"))
    if parsed is None:
        return None
    divisor = float(parsed[2] or 1)
    return float(parsed[1]) / divisor if divisor else None
