"""The tasks on the rows of the real data sets, where these are at hand.

Run with JES_DATA=FOLDER, a folder as `config.data.root` takes it; and for the tests
that let a random model answer every row, with JES_TOKENIZER=FOLDER, a folder with the
tokenizer of Qwen2.5.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import write_checkpoint

import jes
from jes.models.shapes import QWEN2
from jes.models.weights import Pretrained
from jes.questions import Evaluation, longest, prepare
from jes.rollout import examine
from jes.sampling.generate import Sampling
from jes.studies.paper_configs import forgetting_config
from jes.tasks import Example, Task, load_task

ROOT = os.environ.get("JES_DATA", "")
TOKENIZER = os.environ.get("JES_TOKENIZER", "")
SECONDS = 60.0
"""For reading, asking and scoring all rows of all tasks."""

pytestmark = pytest.mark.skipif(
    not ROOT, reason="set JES_DATA to a folder of parquet files of the data sets"
)

# Task -> the rows to train on and held out.
COUNTS = {
    "arc_c": (1056, 1172),
    "arc_c_cot": (1056, 1172),
    "conciseness": (2, 8),
    "countdown": (200, 2000),
    "gsm8k": (200, 500),
    "hellaswag": (0, 2048),
    "mmlu_pro": (0, 2048),
    "nq_open": (0, 3610),
    "piqa": (0, 1838),
    "proofwriter": (200, 1000),
    "trivia_qa": (2000, 1000),
    "web_questions": (3778, 2032),
    "winogrande": (0, 1267),
}
ASKED_TWICE = ("nq_open", "trivia_qa", "web_questions")


UNSOLVABLE = 14
"""Countdown problems, all held out, that no expression solves: 99.3 % is the most."""


def reference(name: str, example: Example) -> str:
    """The right answer as it was asked for."""
    answer = example.get("answer")
    if name in ASKED_TWICE:
        return example["answers"][0]
    if name in ("arc_c_cot", "mmlu_pro"):
        return f"Let me see.\nThe answer is ({answer})."
    if name == "gsm8k":
        return f"Let me see.\n#### {answer:,.12g}"
    if name == "proofwriter":
        return f"Let me see.\nAnswer: {answer}"
    if name == "countdown":
        return f" Let me see.</think>\n<answer> {solution(example)} </answer>"
    return str(answer)


def wrong(name: str, example: Example) -> str:
    """A wrong answer as it was asked for."""
    answer = example.get("answer")
    if name == "gsm8k":
        return f"#### {answer + 1:.12g}"
    if name == "proofwriter":
        return f"Answer: {'False' if answer == 'True' else 'True'}"
    if name == "countdown":
        return f" </think>\n<answer> {example['numbers'][0]} </answer>"
    if name == "conciseness":
        return "I do not know."
    if name in ASKED_TWICE:
        return "\u2603"  # letters and digits are aliases of something
    other = next(o for o in ("A", "B") if o != answer)
    if name in ("hellaswag", "piqa", "winogrande"):
        other = next(o for o in ("1", "2") if o != answer)
    return reference(name, {**example, "answer": other})


def solution(example: Example) -> str | None:
    """An expression that solves a countdown problem, by trying all."""
    terms = [(float(n), str(n)) for n in example["numbers"]]
    return _search(terms, float(example["target"]))


def _search(terms: list[tuple[float, str]], target: float) -> str | None:
    if len(terms) == 1:
        (value, text) = terms[0]
        return text if abs(value - target) < 1e-6 else None
    for i, (a, left) in enumerate(terms):
        for j, (b, right) in enumerate(terms):
            if i == j:
                continue
            rest = [t for k, t in enumerate(terms) if k not in (i, j)]
            made = [(a - b, f"({left} - {right})")]
            if b:
                made.append((a / b, f"({left} / {right})"))
            if i < j:
                made.append((a + b, f"({left} + {right})"))
                made.append((a * b, f"({left} * {right})"))
            for term in made:
                if found := _search([*rest, term], target):
                    return found
    return None


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name, root=ROOT) for name in COUNTS}


def test_row_counts(tasks: dict[str, Task]) -> None:
    counts = {name: (len(t.train), len(t.test)) for name, t in tasks.items()}
    assert counts == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_every_row_is_asked_and_scored(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    unsolvable = 0
    for example in (*task.train, *task.test):
        *_, last = task.prompt(example)
        assert last["content"].strip()
        said = () if task.meta is None else ("Yes",)
        if name == "countdown" and solution(example) is None:
            unsolvable += 1
            continue
        right = task.reward(example, reference(name, example), *said)
        assert (right.correct, right.strict) == (True, True), example
        other = task.reward(example, wrong(name, example), *said)
        nothing = task.reward(example, "", *said)
        for reward in (other, nothing):
            assert (reward.correct, reward.strict) == (False, False), example
            assert reward.value < right.value
        if name != "conciseness":
            assert right.value >= 1
            assert nothing.value == 0
            assert other.value <= 0.1
        if task.choices is not None and task.answer is not None:
            assert 0 <= task.answer(example) < len(task.choices(example))
    assert unsolvable == (UNSOLVABLE if name == "countdown" else 0)


def test_all_of_it_takes_less_than_a_minute() -> None:
    start = time.perf_counter()
    for name in COUNTS:
        task = load_task(name, root=ROOT)
        for example in (*task.train, *task.test):
            task.prompt(example)
            # A text as long as answers get, so that extraction reads all it reads.
            text = "some of my thoughts, 1 by 1. " * 400
            task.reward(example, text, *(() if task.meta is None else (text,)))
    taken = time.perf_counter() - start
    print(f"{taken:.1f} s")
    assert taken < SECONDS


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """One layer of random weights behind the real vocabulary of 151936 words."""
    if not TOKENIZER:
        pytest.skip("set JES_TOKENIZER to a folder with the tokenizer of Qwen2.5")
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
    }
    folder = tmp_path_factory.mktemp("random")
    write_checkpoint(folder, QWEN2 | shape, tokenizer=Path(TOKENIZER), dtype="float32")
    return jes.load(folder)


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_answers_every_row(
    name: str, tasks: dict[str, Task], pretrained: Pretrained
) -> None:
    """Through the chat template, the buckets of the configs, decoding and scoring."""
    buckets = tuple(forgetting_config("countdown", None).buckets)
    evaluation = Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=tasks[name],
        sampling=Sampling(eos_ids=pretrained.eos_ids, max_new_tokens=3),
        buckets=buckets,
    )
    prepare(evaluation, tasks[name].train)
    questions = prepare(evaluation, tasks[name].test)
    assert len(questions) == COUNTS[name][1]
    size = 4 if name == "mmlu_pro" else 64
    score = examine(evaluation, pretrained.params, questions, batch_size=size)
    print(f"{name}: longest prompt {longest(questions)} tokens")
    asked_twice = name in ASKED_TWICE
    assert np.isfinite(score[:6]).all()
    assert np.isfinite([score.hits, score.false_alarms]).all() == asked_twice
    assert score.tokens > 0
    # Random words: hardly ever right, and never in a format of several words.
    assert score.accuracy < 0.5
    if name in ("gsm8k", "countdown", "proofwriter", "arc_c_cot", "mmlu_pro"):
        assert score.strict == 0
