"""HellaSwag (1905.07830): which of four endings; a prior task of 2605.30148.

Two modes: the number is generated, or the likeliest number is taken.
"""

import re
from typing import Any

from jes.tasks import extract
from jes.tasks.rows import one_of, read_rows, subset
from jes.tasks.task import Example, Prompt, Reward, Task

OPTIONS = "0123"
SYSTEM = (
    "You are given a situation followed by four possible endings. Choose the most "
    "appropriate ending by selecting the corresponding number. Reply with only the "
    "option number: 0, 1, 2, or 3."
)
QUESTION = "Which ending best completes the scenario?"
LENIENT = re.compile(f"[{OPTIONS}]")


def load(root: str = "", seed: int = 0) -> Task:
    """The task; evaluated on a fixed subset of `validation` (2048 of 10,042 rows)."""
    del seed
    columns = ("activity_label", "ctx", "endings", "label")
    rows = read_rows("Rowan/hellaswag", "", "validation", columns, root)
    return Task(
        name="hellaswag",
        train=(),
        test=[_example(row) for row in subset(rows)],
        prompt=prompt,
        reward=reward,
        max_new_tokens=16,
        choices=lambda example: OPTIONS,
        answer=lambda example: OPTIONS.index(example["answer"]),
    )


def _example(row: dict[str, Any]) -> Example:
    options = OPTIONS[: len(row["endings"])]
    where = f"Rowan/hellaswag: {row['ctx'][:40]!r}"
    return {
        "activity": row["activity_label"],
        "context": row["ctx"],
        "endings": row["endings"],
        "answer": one_of(str(row["label"]), options, where),
    }


def prompt(example: Example) -> Prompt:
    """Chat messages: the context and its endings, numbered from 0."""
    endings = [f"{i}. {ending}" for i, ending in enumerate(example["endings"])]
    lines = [
        f"Activity: {example['activity']}",
        f"Context: {example['context']}\n",
        "Possible endings:",
        *endings,
        "",
        QUESTION,
    ]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n".join(lines)},
    ]


def reward(example: Example, text: str) -> Reward:
    """1 if the number is right; leniently, the first digit 0 to 3 anywhere."""
    return extract.graded(extract.option(text, OPTIONS, LENIENT), example["answer"])
