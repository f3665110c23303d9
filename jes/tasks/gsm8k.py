"""GSM8K (2110.14168): grade-school arithmetic in words; a target task of 2605.30148."""

import re
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

READ = 4096
"""Characters at the end of an answer that are read."""
NUMBER = r"(?:-?\$|\$?-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
STRICT = re.compile(r"####\s*([-0-9.,]+)")
MARKED = re.compile(rf"####\s*({NUMBER})")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
FIRST = re.compile(NUMBER)
CALCULATION = re.compile(r"<<[^<>]*>>")
"""Calculator annotations in the solutions of the data set."""
PARSED = re.compile(r"(-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?:/([0-9]+))?")


def load(root: str = "") -> Task:
    """The task; the first 200 of `train` and the first 500 of `test`."""
    train, test = (
        [_example(row) for row in read_rows(*SOURCE, split, COLUMNS, root)[:count]]
        for split, count in (("train", TRAIN), ("test", TEST))
    )
    return Task("gsm8k", train, test, prompt, reward, max_new_tokens=1024)


def _example(row: dict[str, Any]) -> Example:
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


def reward(example: Example, text: str) -> Reward:
    """0.1 for the format and 1 for the right number (within 1e-6).

    The format is a last line '#### <number>'.
    """
    text = text[-READ:]
    strict = STRICT.fullmatch(extract.last_line(text))
    formatted = strict is not None and number(strict[1]) is not None
    found = find(text)
    correct = found is not None and abs(found - example["answer"]) < 1e-6
    return Reward(0.1 * formatted + correct, correct, formatted and correct, formatted)


def find(text: str) -> float | None:
    r"""The number in an answer, read after the last '</think>'.

    The last '#### number', else the last '\boxed{number}', else the last
    '<answer>number</answer>', else the first number of all.
    """
    text = text[-READ:].rpartition("</think>")[2]
    if marked := MARKED.findall(text):
        return number(marked[-1])
    if boxed := BOXED.findall(text):
        return number(boxed[-1])
    answer = extract.last_between(text, "<answer>", "</answer>")
    if answer is not None:
        return number(answer)
    first = FIRST.search(text)
    return None if first is None else number(first[0])


def number(text: str) -> float | None:
    """A decimal number or a fraction of whole ones; commas, $ and % are ignored."""
    parsed = PARSED.fullmatch(re.sub("[,$%]", "", text).strip())
    if parsed is None:
        return None
    divisor = float(parsed[2] or 1)
    return float(parsed[1]) / divisor if divisor else None
