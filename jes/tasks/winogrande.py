"""WinoGrande (1907.10641): which of two words fills the blank.

Not a task of 2605.30148; it is asked as that paper asks PIQA. Two modes: the number is
generated, or the likeliest number is taken.
"""

import re
from typing import Any

from jes.tasks import extract
from jes.tasks.rows import one_of, read_rows
from jes.tasks.task import Example, Prompt, Reward, Task

OPTIONS = "12"
SYSTEM = (
    "You are given a sentence with a blank and two possible fillings. Choose the "
    "better filling by selecting the corresponding number. Reply with only the option "
    "number: 1 or 2."
)
QUESTION = "Which filling fits the blank (_) better?"
LENIENT = re.compile(rf"\b[{OPTIONS}]\b")


def load(root: str = "", seed: int = 0) -> Task:
    """The task; evaluated on `validation` (1267 rows)."""
    del seed
    columns = ("sentence", "option1", "option2", "answer")
    rows = read_rows("allenai/winogrande", "winogrande_xl", "validation", columns, root)
    return Task(
        name="winogrande",
        train=(),
        test=[_example(row) for row in rows],
        prompt=prompt,
        reward=reward,
        max_new_tokens=16,
        choices=lambda example: OPTIONS,
        answer=lambda example: OPTIONS.index(example["answer"]),
    )


def _example(row: dict[str, Any]) -> Example:
    where = f"allenai/winogrande: {row['sentence'][:40]!r}"
    return {
        "sentence": row["sentence"],
        "fillings": (row["option1"], row["option2"]),
        "answer": one_of(str(row["answer"]), OPTIONS, where),
    }


def prompt(example: Example) -> Prompt:
    """Chat messages: the sentence and its two fillings, numbered from 1."""
    first, second = example["fillings"]
    lines = [
        f"Sentence: {example['sentence']}\n",
        "Possible fillings:",
        f"1. {first}",
        f"2. {second}\n",
        QUESTION,
    ]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n".join(lines)},
    ]


def reward(example: Example, text: str) -> Reward:
    """1 if the number is right; leniently, the first 1 or 2 that stands alone."""
    return extract.graded(extract.option(text, OPTIONS, LENIENT), example["answer"])
