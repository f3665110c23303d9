"""PIQA (1911.11641): which of two ways works; a prior task of 2605.30148.

Two modes: the number is generated, or the likeliest number is taken.
"""

import re
from typing import Any

from jes.tasks import extract
from jes.tasks.rows import one_of, read_rows
from jes.tasks.task import Example, Prompt, Reward, Task

OPTIONS = "12"
SYSTEM = (
    "You are given a physical commonsense goal and two possible solutions. Choose the "
    "better solution by selecting the corresponding number. Reply with only the option "
    "number: 1 or 2."
)
QUESTION = "Which solution is more likely to work?"
LENIENT = re.compile(rf"\b[{OPTIONS}]\b")


def load(root: str = "", seed: int = 0) -> Task:
    """The task; evaluated on `validation` (1838 rows)."""
    del seed
    # Not ybisk/piqa, which is a script that `datasets` no longer runs.
    columns = ("goal", "sol1", "sol2", "label")
    rows = read_rows("baber/piqa", "", "validation", columns, root)
    return Task(
        name="piqa",
        train=(),
        test=[_example(row) for row in rows],
        prompt=prompt,
        reward=reward,
        max_new_tokens=16,
        choices=lambda example: OPTIONS,
        answer=lambda example: OPTIONS.index(example["answer"]),
    )


def _example(row: dict[str, Any]) -> Example:
    label = one_of(str(row["label"]), "01", f"piqa: {row['goal'][:40]!r}")
    return {
        "goal": row["goal"],
        "solutions": (row["sol1"], row["sol2"]),
        "answer": OPTIONS[int(label)],
    }


def prompt(example: Example) -> Prompt:
    """Chat messages: the goal and its two solutions, numbered from 1."""
    first, second = example["solutions"]
    lines = [
        f"Goal: {example['goal']}\n",
        "Possible solutions:",
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
