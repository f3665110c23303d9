"""Rule reasoning in miniature: facts, one or two rules, a question.

`Al red. Bo shy. red>big. big>!old. Al old?` is answered by `False`: who is red is
big, and who is big is not (`!`) old. What follows neither way is `Unknown`.
"""

import re

import numpy as np

from jes.tasks.task import Example, Reward

NAMES = ("Al", "Bo", "Cy", "Di", "Ed", "Jo", "Mo", "Vi")
TRAITS = ("big", "old", "red", "shy", "sad", "odd", "mad", "wet")
TRUTHS = ("True", "False", "Unknown")

Fact = tuple[str, str, bool]
"""Name, trait, whether it holds."""
Rule = tuple[str, str, bool]
"""Trait, the trait that follows from it, whether that one holds."""


def draw(rng: np.random.Generator) -> Example:
    """A little world and a question; the three answers are equally likely."""
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
        asked = (names[rng.integers(2)], (q, r, s)[rng.integers(3)])
        if truth(facts, rules, *asked) == wanted:
            return {"prompt": _prompt(facts, rules, *asked), "answer": wanted}


def truth(facts: list[Fact], rules: list[Rule], name: str, trait: str) -> str:
    """What follows for `name` and `trait`, by applying the rules until none adds."""
    known = {(n, t): holds for n, t, holds in facts}
    for _ in rules:
        for premise, conclusion, holds in rules:
            for other in {n for n, _ in known}:
                if known.get((other, premise)):
                    known.setdefault((other, conclusion), holds)
    return {True: "True", False: "False", None: "Unknown"}[known.get((name, trait))]


def _prompt(facts: list[Fact], rules: list[Rule], name: str, trait: str) -> str:
    sign = {True: "", False: "!"}
    sentences = [f"{n} {sign[holds]}{t}." for n, t, holds in facts]
    sentences += [f"{a}>{sign[holds]}{b}." for a, b, holds in rules]
    return " ".join([*sentences, f"{name} {trait}?"])


def reward(example: Example, text: str) -> Reward:
    """Right or wrong; the answer is the first word of the text, in any case."""
    found = re.match(r"[^0-9A-Za-z]*([A-Za-z]+)", text[:64])
    correct = found is not None and found[1].lower() == example["answer"].lower()
    strict = text == example["answer"]
    return Reward(float(correct), correct, strict, text in TRUTHS)
