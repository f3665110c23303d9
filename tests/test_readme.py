"""The README's own blocks, word for word, on the embedded model."""

import json
import re
import shlex
from pathlib import Path

import pytest
from small_run import rows, run_jobs

import jes
from jes.models.weights import fingerprint

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def block(beginning: str) -> str:
    """The only block that begins so."""
    (found,) = (text for _, text in BLOCKS if text.startswith(beginning))
    return found


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, as words after `python -m`."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's `mytask.py`, and rows as it shows them."""
    (tmp_path / "mytask.py").write_text(block("# mytask.py"))
    (shown,) = re.findall(r"mydata.jsonl is (\{.*\})", README)
    row = json.loads(shown)
    assert row["question"] == f"rev {row['answer'][::-1]}:"
    words = [a + b + c for a in "abcde" for b in "gh" for c in "mn"]
    found = [{"question": f"rev {w}:", "answer": w[::-1]} for w in words]
    text = "".join(json.dumps(one) + "\n" for one in found)
    (tmp_path / "mydata.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_one_s_own_task_from_the_command_line(folder: Path) -> None:
    """Trained in two goes, evaluated, sampled from, and rebuilt from its ledger."""
    train, *others = commands(block("python -m jes.train --config.model=tiny"))
    assert [argv[0] for argv in others] == ["jes.evaluate", "jes.sample", "jes.export"]
    assert "--config.generations=20" in train
    short, longer = (
        [word.replace("generations=20", f"generations={n}") for word in train]
        + ["--config.population=4"]
        for n in (2, 3)
    )
    done = run_jobs([{"argv": argv} for argv in (short, longer, *others)], at_once=1)
    for one in done:
        assert one["status"] == 0, one["stderr"]
    assert "going on after 2 generations" in done[1]["stdout"]
    metrics = rows(folder / "runs" / "mine" / "metrics.jsonl")
    assert [row["generation"] for row in metrics] == [0, 1, 2]
    last = rows(folder / "runs" / "mine" / "evaluations.jsonl")[-1]
    assert last["examples"] == 2
    assert f"│ {last['reward']:.3f}" in done[2]["stdout"]
    assert len(done[3]["stdout"].splitlines()) == 2  # where it stands, the answer
    assert "fingerprint after 3 generations is right" in done[4]["stdout"]
    found = [
        fingerprint(jes.load(name).params) for name in ("rebuilt", "runs/mine/model")
    ]
    assert found[0] == found[1]


def test_one_s_own_task_from_python(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = block("import jes\nfrom mytask import reward")
    assert program.count("generations=20") == 1
    names: dict[str, jes.Result] = {}
    exec(program.replace("generations=20", "generations=2, population=4"), names)
    result = names["result"]
    assert [row["generation"] for row in result.history] == [0, 1]
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown.endswith(str(result.evaluations[-1]["reward"]))
    saved = jes.load(folder / "mymodel")
    assert fingerprint(saved.params) == fingerprint(result.pretrained.params)
    assert result.finished


def test_the_library_s_chain(folder: Path) -> None:
    names: dict = {}
    exec(block("import jax, optax, jes"), names)
    base = jes.load("tiny").params
    assert fingerprint(names["params"]) != fingerprint(base)


def test_every_setting_that_is_named_exists() -> None:
    settings = jes.config.default()
    for name in re.findall(r"--config\.([\w.]+)=", README):
        group, _, inner = name.rpartition(".")
        assert inner in (settings[group] if group else settings), name


def test_it_is_two_screens() -> None:
    assert len(README.splitlines()) <= 200
