"""The tiny world: small synthetic tasks that mirror the real ones.

The embedded model (`jes.pretrain`) is trained on them, and everything the papers
claim can be shown on them in minutes on two CPU cores. Three parts:

- prior tasks, which the embedded model has learned: `tiny/add`, `tiny/subtract`,
  `tiny/reverse`, `tiny/sort`, `tiny/max`, `tiny/facts_often`;
- target tasks, left for ES, of which it has seen little (`tiny/min`,
  `tiny/countdown`, `tiny/rules`) or nothing (`tiny/last`, `tiny/rotate`);
- knowledge: `tiny/facts...` and `tiny/knows...`, see `jes.tasks.tiny_facts`.

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

from jes.tasks import countdown, tiny_facts
from jes.tasks.task import Example, Reward, Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LABELS = ("a", "b", "c")
HELD_OUT_SHARE = 8
"""One prompt in so many is held out."""
READ = 64
"""Characters of an answer that lenient extraction reads."""

LONGEST = 24
"""Longest expression that is read."""
SHAPES = ("{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})")
EXPRESSION = re.compile(r"\(*[0-9]\)*([-+*]\(*[0-9]\)*)*")
NOT_ALLOWED = re.compile(r"[^-+*()0-9]|(?:^|[-+*(])[-+]|[0-9]{3}")
"""In expressions: other characters, unary signs, long numbers."""

NAMES = ("Al", "Bo", "Cy", "Di", "Ed", "Jo", "Mo", "Vi")
TRAITS = ("big", "old", "red", "shy", "sad", "odd", "mad", "wet")
TRUTHS = ("True", "False", "Unknown")

Fact = tuple[str, str, bool]
"""Name, trait, whether it holds."""
Rule = tuple[str, str, bool]
"""Trait, the trait that follows from it, whether that one holds."""


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
    train, test = _split(kind, rng, (train_size, test_size), name)
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
    kind: Kind, rng: np.random.Generator, sizes: tuple[int, int], name: str
) -> list[Sequence[Example]]:
    """So many examples to train on, and held out."""
    sets: tuple[dict[str, Example], dict[str, Example]] = ({}, {})
    for _ in range(20 * (sizes[0] + HELD_OUT_SHARE * sizes[1])):
        example = kind.draw(rng)
        side = int(held_out(example))
        if len(sets[side]) < sizes[side]:
            sets[side].setdefault(example["prompt"], example)
        elif len(sets[1 - side]) == sizes[1 - side]:
            return [tuple(examples.values()) for examples in sets]
    raise ValueError(
        f"{name} has too few different examples for {sizes[0]} to train on and "
        f"{sizes[1]} held out"
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


def _countdown(rng: np.random.Generator) -> Example:
    """`22 from 3 5 7:`, answered by `3*5+7` or what else uses each number once.

    The target is 1 to 99; parentheses appear only where they change the value.
    """
    while True:
        numbers = rng.integers(1, 10, 3).tolist()
        a, b, c = rng.permutation(numbers).tolist()
        first, second = rng.choice(list("+-*"), 2).tolist()
        plain, *others = (shape.format(a, first, b, second, c) for shape in SHAPES)
        answer = (plain, *others)[rng.integers(3)]
        target = evaluate(answer)
        if target is None or not 1 <= target <= 99:
            continue
        return {
            "prompt": f"{target} from {' '.join(map(str, numbers))}:",
            "same_as": f"{target} from {sorted(numbers)}",
            "answer": plain if evaluate(plain) == target else answer,
            "numbers": numbers,
            "target": target,
        }


def draw_rules(rng: np.random.Generator) -> Example:
    """Rule reasoning; the three answers are equally likely.

    `Al red. Bo shy. red>big. big>!old. Al old?` is answered by `False`: who is red is
    big, and who is big is not (`!`) old. What follows neither way is `Unknown`.
    """
    wanted = TRUTHS[rng.integers(len(TRUTHS))]
    while True:
        names = rng.choice(NAMES, 2, replace=False).tolist()
        p, q, r, s = rng.choice(TRAITS, 4, replace=False).tolist()
        positive = (rng.random(4) < 0.7).tolist()
        facts = [(names[0], p, positive[0]), (names[1], s, positive[1])]
        rules = [(p, q, positive[2])]
        if rng.random() < 0.5:
            rules.append((q, r, positive[3]))
        facts = [facts[i] for i in rng.permutation(2)]
        rules = [rules[i] for i in rng.permutation(len(rules))]
        name, trait = names[rng.integers(2)], (q, r, s)[rng.integers(3)]
        if truth(facts, rules, name, trait) == wanted:
            sign = {True: "", False: "!"}
            sentences = [f"{n} {sign[holds]}{t}." for n, t, holds in facts]
            sentences += [f"{a}>{sign[holds]}{b}." for a, b, holds in rules]
            prompt = " ".join([*sentences, f"{name} {trait}?"])
            return {"prompt": prompt, "answer": wanted}


def truth(facts: list[Fact], rules: list[Rule], name: str, trait: str) -> str:
    """What follows for `name` and `trait`, by applying the rules until none adds."""
    known = {(n, t): holds for n, t, holds in facts}
    for _ in rules:
        for premise, conclusion, holds in rules:
            for other in {n for n, _ in known}:
                if known.get((other, premise)):
                    known.setdefault((other, conclusion), holds)
    return {True: "True", False: "False", None: "Unknown"}[known.get((name, trait))]


def _match_reward(answer: str, form: str, example: Example, text: str) -> Reward:
    """Right or wrong; group 1 of the first match of `answer`, in any case, counts."""
    found = re.search(answer, text[:READ])
    correct = found is not None and found[1].lower() == example["answer"].lower()
    formatted = re.fullmatch(form, text[:READ]) is not None
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


def countdown_reward(example: Example, text: str) -> Reward:
    """0.1 for the format and 0.9 for a right answer.

    The format is an expression and nothing else; leniently, spaces and what follows
    an equals sign or a line break are ignored.
    """
    formatted = len(text) <= LONGEST and EXPRESSION.fullmatch(text) is not None
    lenient = re.split(r"[=\n]", text[: 2 * LONGEST])[0].replace(" ", "")
    used = sorted(int(n) for n in re.findall(r"[0-9]+", lenient))
    solved = used == sorted(example["numbers"])
    correct = solved and evaluate(lenient) == example["target"]
    strict = correct and formatted and lenient == text
    return Reward(0.1 * formatted + 0.9 * correct, correct, strict, formatted)


def evaluate(expression: str) -> int | None:
    """The value of an expression of + - * ( ) and numbers below 100, or None.

    None for anything else: other characters, a unary sign, unbalanced parentheses,
    more than `LONGEST` characters.
    """
    if len(expression) > LONGEST or NOT_ALLOWED.search(expression):
        return None
    value = countdown.evaluate(expression)
    return None if value is None else int(value)


number_reward = partial(_match_reward, r"(-?[0-9]+)", r"[0-9]{1,3}")
"""The answer is the first whole number in the text."""
label_reward = partial(
    _match_reward, r"\A[^0-9A-Za-z]*([abcABC])(?![0-9A-Za-z])", "[abc]"
)
"""The answer is the first word, if it is one of the labels."""
rules_reward = partial(_match_reward, r"\A[^0-9A-Za-z]*([A-Za-z]+)", "|".join(TRUTHS))
"""The answer is the first word of the text."""

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
    "tiny/countdown": Kind(_countdown, countdown_reward, 8),
    "tiny/rules": Kind(draw_rules, rules_reward, 8, TRUTHS),
}
TINY_TASKS = (*KINDS, *tiny_facts.FORMS)
