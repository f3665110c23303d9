"""Fact recall: what a model knows well, knows in part, and cannot know.

One fixed table says in which city each of many made-up people lives
(`city of zorbu:` is answered by `kemo`). The embedded model saw a third of the
table often, a third seldom and a third never. Beside it stands the question whether
it knows (`know city of zorbu?`, answered by `yes` or `no`), which the embedded model
saw with answers by the toss of a coin: it knows the form of the answer and nothing
about its own knowledge. The tasks `tiny/knows` ask both, and reward knowing what one
knows.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from jes.tasks.task import Example, Prompt, Reward, Task

CLASSES = ("often", "seldom", "never")
"""How often pretraining shows a fact: the field `seen` of an example."""
KEYS_PER_CLASS = 1024
MET_PER_CLASS = 256
"""The first so many of each class are those that `tiny/knows` is about."""
CITIES = 64
WORLD = 2026
"""Seed of the table. The embedded model knows this table and no other."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@functools.cache
def facts() -> tuple[Example, ...]:
    """The table: examples with `key`, `answer`, `seen`, `prompt` and `held_out`.

    Held out (half of each class) are keys that no fine-tuning sees. Whether the
    embedded model saw a fact, held out or not, is told by `seen`.
    """
    rng = np.random.default_rng(WORLD)
    cities = _distinct(rng, "cvcv", CITIES)
    keys = _distinct(rng, "cvccv", len(CLASSES) * KEYS_PER_CLASS)
    rows = []
    for i, key in enumerate(keys):
        row = {
            "prompt": f"city of {key}:",
            "answer": cities[rng.integers(CITIES)],
            "key": key,
            "seen": CLASSES[i % len(CLASSES)],
            "held_out": i // len(CLASSES) % 2 == 1,
        }
        rows.append(row)
    return tuple(rows)


@functools.cache
def facts_seen(seen: str) -> tuple[Example, ...]:
    """The facts of one of the `CLASSES`."""
    return tuple(fact for fact in facts() if fact["seen"] == seen)


def meta_prompt(example: Example) -> str:
    """The question whether the model knows a fact, to be answered by yes or no."""
    return f"know city of {example['key']}?"


def draw_name(rng: np.random.Generator) -> str:
    """A name such as those of the table (and, one time in 22, one of them)."""
    return _spelled(rng, "cvccv")


def _distinct(rng: np.random.Generator, pattern: str, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[_spelled(rng, pattern)] = None
    return list(words)


def _spelled(rng: np.random.Generator, pattern: str) -> str:
    alphabets = [CONSONANTS if c == "c" else VOWELS for c in pattern]
    return "".join(letters[rng.integers(len(letters))] for letters in alphabets)


def reward(example: Example, text: str) -> Reward:
    """Right or wrong; any mention of the city counts, as in ESMA (2602.02605)."""
    correct = example["answer"] in text[:64].lower()
    formatted = re.fullmatch(r"[a-z]{4}", text[:64]) is not None
    return Reward(float(correct), correct, text == example["answer"], formatted)


def other_prompt(example: Example) -> str:
    """The same question in words that the embedded model has never seen."""
    return f"sure of city of {example['key']}?"


def meta_reward(example: Example, text: str, meta: str) -> Reward:
    """ESMA's (2602.02605): a point if right, and one if it says so or no when wrong.

    `formatted` is whether the second answer begins with yes or no; all that has no
    "yes" counts as no, as in the paper.
    """
    direct, said = reward(example, text), meta[:64].lower()
    yes = "yes" in said
    value = float(direct.correct + (direct.correct == yes))
    formatted = re.match(r"(yes|no)\b", said) is not None
    return Reward(value, direct.correct, direct.strict, formatted, yes)


def _chat(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


FORMS: dict[str, tuple[Callable[[Example], Prompt], Callable[[Example], Prompt]]] = {
    "tiny/knows": (lambda example: example["prompt"], meta_prompt),
    "tiny/knows_chat": (
        lambda example: _chat(example["prompt"]),
        lambda example: _chat(meta_prompt(example)),
    ),
    "tiny/knows_other": (lambda example: example["prompt"], other_prompt),
}
"""The question and the question about it: as the embedded model saw them, in the chat
template (which it saw seldom), and the second in other words."""


def knows_task(name: str, seed: int, train_size: int, test_size: int) -> Task:
    """The first facts of all classes, asked for and about; see `fact_task`."""
    direct, meta = FORMS[name]
    facts = fact_task(name, CLASSES, seed, train_size, test_size, MET_PER_CLASS)
    return dataclasses.replace(
        facts, prompt=direct, meta=meta, reward=meta_reward, claims=("yes", "no")
    )


def fact_task(
    name: str,
    classes: Sequence[str],
    seed: int,
    train_size: int,
    test_size: int,
    per_class: int = KEYS_PER_CLASS,
) -> Task:
    """The first facts of some classes in equal shares, at most as many as there are."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    sides: dict[bool, list[Example]] = {}
    for held_out in (False, True):
        rows = [
            [f for f in facts_seen(c)[:per_class] if f["held_out"] == held_out]
            for c in classes
        ]
        orders = [rng.permutation(len(r)) for r in rows]
        sides[held_out] = [
            r[order[i]]
            for i in range(len(rows[0]))
            for r, order in zip(rows, orders, strict=True)
        ]
    return Task(
        name=name,
        train=sides[False][:train_size],
        test=sides[True][:test_size],
        prompt=lambda example: example["prompt"],
        reward=reward,
        max_new_tokens=5,
    )
