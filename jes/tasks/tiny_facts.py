"""Fact recall: what a model knows well, knows in part, and cannot know.

One fixed table says in which city each of many made-up people lives
(`city of zorbu:` is answered by `kemo`). The embedded model saw a third of the
table often, a third seldom and a third never. Another question asks whether it knows
(`know city of zorbu?`, answered by `yes` or `no`): the embedded model saw it with
random answers, so it knows the form of the answer but nothing about its own knowledge.
The tasks `tiny/knows` ask both questions, and reward a model that knows what it knows.
"""

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jes.tasks.task import Example, Prompt, Reward, Task

CLASSES = ("often", "seldom", "never")
"""How often pretraining shows a fact: the field `seen` of an example."""
KEYS_PER_CLASS = 1024
MET_PER_CLASS = 256
"""Facts of each class, the first ones, that `tiny/knows` asks about."""
CITIES = 64
WORLD = 2026
"""Seed of the table. The embedded model knows this table and no other."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@functools.cache
def facts() -> tuple[Example, ...]:
    """The table: examples with `key`, `answer`, `seen`, `prompt` and `held_out`.

    Held out (half of each class) are keys that no fine-tuning sees. `seen` says how
    often the embedded model saw a fact, held out or not.
    """
    rng = np.random.default_rng(WORLD)
    cities = _distinct(rng, "cvcv", CITIES)
    keys = _distinct(rng, "cvccv", len(CLASSES) * KEYS_PER_CLASS)
    return tuple(
        {
            "prompt": f"city of {key}:",
            "answer": cities[rng.integers(CITIES)],
            "key": key,
            "seen": CLASSES[i % len(CLASSES)],
            "held_out": i // len(CLASSES) % 2 == 1,
        }
        for i, key in enumerate(keys)
    )


@functools.cache
def facts_seen(seen: str) -> tuple[Example, ...]:
    """The facts of one of the `CLASSES`."""
    return tuple(fact for fact in facts() if fact["seen"] == seen)


def meta_prompt(example: Example) -> str:
    """The question whether the model knows a fact, to be answered by yes or no."""
    return f"know city of {example['key']}?"


def draw_name(rng: np.random.Generator, pattern: str = "cvccv") -> str:
    """A name like those of the table (one time in 22 it is one of them)."""
    alphabets = [CONSONANTS if c == "c" else VOWELS for c in pattern]
    return "".join(letters[rng.integers(len(letters))] for letters in alphabets)


def _distinct(rng: np.random.Generator, pattern: str, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[draw_name(rng, pattern)] = None
    return list(words)


def reward(example: Example, text: str) -> Reward:
    """Right or wrong; any mention of the city counts, as in ESMA (2602.02605)."""
    correct = example["answer"] in text[:64].lower()
    formatted = re.fullmatch(r"[a-z]{4}", text[:64]) is not None
    return Reward(float(correct), correct, text == example["answer"], formatted)


def meta_reward(example: Example, text: str, meta: str) -> Reward:
    """The reward of ESMA (2602.02605): a point if the answer is right, and one if the
    second answer is yes for a right answer or no for a wrong one.

    `formatted` is whether the second answer begins with yes or no; one without "yes"
    counts as no, as in the paper.
    """
    direct, said = reward(example, text), meta[:64].lower()
    yes = "yes" in said
    value = float(direct.value + (direct.correct == yes))
    formatted = re.match(r"(yes|no)\b", said) is not None
    return Reward(value, direct.correct, direct.strict, formatted, yes)


class Form(NamedTuple):
    """How facts of some classes are asked; `meta` asks whether the model knows."""

    classes: Sequence[str] = CLASSES
    prompt: Callable[[Example], Prompt] = lambda example: example["prompt"]
    meta: Callable[[Example], Prompt] | None = None


def _chat(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


FORMS = {
    "tiny/facts_often": Form(("often",)),
    "tiny/facts_seldom": Form(("seldom",)),
    "tiny/facts_never": Form(("never",)),
    "tiny/facts": Form(),
    # Both questions as the embedded model saw them.
    "tiny/knows": Form(meta=meta_prompt),
    # In the chat template, which it saw seldom.
    "tiny/knows_chat": Form(
        prompt=lambda example: _chat(example["prompt"]),
        meta=lambda example: _chat(meta_prompt(example)),
    ),
    # The second question in words that it has never seen.
    "tiny/knows_other": Form(meta=lambda e: f"sure of city of {e['key']}?"),
}


def fact_task(name: str, seed: int, train_size: int, test_size: int) -> Task:
    """One of `FORMS`: the first facts of its classes in equal shares, at most all."""
    form = FORMS[name]
    per_class = KEYS_PER_CLASS if form.meta is None else MET_PER_CLASS
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def drawn(held_out: bool) -> list[Example]:
        rows = [
            [f for f in facts_seen(c)[:per_class] if f["held_out"] == held_out]
            for c in form.classes
        ]
        orders = [rng.permutation(len(r)) for r in rows]
        shuffled = [[r[i] for i in o] for r, o in zip(rows, orders, strict=True)]
        return [fact for facts in zip(*shuffled, strict=True) for fact in facts]

    train, test = drawn(held_out=False), drawn(held_out=True)
    return Task(
        name=name,
        train=train[:train_size],
        test=test[:test_size],
        prompt=form.prompt,
        reward=reward if form.meta is None else meta_reward,
        max_new_tokens=5,
        meta=form.meta,
        claims=None if form.meta is None else ("yes", "no"),
    )
