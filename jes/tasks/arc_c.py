"""ARC-Challenge (1803.05457): grade-school science, four choices, one letter.

Asked for the letter alone. Two modes: the letter is generated, or the likeliest letter
is taken (`mode='likelihood'`).
"""

import re
from typing import Any

from jes.errors import InputError
from jes.tasks.rows import read_rows
from jes.tasks.task import Example, Prompt, Reward, Task

LETTERS = "ABCDE"
SYSTEM = "You answer multiple-choice science questions."
INSTRUCTION = "Reply with the letter of the right answer only."

STRICT = re.compile(r"\s*\(?([A-E])\)?\.?\s*")
# A small letter, or an A, before another word may be the article.
STATED = re.compile(r"\b(?i:answer(?: is|:)?)\s*\(?([A-E]|[a-e](?!\s+\w))\b")
ALONE = re.compile(r"\b([B-E]|A(?!\s+[a-z]))\b")
READ = 4096
"""Characters at the end of an answer that extraction looks at."""


def load(root: str = "", seed: int = 0) -> Task:
    """The task; trained on `train`, evaluated on `test` (1119 and 1172 rows)."""
    del seed
    return Task(
        name="arc_c",
        train=examples("train", root),
        test=examples("test", root),
        prompt=prompt,
        reward=reward,
        max_new_tokens=32,
        choices=lambda example: LETTERS[: len(example["options"])],
        answer=lambda example: LETTERS.index(example["answer"]),
    )


def examples(split: str, root: str) -> list[Example]:
    """One split, with the fields `question`, `options` and `answer` (a letter).

    Raises:
      InputError: if the data cannot be had, or an answer is not among the choices.
    """
    columns = ("question", "choices", "answerKey")
    rows = read_rows("allenai/ai2_arc", "ARC-Challenge", split, columns, root)
    return [_example(row) for row in rows]


def _example(row: dict[str, Any]) -> Example:
    # Some rows label their choices 1 to 4: everything is turned into letters.
    labels = list(row["choices"]["label"])
    if row["answerKey"] not in labels:
        raise InputError(
            f"allenai/ai2_arc: answerKey {row['answerKey']!r} is not among the labels "
            f"{labels} of {row['question'][:40]!r}"
        )
    return {
        "question": row["question"],
        "options": list(row["choices"]["text"]),
        "answer": LETTERS[labels.index(row["answerKey"])],
    }


def prompt(example: Example) -> Prompt:
    """Chat messages: the question, its lettered choices, and what to reply."""
    options = zip(LETTERS, example["options"], strict=False)
    lines = [f"{letter}. {text}" for letter, text in options]
    text = "\n".join([example["question"], *lines, "", INSTRUCTION])
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": text},
    ]


def reward(example: Example, text: str) -> Reward:
    """1 if the extracted letter is right.

    Strict: nothing but the letter (brackets and a full stop are let pass). Lenient:
    the letter after 'answer is', else the first letter that stands alone.
    """
    text = text[-READ:]
    strict = STRICT.fullmatch(text)
    found = strict or STATED.search(text) or ALONE.search(text)
    correct = found is not None and found[1].upper() == example["answer"]
    return Reward(
        value=float(correct),
        correct=correct,
        strict=correct and strict is not None,
        formatted=strict is not None,
    )
