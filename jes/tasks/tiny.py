"""The tiny world: small synthetic tasks that mirror the real ones.

The embedded model (`jes.pretrain`) is trained on them, and everything the papers
claim can be shown on them in minutes on two CPU cores. Three parts:

- prior tasks, which the embedded model has learned: `tiny/add`, `tiny/subtract`,
  `tiny/reverse`, `tiny/sort`, `tiny/max`, `tiny/facts_often`;
- target tasks, left for ES, of which it has seen little (`tiny/min`,
  `tiny/countdown`, `tiny/rules`) or nothing (`tiny/last`, `tiny/rotate`);
- knowledge: `tiny/facts_seldom` and `tiny/facts_never`, and `tiny/facts` with all
  three classes; `tiny/knows`, which also asks whether the model knows, and the same
  in other prompts, `tiny/knows_chat` and `tiny/knows_other` (see
  `jes.tasks.tiny_facts`).

Prompts are raw strings. Whether an example is held out is a property of its text
(`held_out`), so that the test sets share nothing with the train sets, whatever the
seed, nor with what the embedded model was trained on.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from jes.tasks import tiny_countdown, tiny_facts, tiny_rules
from jes.tasks.task import Example, Reward, Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LABELS = ("a", "b", "c")
HELD_OUT_SHARE = 8
"""One prompt in so many is held out."""
READ = 64
"""Characters of an answer that lenient extraction reads."""


class Kind(NamedTuple):
    """How one family of examples is made and scored.

    Attributes:
      draw: a random example, with at least the fields `prompt` and `answer`.
      reward: as in `Task`.
      max_new_tokens: the longest right answer and its end-of-text token.
      choices: the possible answers, where there are few.
    """

    draw: Callable[[np.random.Generator], Example]
    reward: Callable[[Example, str], Reward]
    max_new_tokens: int
    choices: tuple[str, ...] | None = None


def held_out(example: Example) -> bool:
    """Whether an example belongs to the test sets: a stable hash of its text decides.

    The text is the prompt, or the field `same_as` where several prompts ask the same.
    """
    text = example.get("same_as", example["prompt"])
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def tiny_task(
    name: str, seed: int = 0, *, train_size: int = 4096, test_size: int = 512
) -> Task:
    """The task `tiny/<kind>`, with distinct examples drawn from `seed`.

    For the fact tasks the examples are the keys of one fixed table, which the
    embedded model has learned in part; `seed` only orders them.

    Raises:
      ValueError: for an unknown name, or more examples than the task has.
    """
    if name not in TINY_TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TINY_TASKS)}")
    if name not in KINDS:
        return tiny_facts.fact_task(name, seed, train_size, test_size)
    kind = KINDS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    train, test = _split(kind, rng, train_size, test_size, name)
    choices = kind.choices
    return Task(
        name=name,
        train=train,
        test=test,
        prompt=lambda example: example["prompt"],
        reward=kind.reward,
        max_new_tokens=kind.max_new_tokens,
        choices=None if choices is None else lambda example: choices,
        answer=None if choices is None else lambda ex: choices.index(ex["answer"]),
    )


def _split(
    kind: Kind, rng: np.random.Generator, train_size: int, test_size: int, name: str
) -> tuple[Sequence[Example], Sequence[Example]]:
    sets: tuple[dict[str, Example], dict[str, Example]] = ({}, {})
    sizes = (train_size, test_size)
    for _ in range(20 * (train_size + HELD_OUT_SHARE * test_size)):
        example = kind.draw(rng)
        side = int(held_out(example))
        if len(sets[side]) < sizes[side]:
            sets[side].setdefault(example["prompt"], example)
        elif len(sets[1 - side]) == sizes[1 - side]:
            return tuple(sets[0].values()), tuple(sets[1].values())
    raise ValueError(
        f"{name} has too few different examples for {train_size} to train on and "
        f"{test_size} held out"
    )


def _add(rng: np.random.Generator) -> Example:
    """`12+34=`, answered by `46`."""
    a, b = rng.integers(0, 100, 2).tolist()
    same_as = f"{min(a, b)}+{max(a, b)}="
    return {"prompt": f"{a}+{b}=", "answer": str(a + b), "same_as": same_as}


def _subtract(rng: np.random.Generator) -> Example:
    """`34-12=`, answered by `22` (never below zero)."""
    b, a = sorted(rng.integers(0, 100, 2).tolist())
    return {"prompt": f"{a}-{b}=", "answer": str(a - b)}


def _of_word(
    verb: str, answer: Callable[[str], str], rng: np.random.Generator
) -> Example:
    """`reverse kdzb:`, answered by `bzdk`; 3 to 5 letters."""
    letters = rng.integers(0, len(LETTERS), rng.integers(3, 6))
    word = "".join(LETTERS[i] for i in letters)
    return {"prompt": f"{verb} {word}:", "answer": answer(word)}


def _of_numbers(
    verb: str, best: Callable[[np.ndarray], int], rng: np.random.Generator
) -> Example:
    """Multiple choice: `max a)12 b)4 c)9:`, answered by the label, `a`."""
    numbers = rng.choice(99, len(LABELS), replace=False) + 1
    options = " ".join(f"{x}){n}" for x, n in zip(LABELS, numbers, strict=True))
    return {"prompt": f"{verb} {options}:", "answer": LABELS[best(numbers)]}


def number_reward(example: Example, text: str) -> Reward:
    """Right or wrong; the answer is the first whole number in the text."""
    found = re.search(r"(?a:-?\d+)", text[:READ])
    correct = found is not None and found[0] == example["answer"]
    formatted = re.fullmatch(r"(?a:\d{1,3})", text[:READ]) is not None
    return Reward(float(correct), correct, text == example["answer"], formatted)


def word_reward(example: Example, text: str) -> Reward:
    """The share of places with the right letter, a half at most unless all are right.

    Partial credit, because half a word is nearer to an answer than none. The answer
    is the first run of letters in the text.
    """
    answer = example["answer"]
    found = re.search(r"[a-z]+", text[:READ].lower())
    word = found[0] if found else ""
    correct = word == answer
    places = sum(a == b for a, b in zip(word, answer, strict=False))
    value = 1.0 if correct else 0.5 * places / max(len(word), len(answer))
    formatted = re.fullmatch(r"[a-z]{1,5}", text[:READ]) is not None
    return Reward(value, correct, text == answer, formatted)


def label_reward(example: Example, text: str) -> Reward:
    """Right or wrong; the answer is the first word, if it is one of the labels."""
    found = re.match(r"[^0-9A-Za-z]*([abc])(?![0-9a-z])", text[:READ].lower())
    correct = found is not None and found[1] == example["answer"]
    strict = text == example["answer"]
    return Reward(float(correct), correct, strict, text in LABELS)


WORDS: dict[str, tuple[Callable[[str], str], int]] = {
    "reverse": (lambda word: word[::-1], 6),
    "sort": (lambda word: "".join(sorted(word)), 6),
    "last": (lambda word: word[-1], 3),
    "rotate": (lambda word: word[1:] + word[:1], 6),
}
"""Tasks on a word: the answer, and room for it."""
KINDS: dict[str, Kind] = {
    "tiny/add": Kind(_add, number_reward, 4),
    "tiny/subtract": Kind(_subtract, number_reward, 3),
    **{
        f"tiny/{verb}": Kind(partial(_of_word, verb, answer), word_reward, room)
        for verb, (answer, room) in WORDS.items()
    },
    "tiny/max": Kind(partial(_of_numbers, "max", np.argmax), label_reward, 2, LABELS),
    "tiny/min": Kind(partial(_of_numbers, "min", np.argmin), label_reward, 2, LABELS),
    "tiny/countdown": Kind(tiny_countdown.draw, tiny_countdown.reward, 8),
    "tiny/rules": Kind(tiny_rules.draw, tiny_rules.reward, 8, tiny_rules.TRUTHS),
}
TINY_TASKS = (*KINDS, *tiny_facts.FORMS)
