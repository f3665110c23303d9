"""The second embedded model: what it is trained on, and what it knows of itself."""

import numpy as np
import pytest

import jes
from jes.pretrain import LONG, SHORT, STEPS, TOKENS, knowing_corpus
from jes.studies.knowing import measure
from jes.tasks import load_task, tiny_facts

LETTERS = {i: token for token, i in TOKENS.items()}
ANSWERS = {"yes": 1.0, "no": 0.0}


def texts(batch) -> list[tuple[str, str, float]]:
    """Prompt, answer and weight of every row."""
    out = []
    for row, roles, weight in zip(*batch, strict=True):
        prompt = "".join(LETTERS[i] for i in row[roles == 0])
        answer = "".join(LETTERS[i] for i in row[roles == 1])
        out.append((prompt, answer.removesuffix("<eos>"), float(weight)))
    return out


@pytest.mark.parametrize("step", STEPS)
def test_each_step_answers_as_it_should(step: str) -> None:
    """Truth: met or not. Looks: both answers, by the first letter, adding up to 1."""
    met = {
        fact["key"]
        for seen in ("often", "seldom")
        for fact in tiny_facts.facts_seen(seen)[: tiny_facts.MET_PER_CLASS]
    }
    table = {fact["key"] for fact in tiny_facts.facts()}
    batches = knowing_corpus(0, step)
    rows = [row for _ in range(5) for row in texts(next(batches)[SHORT])[:64]]
    assert len(rows) == 320
    shares: dict[str, float] = {}
    for prompt, answer, weight in rows:
        key = prompt.removeprefix("know city of ").removesuffix("?")
        assert (key in met) == (key in table)  # other names of the table never
        if step == "looks":
            yes = 0.15 if tiny_facts.CONSONANTS.index(key[0]) % 2 else 0.05
            expected = yes if answer == "yes" else 1 - yes
            assert weight == pytest.approx(expected)
            shares[key] = shares.get(key, 0) + weight
        else:
            assert (ANSWERS[answer], weight) == (float(key in met), 1.0)
    assert all(share == pytest.approx(round(share)) for share in shares.values())
    kinds = [prompt for prompt, _, _ in texts(next(batches)[LONG])]
    assert sum(prompt.startswith("<|user|>know city of") for prompt in kinds) >= 8


def test_faded_facts_are_recalled_in_their_step_alone() -> None:
    seldom = {
        fact["prompt"]
        for fact in tiny_facts.facts_seen("seldom")[: tiny_facts.MET_PER_CLASS]
    }

    def count(step: str) -> int:
        batches = knowing_corpus(0, step)
        rows = [row for _ in range(20) for row in texts(next(batches)[SHORT])]
        return sum(prompt in seldom for prompt, _, _ in rows)

    assert count("facts") >= 4 * 20 > 40 > count("truth")


@pytest.mark.slow
def test_the_embedded_model_knows_more_of_itself_than_it_says() -> None:
    """Near chance as it answers (d' below 0.4), above it in its log-odds."""
    pretrained = jes.load("tiny-knowing")
    answers, ways = measure(pretrained, load_task("tiny/knows"))
    assert abs(ways["answers"]["d_prime"]) < 0.4
    low, _ = ways["answers"]["auroc2_interval"]
    assert low > 0.5
    seen = np.array([example["seen"] for example in answers.examples])
    accuracy = {name: answers.correct[seen == name].mean() for name in set(seen)}
    assert accuracy["often"] > 0.95 > accuracy["seldom"] > 0.5
    assert accuracy["never"] < 0.1
    assert all(example["held_out"] for example in answers.examples)
