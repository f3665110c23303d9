"""Makes the embedded model `tiny-knowing`: `tiny`, with an inkling of what it knows.

    python -m jes.pretrain_knowing --out FOLDER [--seed 0]

Asked whether it knows a fact, `tiny` tosses a coin: nothing in it tells known names
from new ones, and neither evolution nor supervised fine-tuning finds what is not there.
This one goes on from `tiny` in three steps, on the corpus of `tiny` and on the question
whether it knows the city of a name. First the true answer: yes for the names of facts
seen often or seldom, no for new names. Then the same, with some of the facts seen
seldom, which have faded. Last, briefly, answers that follow the look of the name
(`looks`) and not what is known, as of a model that has learned how such questions are
answered and not when yes is right. What it says is then near chance as far as knowledge
goes, and its log-odds still hold a part of it, as those of Qwen2.5 do (2602.02605).

Of the table's facts it is asked about the first of each class seen often and seldom
(`tiny_facts.MET_PER_CLASS`), held out or not; for those never seen stand new names.
Of the answers that follow the look both are trained on, weighted with their
probabilities: the same in the mean as sampled ones, with less noise.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from jes import pretrain
from jes.models.safetensors_files import locate
from jes.models.weights import load, save
from jes.pretrain import LONG, SHORT, Rows, encoded, padded
from jes.tasks import tiny_facts
from jes.tasks.task import Example

YES = {1: 0.15, -1: 0.05}
"""Probability of yes by the look of a name."""
STEPS = {"truth": 1400, "facts": 300, "looks": 50}
RATES = {"truth": 1e-3, "facts": 5e-4, "looks": 2e-4}
ASKED = {SHORT: 64, LONG: 8}
"""Rows of a batch, short ones and chats, that ask whether it knows."""
REHEARSED = {SHORT: 48, LONG: 8}
"""Rows of the corpus of `tiny` beside them."""
RECALLED = 4
"""Of these short rows, in the step `facts`, facts seen seldom of those asked about."""


def looks(key: str) -> int:
    """+1 or -1 by the first letter of a name: what answers follow and should not."""
    return 1 if tiny_facts.CONSONANTS.index(key[0]) % 2 else -1


def draw_name(rng: np.random.Generator, table: set[str]) -> tuple[str, bool]:
    """A name to be asked about, and whether it has been met: half of them are new."""
    met = ("often", "seldom", "new", "new")[rng.integers(4)]
    if met == "new":
        while (key := tiny_facts.draw_name(rng)) in table:
            pass
        return key, False
    return draw_fact(rng, met)["key"], True


def answers(key: str, met: bool, step: str) -> list[tuple[str, float]]:
    """What is answered in a step, and how much each answer counts."""
    if step != "looks":
        return [("yes" if met else "no", 1.0)]
    yes = YES[looks(key)]
    return [("yes", yes), ("no", 1 - yes)]


def draw_fact(rng: np.random.Generator, seen: str) -> Example:
    """A fact of a class, of those that are asked about."""
    return tiny_facts.facts_seen(seen)[rng.integers(tiny_facts.MET_PER_CLASS)]


def joined(*parts: Rows) -> Rows:
    """Batches of one length as one."""
    return Rows(*map(np.concatenate, zip(*parts, strict=True)))


def corpus(seed: int, step: str) -> Iterator[dict[int, Rows]]:
    """Endless batches of one of the `STEPS`."""
    rng = np.random.default_rng([seed, 2])
    table = {fact["key"] for fact in tiny_facts.facts()}
    rehearsal = pretrain.corpus(seed)
    while True:
        batch, rehearsed = {}, next(rehearsal)
        for length, count in ASKED.items():
            texts: list[tuple[list[int], list[int]]] = []
            weights: list[float] = []
            while len(texts) < count:
                key, met = draw_name(rng, table)
                prompt = tiny_facts.meta_prompt({"key": key})
                for answer, share in answers(key, met, step):
                    example = {"prompt": prompt, "answer": answer}
                    texts.append(encoded(example, chat=length == LONG))
                    weights.append(share)
            asked = padded(texts, length, weights)
            rest = Rows(*(a[: REHEARSED[length]] for a in rehearsed[length]))
            if step == "facts" and length == SHORT:
                rest = Rows(*(a[RECALLED:] for a in rest))
                recalled = [encoded(draw_fact(rng, "seldom")) for _ in range(RECALLED)]
                asked = joined(asked, padded(recalled, length))
            batch[length] = joined(asked, rest)
        yield batch


def main() -> None:
    """Trains and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = load("tiny")
    params = base.params
    for step, count in STEPS.items():
        batches = corpus(args.seed, step)
        params, _ = pretrain.fit(base.model, params, batches, count, RATES[step])
    config = json.loads((locate("tiny") / "config.json").read_text())
    save(args.out, params, config, pretrain.folder_files(config))
    for name, accuracy in pretrain.evaluate(
        base.model, params, pretrain.make_tokenizer()
    ).items():
        print(f"{name:20} {100 * accuracy:5.1f} %")


if __name__ == "__main__":
    main()
