"""Tasks of one's own: files, rows, prompts and reward functions."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_run import get_config, rows

import jes
from jes import evaluate, train
from jes.config import default, freeze
from jes.errors import InputError
from jes.experiment import make_evaluation
from jes.questions import prepare
from jes.rollout import answer_each
from jes.tasks import Asking, Given, Reward, Rewarding, Task, load_task
from jes.tasks.rewards import RewardError, make_rewards, reward_of

ROWS = [{"question": f"rev a{c}:", "answer": f"{c}a"} for c in "bcdefghijklmnopqrstu"]
REWARD = """\
def reward(answer, row):
    return sum(a == b for a, b in zip(answer, row["answer"])) / 2
"""


def write_rows(path: Path, found: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `mytask.py` and `mydata.jsonl`."""
    (tmp_path / "mytask.py").write_text(REWARD)
    write_rows(tmp_path / "mydata.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The forms of a reward.


def scored(*functions: Callable, texts: list[str], **settings: Any) -> list[Reward]:
    prompt = lambda row: row["question"]  # noqa: E731
    made = make_rewards(functions, prompt, ROWS[0], Rewarding(**settings))
    return list(made(ROWS[: len(texts)], texts))


def of_answer(answer: str) -> int:
    return len(answer)


def of_row(answer: str, row: dict) -> bool:
    return answer == row["answer"]


async def waiting(answer: str, row: dict) -> float:
    await asyncio.sleep(0.2)
    return float(answer == row["answer"])


def of_trl(prompts: list, completions: list, answer: list, **columns: Any) -> list:
    assert columns.keys() == {"question"}
    assert prompts == columns["question"]
    return [float(a == b) for a, b in zip(completions, answer, strict=True)]


def named(answer: str, row: dict) -> dict[str, float]:
    return {"correct": answer == row["answer"], "brief": -len(answer)}


def test_every_form_is_recognised() -> None:
    texts = ["ba", "ca", "x"]
    assert scored(of_answer, texts=texts) == [Reward(2.0), Reward(2.0), Reward(1.0)]
    right, wrong = Reward(1.0, True), Reward(0.0, False)
    assert scored(of_row, texts=texts) == [right, right, wrong]
    assert scored(of_trl, texts=texts) == [Reward(1.0), Reward(1.0), Reward(0.0)]
    assert scored(lambda answer, **more: 3, texts=["a"]) == [Reward(3.0)]
    assert scored(lambda answer, row=None: row["answer"] == "ba", texts=["a"]) == [
        right
    ]


def test_async_rewards_wait_together() -> None:
    began = time.monotonic()
    found = scored(waiting, texts=["ba"] * 10, concurrency=10)
    assert time.monotonic() - began < 1.5  # 0.2 for the trial, 0.2 for all ten
    assert [one.value for one in found] == [1.0] + [0.0] * 9


def test_named_rewards_are_weighed() -> None:
    (found,) = scored(named, texts=["ba"], weights="brief=0.25")
    assert found == Reward(1 - 0.25 * 2, True, parts=(1.0, -2.0))
    (found,) = scored(of_answer, of_row, texts=["ba"], weights="of_answer=0.5")
    assert found == Reward(0.5 * 2 + 1, True, parts=(2.0, 1.0))
    with pytest.raises(InputError, match="no reward 'short'; there are correct, brief"):
        scored(named, texts=["ba"], weights="short=1")
    with pytest.raises(InputError, match="weights are name=number"):
        scored(named, texts=["ba"], weights="brief=x")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, Reward(1.0, True)),
        (np.bool_(False), Reward(0.0, False)),
        (2, Reward(2.0)),
        (np.float32(0.5), Reward(0.5)),
        (np.array(0.5), Reward(0.5)),
        (Reward(1.0, True), Reward(1.0, True)),
    ],
)
def test_what_a_reward_may_be(value: Any, expected: Reward) -> None:
    assert reward_of(value) == expected


@pytest.mark.parametrize("value", ["1", None, [1.0], np.ones(2)])
def test_what_is_no_reward(value: Any) -> None:
    with pytest.raises(RewardError, match=r"gave .*, which is no number") as caught:
        scored(lambda answer: value, texts=["a"])
    assert "row: {'question': 'rev ab:'" in str(caught.value)


def fails_on_x(answer: str, row: dict) -> float:
    return float(answer.replace("x", "?") or 0)


def test_a_reward_that_raises_shows_row_answer_and_line() -> None:
    with pytest.raises(RewardError) as caught:
        scored(fails_on_x, texts=["1", "x"])
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "fails_on_x raised ValueError: could not convert string to float: '?'"
    )
    assert lines[1].startswith("  test_own_task.py, line ")
    assert lines[1].endswith('return float(answer.replace("x", "?") or 0)')
    assert lines[2:] == ["  answer: 'x'", f"  row: {ROWS[1]}"]
    found = scored(fails_on_x, texts=["1", "x", "2"], errors="zero")
    assert found == [
        Reward(1.0, parts=(0.0,)),
        Reward(0.0, parts=(1.0,)),
        Reward(2.0, parts=(0.0,)),
    ]


def right_or_fails(answer: str) -> bool:
    return int(answer) == 2


def test_what_fails_is_wrong_where_others_are_right() -> None:
    """An empty answer fails here, and the row's: "0" shows what is returned."""
    found = scored(right_or_fails, texts=["2", "x"], errors="zero")
    assert found == [Reward(1.0, True, parts=(0.0,)), Reward(0.0, False, parts=(1.0,))]
    with pytest.raises(RewardError, match="before the run, an empty answer was tried"):
        scored(right_or_fails, texts=["2", "x"])
    no_number = lambda answer: "x" if answer == "x" else 1  # noqa: E731
    (found,) = scored(no_number, texts=["x"], errors="zero")
    assert found == Reward(0.0, parts=(1.0,))


def hangs_on_x(answer: str) -> float:
    time.sleep(30 if answer == "x" else 0)
    return 1.0


async def waits_on_x(answer: str) -> float:
    await asyncio.sleep(30 if answer == "x" else 0)
    return 1.0


@pytest.mark.parametrize("function", [hangs_on_x, waits_on_x])
def test_a_reward_has_so_much_time(function: Callable) -> None:
    began = time.monotonic()
    with pytest.raises(
        RewardError, match=r"took more than reward_timeout=0\.2 seconds"
    ):
        scored(function, texts=["a", "x", "b"], timeout=0.2)
    found = scored(function, texts=["a", "x", "b"], timeout=0.2, errors="zero")
    assert [one.value for one in found] == [1.0, 0.0, 1.0]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1.0, r"is no reward function: it must take \(answer\)"),
        (lambda a, b, c: 1.0, "is no reward function"),
        (lambda answer, *, gold: 1.0, "is no reward function"),
        (3, "is no function"),
        (lambda prompts, completions: [1.0] * 2, "for 1 answers"),
    ],
)
def test_what_is_no_reward_function(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored(function, texts=["a"])


def test_two_functions_have_two_names() -> None:
    with pytest.raises(InputError, match="the same name"):
        scored(of_row, of_row, texts=["a"])


# Files, rows and prompts.


def test_a_file_a_module_and_a_task(folder: Path) -> None:
    task = load_task("mytask.py", train="mydata.jsonl")
    assert (len(task.train), len(task.test), task.max_new_tokens) == (18, 2, 256)
    assert task.prompt(task.train[0]) == task.train[0]["question"]
    assert task.reward(ROWS[0], "bx") == Reward(0.5)
    assert task.source == REWARD
    (folder / "more.py").write_text(
        "from jes import Reward, Task\nimport mytask\n"
        "task = Task('', [{'q': 1}], [{'q': 2}], lambda e: 'hi', "
        "lambda e, t: Reward(1.0), 3)\n"
        "def made(): return task\n"
        "def other(answer): return 2.0\n"
        "rewards = [mytask.reward, other]\n"
    )
    for name in ("more.py", "more.py:made", "more:task"):
        task = load_task(name)
        assert (task.name, task.max_new_tokens, len(task.test)) == (name, 3, 1)
    task = load_task("more.py:rewards", train="mydata.jsonl", holdout=0.5)
    assert (task.parts, len(task.test)) == (("reward", "other"), 10)
    assert task.reward(ROWS[0], "ba") == Reward(3.0, parts=(1.0, 2.0))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_rows_of_every_kind(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "mytask.py").write_text(REWARD)
    path = tmp_path / f"data.{kind}"
    found: list[dict[str, Any]] = [{"question": "ü, b", "answer": "1"}, *ROWS]
    if kind == "jsonl":
        write_rows(path, found)
    elif kind == "json":
        path.write_text(json.dumps(found))
    elif kind == "csv":
        lines = ['"{question}",{answer}'.format(**row) for row in found]
        path.write_text("\n".join(["question,answer", *lines]))
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(found), path)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        parquet.write_table(pa.Table.from_pylist(found), path / "train.parquet")
    task = load_task(str(tmp_path / "mytask.py"), train=str(path), holdout=0.1)
    together = sorted([*task.train, *task.test], key=lambda row: row["question"])
    expected = sorted(found, key=lambda row: row["question"])
    if kind == "csv":  # which has types by column
        together = [{**row, "answer": str(row["answer"])} for row in together]
    assert together == expected
    assert load_task(str(tmp_path / "mytask.py"), train=str(path)).test == task.test


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"question": "a"}\n{"question"', r"rows\.jsonl, line 2: "),
        ("rows.jsonl", "[1]\n", "row 0 is no object of columns"),
        ("rows.jsonl", "", "there are no rows"),
        ("rows.jsonl", '{"question": "a"}\n', "1 rows are too few to hold some out"),
        ("rows.jsonl", '{"question": null}\n' * 9, "row 0: 'question'.* neither text"),
        ("rows.jsonl", '{"text": "a"}\n' * 9, "say what the prompt is.*are text"),
        ("rows.jsonl", "[" * 100_000, r"rows\.jsonl, line 1: "),
        ("rows.json", "{", "rows.json cannot be read"),
        ("rows.csv", "", "rows.csv cannot be read"),
        ("rows.parquet", "PAR1", "rows.parquet cannot be read"),
        ("rows.xml", "<a/>", "must end in one of .jsonl"),
    ],
)
def test_rows_that_cannot_be_used(
    name: str, text: str, message: str, folder: Path
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_task("mytask.py", train=name)


def test_a_missing_part_is_named(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "set").mkdir()
    name = folder / "set" / "train-00000-of-00002.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), name)
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet is missing"):
        load_task("mytask.py", train="set")


@pytest.mark.parametrize(
    ("asking", "expected"),
    [
        (Asking(prompt="Q: {question}\\nA:"), "Q: rev ab:\nA:"),
        (Asking(prompt="answer"), "ba"),
        (Asking(chat=True), [{"role": "user", "content": "rev ab:"}]),
        (
            Asking(chat=True, system="Be brief."),
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "rev ab:"},
            ],
        ),
    ],
)
def test_prompts(asking: Asking, expected: Any, folder: Path) -> None:
    task = load_task("mytask.py", train="mydata.jsonl", asking=asking)
    assert task.prompt(ROWS[0]) == expected


def test_a_column_of_messages(folder: Path) -> None:
    messages = [{"role": "user", "content": "hi", "name": None}]
    write_rows(folder / "chats.jsonl", [{"messages": messages, "answer": "ab"}] * 9)
    asking = Asking(prompt="messages", chat=True)
    task = load_task("mytask.py", train="chats.jsonl", asking=asking)
    assert task.prompt(task.train[0]) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("asking", "message"),
    [
        (
            Asking(prompt="{quest}"),
            "needs 'quest', and the columns are question, answer",
        ),
        (Asking(prompt="quest"), "is no column and no template"),
        (Asking(prompt="{question"), "expected '}'"),
        (Asking(system="Be brief."), "this one has none"),
    ],
)
def test_prompts_that_do_not_fit(asking: Asking, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_task("mytask.py", train="mydata.jsonl", asking=asking)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "new.py", "does not define any of task, load, rewards, reward"),
        ("x = 1\n1 / 0\n", "new.py", r"new\.py, line 2: ZeroDivisionError"),
        ("def f(:\n", "new.py", r"new\.py, line 1: SyntaxError"),
        ("import no_such\n", "new.py", r"new\.py, line 1: ModuleNotFoundError"),
        (REWARD, "new.py:rewrd", r"does not define 'rewrd'; did you mean 'reward'\?"),
        ("def load(): return 3\n", "new.py", "loads int, which is no jes.Task"),
        (REWARD, "none.py", "there is no file none.py"),
        (REWARD, "no.module:reward", "no.module: ModuleNotFoundError"),
        (REWARD, "python:f", "was given in Python"),
    ],
)
def test_files_that_cannot_be_used(
    text: str, name: str, message: str, folder: Path
) -> None:
    (folder / "new.py").write_text(text)
    with pytest.raises(InputError, match=message):
        load_task(name, train="mydata.jsonl")


def test_the_package_s_tasks_have_their_own_rows() -> None:
    with pytest.raises(InputError, match="tiny/min has its examples"):
        load_task("tiny/min", train="mydata.jsonl")


# Runs.


@pytest.fixture
def run_own(small_model: Path, folder: Path) -> Callable[..., dict[str, Any]]:
    def go(**changes: Any) -> dict[str, Any]:
        config = get_config(str(small_model))
        config.update(task="mytask.py", generations=2, eval_every=1, max_new_tokens=3)
        config.data.update(train="mydata.jsonl", train_examples=0, test_examples=0)
        config.prompts = 0
        config.update(changes)
        return train.run(config, folder / "run")

    return go


def test_a_graded_task_trains_and_shows_its_rewards(
    run_own: Callable, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run_own(task="mytask.py")
    (found,) = summary["evaluations"].values()
    evaluations = rows(folder / "run" / "evaluations.jsonl")
    assert found["before"] is found["after"] is None
    assert found["reward"] == {
        "before": evaluations[0]["reward"],
        "after": evaluations[-1]["reward"],
    }
    assert "accuracy" not in evaluations[0]
    assert 0 <= evaluations[0]["reward_error"] < 0.5
    metrics = rows(folder / "run" / "metrics.jsonl")
    assert "accuracy" not in metrics[0]
    assert metrics[0]["fitness_std"] > 0
    shown = capsys.readouterr().out
    assert f"mytask.py: reward {found['reward']['before']:.3f} -> reward" in shown
    answers = rows(folder / "run" / "answers.jsonl")
    asked = [row["prompt"] for row in answers if row["generation"] == 0]
    assert len(asked) == 2
    assert [row["generation"] for row in answers] == [0, 0, 1, 1, 2, 2]
    assert [row["prompt"] for row in answers] == asked * 3
    for row in answers:
        task = load_task("mytask.py", train="mydata.jsonl")
        example = next(r for r in ROWS if r["question"] == row["prompt"])
        assert row["right"] == example["answer"]
        assert task.reward(example, row["answer"]).value == row["reward"]
    scores = evaluate.evaluate(
        jes.load(folder / "run" / "model"),
        ["mytask.py"],
        data={"train": "mydata.jsonl"},
    )
    assert scores["mytask.py"]["reward"] == pytest.approx(found["reward"]["after"])
    assert "accuracy" not in scores["mytask.py"]


def test_other_rows_or_rewards_are_refused(run_own: Callable, folder: Path) -> None:
    run_own(generations=1)
    write_rows(folder / "mydata.jsonl", [{"question": "z:", "answer": "y"}, *ROWS[1:]])
    with pytest.raises(InputError, match="the rows or prompts to train on") as caught:
        run_own()
    assert "accept_changes=True" in str(caught.value)
    write_rows(folder / "mydata.jsonl")
    (folder / "mytask.py").write_text(REWARD.replace("/ 2", "/ 3"))
    with pytest.raises(InputError, match="when the run began: the reward"):
        run_own()
    assert run_own(accept_changes=True)["generations"] == 2


def test_a_reward_that_fails_in_a_run_leaves_what_there_is(
    run_own: Callable, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails in the second generation; mended, the same command goes on."""
    text = (
        "import pathlib\n"
        "def reward(answer, row):\n"
        "    if len(pathlib.Path('run/metrics.jsonl').read_text()) > 9:\n"
        "        raise KeyError('gold')\n"
        "    return len(answer)\n"
    )
    (folder / "run").mkdir()
    (folder / "run").rmdir()
    (folder / "mytask.py").write_text(
        text.replace(
            ".read_text()",
            ".read_text() if pathlib.Path('run/metrics.jsonl').exists() else ''",
        )
    )
    with pytest.raises(
        RewardError, match=r"raised KeyError: 'gold'\s+mytask\.py, line 4"
    ):
        run_own(eval_every=9)
    assert "stopped after 1 of 2 generations" in capsys.readouterr().out
    assert len(rows(folder / "run" / "ledger.jsonl")) == 2
    (folder / "mytask.py").write_text("def reward(answer):\n    return len(answer)\n")
    assert run_own(eval_every=9, accept_changes=True)["generations"] == 2


def test_named_rewards_are_logged(run_own: Callable, folder: Path) -> None:
    (folder / "mytask.py").write_text(
        "def reward(answer, row):\n"
        "    if len(set(answer)) == 1:\n        raise ValueError\n"
        "    return {'long': len(answer), 'b': 'b' in answer}\n"
    )
    run_own(generations=1, reward_weights="b=2", reward_errors="zero")
    (row,) = rows(folder / "run" / "metrics.jsonl")
    assert row["fitness_mean"] == pytest.approx(
        row["reward/long"] + 2 * row["reward/b"], rel=1e-6
    )
    assert 0 < row["reward/errors"] < 1
    last = rows(folder / "run" / "evaluations.jsonl")[-1]
    assert {"reward/long", "reward/b", "reward/errors"} <= last.keys()


# From Python.


SMALL: dict[str, Any] = {
    "population": 4,
    "sigma": 0.1,
    "alpha": 0.1,
    "max_new_tokens": 3,
    "buckets": [16],
    "holdout": 0.2,
    "eval_every": 1,
}


def test_fine_tune(small_model: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(row: dict[str, Any]) -> bool:
        seen.append(row["generation"])
        return len(seen) == 2

    call: dict[str, Any] = {
        "reward": of_answer,
        "data": ROWS,
        **SMALL,
        "generations": 4,
    }
    first = jes.fine_tune(str(small_model), on_generation=stop, **call)
    assert seen == [0, 1]
    assert [row["generation"] for row in first.history] == [0, 1]
    assert first.finished
    assert len(first.evaluations) == 3
    assert repr(first).startswith("Result(2 generations, held-out reward ")
    (text,) = first.sample(["rev ab:"], max_new_tokens=3)
    assert isinstance(text, str)
    first.save(tmp_path / "saved")
    saved = jes.load(tmp_path / "saved").params
    original = jes.load(small_model).params
    assert not np.array_equal(
        saved["final_norm"]["scale"], original["final_norm"]["scale"]
    )
    temporary = first.workdir
    assert temporary.is_dir()
    # The same by hand, through the config; and going on in a folder that stays.
    config = default()
    config.update({k: v for k, v in SMALL.items() if k not in ("holdout", "buckets")})
    config.update(model=str(small_model), task="python:of_answer", generations=2)
    config.buckets, config.data.holdout = (16,), 0.2
    train.run(config, tmp_path / "run", Given(of_answer, ROWS))
    assert [
        row["fitness_mean"] for row in rows(tmp_path / "run" / "metrics.jsonl")
    ] == [row["fitness_mean"] for row in first.history]
    longer = jes.fine_tune(str(small_model), workdir=tmp_path / "run", **call)
    assert len(longer.history) == 4
    assert longer.history[:2] == rows(tmp_path / "run" / "metrics.jsonl")[:2]
    del first
    assert not temporary.exists()


@pytest.mark.parametrize("rows_or_file", [ROWS, "mydata.jsonl"])
def test_fine_tune_takes_a_task_by_its_name(
    rows_or_file: Any, small_model: Path, folder: Path
) -> None:
    settings = SMALL | {"generations": 1, "system": ""}
    named = {"task": "mytask.py", "data": rows_or_file, "test": ROWS[:3]}
    result = jes.fine_tune(str(small_model), **named, **settings)
    assert result.evaluations[0]["task"] == "mytask.py"
    assert result.evaluations[0]["examples"] == 3


OWN = Task("own", ROWS, ROWS, lambda row: row["question"], lambda row, x: Reward(1), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generatoins": 3}, "'generatoins': did you mean 'generations'"),
        ({"population": "many"}, "population='many'"),
        ({"reward": None}, "give a reward and its data, or a task"),
        ({"reward": None, "task": "tiny/min"}, "are for tasks of your own: tiny/min"),
        ({"reward": None, "task": OWN}, "own has its own examples: leave data"),
        ({"data": "none.jsonl"}, "there is no file none.jsonl"),
        ({"grpo": {"clip": 1}}, "grpo="),
    ],
)
def test_fine_tune_says_what_is_wrong(
    settings: dict[str, Any], message: str, small_model: Path
) -> None:
    call = {"reward": of_answer, "data": ROWS, **SMALL} | settings
    with pytest.raises(InputError, match=message):
        jes.fine_tune(str(small_model), **call)


def test_answers_are_text(small_model: Path) -> None:
    pretrained = jes.load(small_model)
    once = jes.answer(pretrained, ["rev ab:", "12+7="], 4)
    assert jes.answer(pretrained, ["12+7="], 4) == once[1:]
    warm = jes.answer(pretrained, ["rev ab:"], 4, temperature=2.0)
    assert warm == jes.answer(pretrained, ["rev ab:"], 4, temperature=2.0)


def test_a_system_message_needs_a_template(small_model: Path) -> None:
    base = jes.load(small_model)
    base.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template, which a system message"):
        jes.answer(base, ["rev ab:"], 4, system="Be brief.")


def test_what_earns_is_not_what_is_right(small_model: Path) -> None:
    """A probe counts right answers, and a number does not say which are."""
    pretrained = jes.load(small_model)
    task = dataclasses.replace(OWN, max_new_tokens=3)
    evaluation = make_evaluation(pretrained, task, buckets=(16,))
    questions = prepare(evaluation, ROWS)
    some = jax.random.key(0), questions, np.zeros(1, int)
    with pytest.raises(InputError, match="own does not say which answers are right"):
        answer_each(evaluation, pretrained.params, *some, noise=None)


def test_eval_tasks_may_be_one_text() -> None:
    config = default()
    config.eval_tasks = ("tiny/max,tiny/min", "tiny/add")
    assert freeze(config).eval_tasks == ("tiny/max", "tiny/min", "tiny/add")
