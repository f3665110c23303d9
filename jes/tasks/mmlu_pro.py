"""MMLU-Pro (2406.01574): up to ten choices; a prior task of 2605.30148.

Five worked examples of the same category come before each question: `cot_content` of
the validation split. The layout is that of MMLU-Pro's own code.
"""

from typing import Any

from jes.errors import InputError
from jes.tasks import extract
from jes.tasks.rows import one_of, read_rows, subset
from jes.tasks.task import Example, Prompt, Reward, Task

LETTERS = "ABCDEFGHIJ"
SHOTS = 5
FINISH = (
    'finish your answer with "The answer is (X)" where X is the correct letter choice.'
)
SYSTEM = (
    "You are a knowledge expert solving multiple-choice questions. Think step by step "
    f"and {FINISH}"
)
HEADER = (
    "The following are multiple choice questions (with answers) about {category}. "
    f"Think step by step and then {FINISH}"
)
THINK = "Let's think step by step."


def load(root: str = "", seed: int = 0) -> Task:
    """The task; evaluated on a fixed subset of `test` (2048 of 12,032 rows).

    A `root` has the rows in the folder `mmlu_pro`.
    """
    del seed
    shots: dict[str, list[dict[str, Any]]] = {}
    for row in _rows("validation", root, "cot_content"):
        shots.setdefault(row["category"], []).append(row)
    worked = {category: _worked(category, rows) for category, rows in shots.items()}
    return Task(
        name="mmlu_pro",
        train=(),
        test=[_example(row, worked) for row in subset(_rows("test", root))],
        prompt=prompt,
        reward=reward,
        max_new_tokens=1024,
    )


def _rows(split: str, root: str, *more: str) -> list[dict[str, Any]]:
    repository = "mmlu_pro" if root else "TIGER-Lab/MMLU-Pro"
    columns = ("question", "options", "answer", "category", *more)
    rows = read_rows(repository, "", split, columns, root)
    # 'N/A' fills up the options of some rows, at the end, so that no letter moves.
    return [
        {**row, "options": [o for o in row["options"] if o != "N/A"]} for row in rows
    ]


def _worked(category: str, rows: list[dict[str, Any]]) -> str:
    solved = [
        f"{_question(row)}Answer: {row['cot_content'].removeprefix('A: ')}\n\n"
        for row in rows[:SHOTS]
    ]
    return "".join([HEADER.format(category=category), "\n\n\n", *solved])


def _question(row: Example) -> str:
    options = zip(LETTERS, row["options"], strict=False)
    lines = [f"{letter}. {text}" for letter, text in options]
    return "\n".join(["Question:", row["question"], "Options:", *lines, ""])


def _example(row: dict[str, Any], worked: dict[str, str]) -> Example:
    where = f"mmlu_pro: {row['question'][:40]!r}"
    if row["category"] not in worked:
        raise InputError(f"{where}: validation has no category {row['category']!r}")
    return {
        "question": row["question"],
        "options": row["options"],
        "worked": worked[row["category"]],
        "answer": one_of(row["answer"], LETTERS[: len(row["options"])], where),
    }


def prompt(example: Example) -> Prompt:
    """Chat messages: worked examples of the category, then the question."""
    text = f"{example['worked']}{_question(example)}Answer: {THINK}"
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": text},
    ]


def reward(example: Example, text: str) -> Reward:
    """1 if the extracted letter is right; see `extract.letter` for the rule."""
    return extract.graded(extract.letter(text, LETTERS[-1]), example["answer"])
