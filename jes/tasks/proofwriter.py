"""ProofWriter (2012.13048): does a question follow from a theory; 2605.30148.

Three answers, of which 'Unknown' alone is right for 44 % of the questions. The model
continues after 'Reasoning:', which is not part of the text that is scored.
"""

import re
from typing import Any

import numpy as np

from jes.tasks import extract
from jes.tasks.rows import one_of, read_train_and_test
from jes.tasks.task import Example, Prompt, Reward, Task

LABELS = ("True", "False", "Unknown")
TRAIN, TEST = 200, 1000
REPOSITORY = "tasksource/proofwriter"
TEXT = """\
You are given a theory and a question. Determine whether the question is entailed by \
the theory.

First write your reasoning.
On the last line, write exactly one of these formats:
Answer: True
Answer: False
Answer: Unknown
Do not add any other words, punctuation, or explanation after the final label.

Theory: {theory}
Question: {question}"""
PREFILL = "Reasoning:"

LINE = re.compile(r"(?im)^[^\S\n]*answer:[^\S\n]*(true|false|unknown)[^\S\n]*$")
LAST = re.compile(r"(?i)(?:(?:final )?answer(?: is)?:?\s*)?([a-z]+)[\s.,;:!*]*")
WORD = re.compile(r"(?i)\b(true|false|unknown)\b")


def load(root: str = "") -> Task:
    """The task; 200 examples to train on and 1000 held out.

    On the hub they are the first rows of `train` after `Dataset.shuffle(seed=0)`. A
    `root` has these rows as `train` and `test`, already shuffled.
    """
    columns = ("theory", "question", "answer")
    splits = read_train_and_test(
        REPOSITORY, columns, root, (TRAIN, TEST), np.random.default_rng(0).permutation
    )
    train, test = ([_example(row) for row in rows] for rows in splits)
    return Task("proofwriter", train, test, prompt, reward, max_new_tokens=1024)


def _example(row: dict[str, Any]) -> Example:
    where = f"{REPOSITORY}: {row['question'][:40]!r}"
    return {**row, "answer": one_of(str(row["answer"]), LABELS, where)}


def prompt(example: Example) -> Prompt:
    """Chat messages: theory and question, and the beginning of the answer."""
    return [
        {"role": "user", "content": TEXT.format(**example)},
        {"role": "assistant", "content": PREFILL},
    ]


def reward(example: Example, text: str) -> Reward:
    """0.1 for the format and 1 for the right label."""
    return extract.graded(find(text), example["answer"], format_share=0.1)


def find(text: str) -> extract.Found:
    """The label in the last `extract.READ` characters of an answer.

    The format is a last line 'Answer: <label>', in any case. Leniently, the last such
    line; else the one word of the last line ('The' or 'final answer is' may precede
    it), which is no answer if it is no label; else the last label anywhere.
    """
    text = text[-extract.READ :]
    line = extract.last_line(text)
    if strict := LINE.fullmatch(line):
        return extract.Found(strict[1].capitalize(), True)
    labels = LINE.findall(text)
    if not labels and (single := LAST.fullmatch(line.removeprefix("The "))):
        labels = [single[1]] if WORD.fullmatch(single[1]) else [None]
    labels = labels or WORD.findall(text)
    found = labels[-1] if labels else None
    return extract.Found(found.capitalize() if found else None, False)
