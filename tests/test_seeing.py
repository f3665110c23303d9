"""What a run says of itself: answers, warnings, the best weights, a model card."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import get_config, rows
from test_evaluate_export import command

import jes
from jes import export, sample, train
from jes.config import default, freeze
from jes.errors import InputError
from jes.experiment import make_experiment, pick, settled
from jes.guide import Guide
from jes.io.console import Bar
from jes.io.interrupts import Stopped
from jes.io.plots import training_curves
from jes.models.weights import fingerprint
from jes.rollout import ask


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


# Warnings.


def guide(**settings: Any) -> Guide:
    config = default()
    config.update(settings)
    return Guide(freeze(config))


GENERATION = {"generation": 3, "fitness_mean": 0.5, "fitness_std": 0.1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"fitness_std": 0.0}, "generation 3: all members earned 0.5"),
        ({"truncated": 1.0}, "every answer was cut off before its end"),
        ({"members_dropped": 2}, "2 members were left out"),
    ],
)
def test_a_generation_without_signal_is_told_once(
    row: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn = guide()
    warn.of_generation(GENERATION | {"truncated": 0.9, "members_dropped": 0})
    assert capsys.readouterr().out == ""
    warn.of_generation(GENERATION | row)
    warn.of_generation(GENERATION | row)
    assert capsys.readouterr().out.count(message) == 1


def test_a_population_of_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    guide(population=1)
    assert "warning: population=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("last", "moved", "message"),
    [
        (0.29, 5.0, "more than two standard errors below the 0.5 of the start"),
        (0.31, 5.0, ""),
        (0.31, 1.0, "as far as noise alone takes them (1 of 1)"),
        (0.9, 1.0, ""),
    ],
)
def test_held_out_rewards_and_drift(
    last: float,
    moved: float,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two standard errors of a difference are 2 sqrt(0.08² + 0.06²) = 0.2."""
    row = {"task": "tiny/min", "reward": 0.5, "reward_error": 0.08, "generation": 0}
    then = {**row, "reward": last, "reward_error": 0.06, "generation": 30}
    other = {**row, "task": "tiny/max", "reward": 0.0, "generation": 30}
    write(tmp_path / "evaluations.jsonl", [row, then, other])
    drift = {"displacement_norm": moved, "displacement_norm_drift": 1.0}
    warn = guide()
    warn.of_generation(GENERATION | drift)
    warn.of_evaluations(tmp_path)
    shown = capsys.readouterr().out
    assert message in shown
    assert bool(shown) == bool(message)


# The best weights, and patience.


def test_the_best_weights_are_kept_and_patience_ends_the_run(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = get_config(str(small_model))
    config.update(generations=8, eval_every=1, keep="best", patience=2)
    summary = train.run(config, tmp_path / "run")
    rewards = [row["reward"] for row in rows(tmp_path / "run" / "evaluations.jsonl")]
    best = int(np.argmax(rewards))
    assert summary["best"] == {"generation": best, "reward": rewards[best]}
    assert summary["generations"] == min(best + 2, 8)
    ended = summary["generations"] < 8
    assert ("ended" in summary) == ended
    ledger = export.read_ledger(tmp_path / "run")
    rebuilt = export.rebuild(ledger, generations=best)
    kept = jes.load(tmp_path / "run" / "model-best")
    assert fingerprint(kept.params) == fingerprint(rebuilt.params)
    capsys.readouterr()
    assert train.run(config, tmp_path / "run") == summary
    assert "this run finished before" in capsys.readouterr().out


# Beside the model.


def test_a_model_has_its_card_its_curves_and_its_ledger(
    finished_run: Path, tmp_path: Path
) -> None:
    card = (finished_run / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    (row,) = json.loads((finished_run / "summary.json").read_text())[
        "evaluations"
    ].values()
    before, after = (f"{row[when]:.4g}" for when in ("before", "after"))
    assert f"| `tiny/reverse`, accuracy | {before} | {after} | 16 |" in card
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings["data.train_examples"] == 64
    assert settings["generations"] == 6
    assert "seed" not in settings
    ledger = export.read_ledger(finished_run / "model" / "ledger.jsonl")
    rebuilt = export.rebuild(ledger)
    model = jes.load(finished_run / "model")
    assert fingerprint(model.params) == fingerprint(rebuilt.params)
    assert "README.md" not in model.files  # it is that run's, not of what comes of it


def test_pushing_uploads_the_folder_and_the_card(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            calls.append((name, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, folder_path))

        def upload_file(
            self, path_or_fileobj: Path, path_in_repo: str, **_: Any
        ) -> None:
            assert path_or_fileobj.is_file()
            calls.append((path_in_repo,))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out = tmp_path / "out"
    arguments = [f"--run={finished_run}", f"--out={out}", "--push=me/mine"]
    assert command(export.main, monkeypatch, *arguments) is None
    assert calls[:2] == [("me/mine", True), ("me/mine", out)]
    assert {name for (name,) in calls[2:]} == {
        "README.md",
        "curves.png",
        "ledger.jsonl",
    }


def test_held_out_rewards_are_drawn_where_they_differ(
    finished_run: Path, tmp_path: Path
) -> None:
    """Beside accuracies, which stay; a picture of graded rewards has no accuracies."""
    write(tmp_path / "metrics.jsonl", rows(finished_run / "metrics.jsonl"))
    found = rows(finished_run / "evaluations.jsonl")
    sizes = []
    for evaluations in (
        [{**row, "reward": row["accuracy"]} for row in found],
        found,
        [{k: v for k, v in row.items() if k != "accuracy"} for row in found],
    ):
        write(tmp_path / "evaluations.jsonl", evaluations)
        picture = training_curves(tmp_path).read_bytes()
        sizes.append(int.from_bytes(picture[16:20], "big"))
    assert sizes == [1320, 1760, 1320]


# Sampling.


def test_sampling_from_the_command_line(
    finished_run: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> str:
        assert command(sample.main, monkeypatch, *arguments) is None
        return capsys.readouterr().out

    pretrained = jes.load(small_model)
    (once,) = jes.answer(pretrained, ["rev ab:"], 4)
    model, few = f"--model={small_model}", "--max-new-tokens=4"
    assert run(model, few, "--prompt=rev ab:") == once + "\n"
    (tmp_path / "p.txt").write_text("rev ab:\n\nrev ba:\n")
    out = tmp_path / "out.jsonl"
    run(model, few, f"--prompts={tmp_path / 'p.txt'}", f"--out={out}")
    assert rows(out)[0] == {"prompt": "rev ab:", "answer": once}
    assert [row["prompt"] for row in rows(out)] == ["rev ab:", "rev ba:"]
    shown = run(f"--model={finished_run}", "--count=3", f"--out={tmp_path / 'o.jsonl'}")
    assert shown.count("reward ") == 3
    answers = [
        row for row in rows(finished_run / "answers.jsonl") if row["generation"] == 6
    ]
    for row, kept in zip(rows(tmp_path / "o.jsonl"), answers, strict=False):
        assert (row["prompt"], row["answer"]) == (kept["prompt"], kept["answer"])
        assert row["reward"] == kept["reward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to answer"),
        (["--prompt=a", "--chat"], "give one of"),
        (["--prompts=/no/such"], "--prompts: "),
        (["--task=tiny/divide"], "there is no task"),
        (["--chat"], "no chat template"),
    ],
)
def test_sampling_says_what_is_wrong(
    arguments: list[str],
    message: str,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    pretrained = jes.load(small_model)
    pretrained.save(folder)
    if "--chat" in arguments:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config.pop("chat_template", None)
        path.write_text(json.dumps(config))
    arguments = [f"--model={folder}", *arguments]
    assert command(sample.main, monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_conversation_streams_what_is_generated_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = jes.load("tiny")
    messages = [{"role": "user", "content": "max a)12 b)4 c)9:"}]
    (whole,) = jes.answer(pretrained, [messages], 12)
    monkeypatch.setattr(sample, "SLICE", 2)
    *_, last = sample.stream(pretrained, messages, 12)
    assert last == whole
    said = iter(["max a)12 b)4 c)9:", "and now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    sample.chat(pretrained, "", 12, 0.0)
    shown = capsys.readouterr().out
    assert shown.startswith(f"model: {whole}\nmodel: ")


# The command line.


def test_help_lists_settings() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jes.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--workdir  Run folder" in done.stdout
    assert "  sigma = 0.001  # 0 chooses" in done.stdout
    assert "  reward_errors = \"stop\"  # or 'zero'" in done.stdout
    assert "  holdout = 0.1" in done.stdout
    assert "noqa" not in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c_while_it_imports_is_silent(seconds: float, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "jes.train", f"--workdir={tmp_path / 'run'}"]
    # As from a terminal: what is started in the background ignores SIGINT.
    handled = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    program = f"import os, signal; {handled}; os.execv({argv[0]!r}, {argv!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in shown


def test_configs_that_ship_have_names(tmp_path: Path) -> None:
    from jes.io import command_line

    known = command_line.shipped()
    assert {"tiny", "arc_c"} <= known.keys()
    path = str(known["tiny"])
    assert command_line.with_shipped("--config=tiny") == f"--config={path}"
    assert command_line.with_shipped("--config=arc_c:tiny").endswith("arc_c.py:tiny")
    assert command_line.with_shipped("--config.sigma=1") == "--config.sigma=1"
    mine = tmp_path / "mine.py"
    mine.touch()
    assert command_line.with_shipped(f"--config={mine}") == f"--config={mine}"
    with pytest.raises(InputError, match="configs that ship: arc_c"):
        command_line.with_shipped("--config=tyny")


def test_a_wheel_has_every_package_and_the_configs() -> None:
    import tomllib

    root = Path(jes.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    there = {
        ".".join(file.parent.relative_to(root).parts)
        for file in (root / "jes").rglob("__init__.py")
    }
    assert set(settings["packages"]) == there | {"jes.configs"}
    assert settings["package-dir"] == {"jes.configs": "configs"}


# Trackers, and what goes on.


class StandIn:
    """A module with the functions of wandb and trackio that are used."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> "StandIn":
        self.begun.append(settings)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Table(columns: list[str], data: list[list[Any]]) -> Any:
        return columns, data


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_has_rows_settings_and_answers(
    name: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = StandIn()
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    config = get_config(str(small_model))
    config.update(generations=2, eval_every=2, tracker=name)
    train.run(config, tmp_path / "run")
    config.update(generations=3)
    train.run(config, tmp_path / "run")
    first, again = module.begun
    assert module.finished == 2
    names = {"project": "mine", "name": "run", "resume": "allow"}
    assert first.items() >= names.items()
    assert first["config"]["sigma"] == 0.1
    assert first["config"]["data.train_examples"] == 64
    assert first.get("id") == again.get("id")
    found = [(s, v) for s, v in module.logged if "metrics/fitness_mean" in v]
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in found] == [row["generation"] for row in metrics]
    for (_, values), row in zip(found, metrics, strict=True):
        assert values["metrics/fitness_mean"] == row["fitness_mean"]
    held_out = [
        (step, values["evaluations/tiny/reverse/reward"])
        for step, values in module.logged
        if "evaluations/tiny/reverse/reward" in values
    ]
    evaluated = rows(tmp_path / "run" / "evaluations.jsonl")
    assert held_out == [(row["generation"], row["reward"]) for row in evaluated]
    tables = [v for _, v in module.logged if "answers/tiny/reverse" in v]
    columns, data = tables[0]["answers/tiny/reverse"]
    said = rows(tmp_path / "run" / "answers.jsonl")
    assert [dict(zip(columns, row, strict=True)) for row in data] == said[: len(data)]
    assert len(data) == 8


def test_a_tracker_that_is_not_installed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = get_config(str(small_model))
    config.tracker = "wandb"
    with pytest.raises(InputError, match="tracker='wandb' needs a package: pip"):
        train.run(config, tmp_path / "run")


def test_what_goes_on_is_said_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the output is a file: after a minute without a line."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Bar(2, 40) as progress:
        progress.now("member 1 of 30")
        clock[0] = 61.0
        progress.now("member 2 of 30")
        progress.now("member 3 of 30")
        progress.now("")
    assert capsys.readouterr().out == "generation 3/40 member 2 of 30\n"


def test_a_generation_stops_between_its_programs(small_model: Path) -> None:
    """A long answer is decoded in slices, and a signal is heeded between two."""
    config = get_config(str(small_model))
    config.update(slots=4, slice_tokens=1, prompts=16)
    settings = freeze(config)
    experiment = settled(make_experiment(settings), {"slots": 4})
    heard: list[str] = []

    def before(doing: str) -> None:
        heard.append(doing)
        if len(heard) == 6:
            raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):
        ask(
            experiment.evaluation,
            experiment.pretrained.params,
            settings.root,
            pick(experiment, 0),
            noise=settings.evolution.noise,
            population=4,
            chunk=4,
            before_chunk=before,
        )
    # One chunk had begun, and was not finished: it has more programs than that.
    assert heard == ["member 1 of 4", *[""] * 5]
