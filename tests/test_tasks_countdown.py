"""Countdown: rows, prompt, and the grader of the papers, also on hostile text."""

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from test_errors import write_parquet

from jes.errors import InputError
from jes.tasks import countdown, load_task, rows

EXAMPLE = {"numbers": [44, 19, 35], "target": "98"}
ROWS = {
    "id": [0, 1, 2],
    "numbers": [[44, 19, 35], [63, 95, 96], [2, 3, 4, 5]],
    "target": ["98", "27.4", "-11"],
}

# Format, answer as it stands, answer without the white space around it (2509.24372).
GRADES = {
    " a </think>\n<answer> (44 + 19) + 35 </answer>": (1.0, 1, 1),
    " a </think>\n<answer> (44 + 19) + 35 </answer>\n": (1.0, 1, 1),
    " a </think>\n<answer> (44 + 19) + 35 </answer>\n\n": (0.6, 1, 1),
    " a </think> <answer> 44+19+35 </answer>": (0.6, 1, 1),
    "<answer>44+19+35</answer>": (0.5, 1, 1),
    " a </think>\n<answer> 44 + 19 </answer>": (1.0, 0, 0),
    " a </think>\n<answer>\n44+19+35\n</answer>": (1.0, 0, 1),
    " a </think>\n<answer>44+19+35\n</answer>": (1.0, 1, 1),
    " a </think>\n<answer> 44+19+35 = 98 </answer>": (1.0, 0, 0),
    " a </think>\n<answer> 1 </answer> <answer> 44+19+35 </answer>": (1.0, 1, 1),
    " a </think>\n<answer> 44+19+35 </answer> <answer> 1 </answer>": (1.0, 0, 0),
    " a </think>\n<answer> <answer> 44+19+35 </answer>": (1.0, 0, 0),
    " a </think>\n<answer> 044+19+35 </answer>": (1.0, 0, 0),
    " a </think>\n<answer> 44+19+35 </answer> done": (0.6, 1, 1),
    " a </think>\n<answer> 44+19+35": (0.1, 0, 0),
    "</answer> </think>\n<answer>": (0.1, 0, 0),
    " </think>\n<answer></answer>": (1.0, 0, 0),
    "</think>": (0.1, 0, 0),
    "44+19+35": (0, 0, 0),
    "x": (0, 0, 0),
    "": (0, 0, 0),
}


def answer(expression: str) -> str:
    return f" a </think>\n<answer> {expression} </answer>"


@pytest.mark.parametrize("text", GRADES, ids=repr)
def test_grades(text: str) -> None:
    share, right, lenient = GRADES[text]
    reward = countdown.reward(EXAMPLE, text)
    assert reward.value == pytest.approx(0.1 * share + right)
    assert reward.correct == bool(lenient)
    assert reward.formatted == (share == 1.0)
    assert reward.strict == (right == 1 and share == 1.0)


VALUES = {
    "1": 1,
    "(1 + 2) / 3": 1,
    "8/4/2": 1,
    "8-4-2": 2,
    "2+3*4": 14,
    "(2+3)*4": 20,
    "1/3": Fraction(1, 3),
    " ( ( 7 ) ) ": 7,
    "-(3-5)": 2,
    "2--3": 5,
    "0": 0,
}
NOT_EXPRESSIONS = (
    "",
    " ",
    "()",
    "1+",
    "*1",
    "1 2",
    "(1)(2)",
    "(1",
    "1)",
    "2**3",
    "7//2",
    "1/0",
    "1/(2-2)",
    "01",
    "1.5",
    "1e5",
    "x",
    "1\n+2",
    "1=1",
    "\u0661",  # a digit one of another script
    "\u00b2",
    "9**9**9**9",
    "(" * 1000 + "1" + ")" * 1000,
    "(" * 128,
    "-" * 128,
    "1+" * 64,
    "9" * 100_000,
    "\x00\ud800",
    "__import__('os')",
)


@pytest.mark.parametrize("expression", VALUES)
def test_values(expression: str) -> None:
    assert countdown.evaluate(expression) == VALUES[expression]


@pytest.mark.parametrize("expression", NOT_EXPRESSIONS, ids=lambda e: repr(e[:30]))
def test_what_is_no_expression_has_no_value(expression: str) -> None:
    assert countdown.evaluate(expression) is None


def test_targets_that_are_not_whole() -> None:
    example = {"numbers": [137, 5], "target": "27.4"}
    assert countdown.reward(example, answer("137/5")).value == pytest.approx(1.1)
    example = {"numbers": [800, 3], "target": "266.6666666666667"}
    assert countdown.reward(example, answer("800 / 3")).strict
    assert not countdown.reward(example, answer("3 / 800")).correct
    example = {"numbers": [5, 16], "target": "-11"}
    assert countdown.reward(example, answer("5-16")).strict


HOSTILE = (
    *(answer(e) for e in NOT_EXPRESSIONS),
    answer("44+19+35" + " " * 1_000_000),
    answer("(" * 1000 + "44+19+35" + ")" * 1000),
    answer("(" * 60 + "44+19+35" + ")" * 59),
    answer("44/(19-19)*35"),
    answer("\u0664\u0664+19+35"),
    "x" * 1_000_000,
    " \n" * 500_000,
    "<answer>" * 125_000,
    "</answer>" * 125_000,
    "<answer></answer>" * 60_000,
    "</think>\n<answer>" * 60_000,
    "</think>" * 125_000 + "</answer>",
    "<" * 1_000_000,
    "\ud800\x00" * 500_000,
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:40]))
def test_hostile_answers_earn_nothing_in_a_millisecond(text: str) -> None:
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        reward = countdown.reward(EXAMPLE, text)
        taken.append(time.perf_counter() - start)
    assert not reward.correct
    assert not reward.strict
    assert reward.value <= 0.1
    assert min(taken) < 1e-3


def test_the_prompt() -> None:
    system, user, prefill = countdown.prompt(EXAMPLE)
    assert system["role"] == "system"
    assert system["content"].startswith("You are a helpful assistant. You first think")
    assert user["content"] == (
        "Using the numbers [44, 19, 35], create an equation that equals 98. You can "
        "use basic arithmetic operations (+, -, *, /) and each number can only be used "
        "once. Show your work in <think> </think> tags. And return the final answer in "
        "<answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    )
    assert prefill == {
        "role": "assistant",
        "content": "Let me solve this step by step.\n<think>",
    }


def test_rows_of_a_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "countdown" / f"{split}.parquet", ROWS)
    task = load_task("countdown", root=str(tmp_path), test_examples=2)
    assert (len(task.train), len(task.test)) == (3, 2)
    assert task.train[1] == {"numbers": [63, 95, 96], "target": "27.4"}
    assert task.max_new_tokens == 1024


@pytest.mark.parametrize("target", ["", "nan", "inf", "x", None])
def test_a_target_that_is_no_number_is_named(tmp_path: Path, target: Any) -> None:
    table = {"numbers": [[1]], "target": [target]}
    write_parquet(tmp_path / "countdown" / "train.parquet", table)
    write_parquet(tmp_path / "countdown" / "test.parquet", table)
    with pytest.raises(InputError, match=r"countdown: the target .* is not a number"):
        load_task("countdown", root=str(tmp_path))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    count = 3000
    table = pa.table({"target": range(count), "nums": [[n, 1] for n in range(count)]})
    monkeypatch.setattr(rows, "_from_hub", lambda *_: table)
    task = load_task("countdown")
    assert (len(task.train), len(task.test)) == (200, 2000)
    assert task.train[-1] == {"numbers": [199, 1], "target": 199}
    assert task.test[-1] == {"numbers": [2199, 1], "target": 2199}
    assert task.reward(task.train[7], answer("7*1")).strict
