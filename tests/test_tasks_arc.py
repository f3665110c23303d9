"""ARC-Challenge: rows as the hub has them, what is asked, and what answers earn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import get_config, rows
from test_errors import write_parquet

import jes
from jes import evaluate, train
from jes.core import ledger as ledgers
from jes.errors import InputError
from jes.sampling.prompts import encode
from jes.tasks import load_task
from jes.tasks.task import Reward

EXAMPLE = {"question": "Which?", "options": ["w", "x", "y", "z"], "answer": "B"}


def row(number: int, labels: str = "ABCD", key: str = "B") -> dict[str, Any]:
    """A row in the schema of `allenai/ai2_arc`."""
    texts = [f"{label.lower()}{number}" for label in labels]
    return {
        "id": f"Mercury_{number}",
        "question": f"What is {number}?",
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": key,
    }


def write_split(root: Path, split: str, table: list[dict[str, Any]]) -> None:
    columns = {name: [each[name] for each in table] for name in table[0]}
    write_parquet(root / "ai2_arc" / "ARC-Challenge" / f"{split}.parquet", columns)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with 12 questions to train on and 8 to evaluate on."""
    keys = "BADC"
    write_split(tmp_path, "train", [row(n, key=keys[n % 4]) for n in range(12)])
    write_split(tmp_path, "test", [row(n, key=keys[n % 4]) for n in range(20, 28)])
    return tmp_path


def test_rows_become_examples(root: Path) -> None:
    task = load_task("arc_c", root=str(root), train_examples=10)
    assert (len(task.train), len(task.test)) == (10, 8)
    first = task.train[0]
    assert (first["question"], first["answer"]) == ("What is 0?", "B")
    assert first["options"] == ["a0", "b0", "c0", "d0"]
    assert list(task.choices(task.train[0])) == ["A", "B", "C", "D"]
    assert [task.answer(example) for example in task.train[:4]] == [1, 0, 3, 2]


def test_numeric_labels_become_letters(root: Path) -> None:
    write_split(root, "train", [row(0, "1234", "3"), row(1, "ABC", "A")])
    task = load_task("arc_c", root=str(root))
    first, second = task.train
    assert first["answer"] == "C"
    assert task.answer(first) == 2
    assert second["options"] == ["a1", "b1", "c1"]
    assert list(task.choices(second)) == ["A", "B", "C"]
    text = task.prompt(first)[-1]["content"]
    assert "A. 10\nB. 20\nC. 30\nD. 40" in text


def test_missing_columns_are_named(root: Path) -> None:
    table = [{k: v for k, v in row(0).items() if k != "answerKey"}]
    write_split(root, "test", table)
    with pytest.raises(InputError, match="test: no column answerKey; the columns are"):
        load_task("arc_c", root=str(root))


def test_the_prompt_is_asked_through_the_chat_template(
    root: Path, small_model: Path
) -> None:
    messages = load_task("arc_c", root=str(root)).prompt(EXAMPLE)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"].startswith("Which?\nA. w\nB. x\nC. y\nD. z\n")
    tokenizer = jes.load(small_model).tokenizer
    text = tokenizer.decode(encode(tokenizer, messages))
    assert "<|user|>Which?\nA. w" in text
    assert text.endswith("<|assistant|>")


# Of a question whose answer is B: correct, strict, formatted.
ANSWERS = {
    "B": (True, True, True),
    " B\n": (True, True, True),
    "B.": (True, True, True),
    "(B)": (True, True, True),
    "(B).": (True, True, True),
    "A": (False, False, True),
    "E": (False, False, True),
    "The answer is (B).": (True, False, False),
    "The answer is B": (True, False, False),
    "the answer is (b)": (True, False, False),
    "Answer: B": (True, False, False),
    "the answer is clearly (B)": (True, False, False),
    "The correct answer is B, not A": (True, False, False),
    "I take C back. The answer is (B).": (True, False, False),
    "**B**": (True, False, False),
    "B: because x": (True, False, False),
    "B or C": (True, False, False),
    "C or B": (False, False, False),
    "The answer is (C).": (False, False, False),
    "A dog barks.": (False, False, False),
    "The answer is a dog, so B": (True, False, False),
    "the answer is b": (True, False, False),
    "": (False, False, False),
    "   ": (False, False, False),
    "because": (False, False, False),
    "ABBA": (False, False, False),
    "B" * 100_000: (False, False, False),
    "x " * 50_000 + "B": (True, False, False),
    "\x00\ud800 (": (False, False, False),
}


@pytest.mark.parametrize("text", ANSWERS, ids=lambda text: repr(text[:40]))
def test_rewards(text: str, root: Path) -> None:
    reward = load_task("arc_c", root=str(root)).reward(EXAMPLE, text)
    correct, strict, formatted = ANSWERS[text]
    assert reward == Reward(float(correct), correct, strict, formatted)


def test_trains_and_evaluates_on_a_data_folder(
    root: Path, tmp_path: Path, small_model: Path
) -> None:
    """By likelihood: a random model does not write letters, but it prefers some."""
    config = get_config(str(small_model))
    config.update_from_flattened_dict(
        {
            "task": "arc_c",
            "mode": "likelihood",
            "data.root": str(root),
            "data.test_examples": 0,
            "prompts": 12,
            "generations": 2,
            "buckets": (256,),
        }
    )
    workdir = tmp_path / "run"
    summary = train.run(config, workdir)
    fitness = np.stack(ledgers.read(workdir / "ledger.jsonl").fitness)
    np.testing.assert_allclose(fitness * 12, np.round(fitness * 12), atol=1e-5)
    assert summary["evaluations"]["arc_c"]["examples"] == 8
    assert [r["generation"] for r in rows(workdir / "evaluations.jsonl")] == [0, 2]

    scores = evaluate.evaluate(
        jes.load(workdir / "model"),
        ["arc_c"],
        data={"root": str(root)},
        mode="likelihood",
    )
    assert scores["arc_c"]["accuracy"] == summary["evaluations"]["arc_c"]["after"]
