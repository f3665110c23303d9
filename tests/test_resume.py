"""Stopped at any moment, the same command goes on, and ends the same to the bit."""

import gc
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_lines import failing, place
from marks import slow_except
from small_run import Outcome, get_config, outcome, rows, run_jobs, train_command

from jes import train
from jes.core import ledger as ledgers
from jes.errors import InputError
from jes.io import checkpoints
from jes.io.command_line import guarded
from jes.io.interrupts import stop_request
from jes.run_folder import alone

APPEND = "jes.core.ledger:append_row"  # header, six generations, fingerprint
KILLS = {
    "before the summary": ("jes.run_folder:write_json", 1),
    "before the folder is claimed": ("jes.experiment:load_base", 1),
    "before the first generation": ("jes.train:ask", 1),
    "in the middle": ("jes.train:tell", 4),
    "before a generation is recorded": (APPEND, 5),
    "during an evaluation": ("jes.run_folder:examine", 2),
    "during a checkpoint": ("os:rename", 2),
    "after the last generation": ("jes.run_folder:examine", 3),
    "while the model is put in its place": ("os:rename", 4),
}
STOPS = {
    "before the first generation": ("jes.train:ask", 1, 0),
    "in a generation": ("jes.train:ask", 4, 3),
    "in an evaluation": ("jes.run_folder:examine", 2, 3),
    "in a checkpoint": ("jes.io.checkpoints:save", 2, 4),
}
FULL = {
    "ledger": (APPEND, 5),
    "metrics": ("jes.run_folder:append_row", 4),
    "checkpoint": ("jes.io.checkpoints:ocp.save", 2),
    "model": ("jes.models.weights:write_tensors", 1),
    "summary": ("jes.run_folder:write_json", 1),
}

Killed = dict[str, tuple[dict[str, Any], Path]]


def faults() -> dict[str, dict[str, Any]]:
    """Every way of stopping that needs a process of its own, by its name."""
    found = {
        where: {"at": at, "call": call, "do": "SIGKILL"}
        for where, (at, call) in KILLS.items()
    }
    found["sigterm"] = {"at": "jes.train:ask", "call": 5, "do": "SIGTERM"}
    found["ctrl-c at start"] = {"at": "jes.experiment:load_base", "do": "SIGINT"}
    # A hang stands for a compilation, or a wait for the device.
    twice = {"at": "jes.train:tell", "call": 4, "do": "SIGINT SIGINT sleep"}
    return {**found, "ctrl-c twice": twice}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Killed:
    """Runs that were stopped in all these ways: what they said, and their folders."""
    folder = tmp_path_factory.mktemp("killed")
    jobs = [
        {"argv": train_command(small_model, folder / name), "fault": fault}
        for name, fault in faults().items()
    ]
    results = run_jobs(jobs)
    return {
        name: (result, folder / name)
        for name, result in zip(faults(), results, strict=True)
    }


@pytest.fixture(scope="session")
def expected(finished_run: Path) -> Outcome:
    """What an undisturbed run comes to."""
    return outcome(finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", faults())
def test_a_killed_run_goes_on_and_ends_the_same(
    name: str, killed: Killed, expected: Outcome, small_model: Path
) -> None:
    first, workdir = killed[name]
    if name in KILLS:
        assert first["status"] == -signal.SIGKILL
        assert first["stderr"] == ""
    train.run(get_config(str(small_model)), workdir)
    assert outcome(workdir) == expected


@pytest.mark.slow
def test_signals_of_a_process(killed: Killed) -> None:
    first, workdir = killed["sigterm"]
    assert first["status"] == 143
    assert first["stderr"] == ""
    assert "stopping: saving first" in first["stdout"]
    assert "stopped after 4 of 6 generations; the same" in first["stdout"]
    assert str(workdir) in first["stdout"]

    first, _ = killed["ctrl-c at start"]
    assert first["status"] == 130
    assert first["stderr"] == "error: interrupted\n"

    first, _ = killed["ctrl-c twice"]
    assert first["status"] == 130
    assert first["seconds"] < 55
    assert "once more to stop at once" in first["stdout"]
    assert "stopped after" not in first["stdout"]


@pytest.mark.slow
def test_the_same_command_goes_on_in_another_process(
    tmp_path: Path, small_model: Path, expected: Outcome
) -> None:
    argv = train_command(small_model, tmp_path / "run")
    fault = {"at": "jes.train:ask", "call": 6, "do": "SIGKILL"}
    jobs = [{"argv": argv, "fault": fault}, {"argv": argv}]
    first, second = run_jobs(jobs, at_once=1)
    assert (first["status"], second["status"]) == (-signal.SIGKILL, 0)
    assert "going on after 5 generations" in second["stdout"]
    assert second["stderr"] == ""
    assert outcome(tmp_path / "run") == expected


@pytest.fixture
def faulty(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Path]]:
    """Runs a command with a fault, then without; gives its status and its folder."""

    def run(at: str, call: int, do: str) -> tuple[Any, Path]:
        workdir = tmp_path / "run"
        config = get_config(str(small_model))
        status = None
        with monkeypatch.context() as patch:
            owner, name = place(at)
            fault = {"at": at, "call": call, "do": do}
            patch.setattr(owner, name, failing(getattr(owner, name), fault))
            try:
                guarded(lambda: train.run(config, workdir), "the same command goes on")
            except SystemExit as error:
                status = error.code
        train.run(config, workdir)
        return status, workdir

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", STOPS)
def test_a_signal_saves_first_and_says_where(
    where: str,
    number: signal.Signals,
    faulty: Callable[..., tuple[Any, Path]],
    expected: Outcome,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at, call, done = STOPS[where]
    handler = signal.getsignal(number)
    status, workdir = faulty(at, call, number.name)
    assert status == 128 + number
    said = capsys.readouterr().out
    assert "stopping: saving first" in said
    assert f"stopped after {done} of 6 generations; the same command goes" in said
    assert f"goes on from {workdir}" in said
    assert (f"going on after {done} generations" in said) == (done > 0)
    assert outcome(workdir) == expected
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_is_one_clear_line_and_costs_nothing(
    where: str,
    faulty: Callable[..., tuple[Any, Path]],
    expected: Outcome,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, workdir = faulty(*FULL[where], "ENOSPC")
    assert outcome(workdir) == expected
    out, err = capsys.readouterr()
    if where == "checkpoint":  # the run does without it
        assert status is None
        assert "no checkpoint written ([Errno 28] No space left" in out
        return
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("No space left on device; the same command goes on")


QUANTIZED = {"group_size": 32, "antithetic": True, "sigma": 0.5, "alpha": 1.0}
KNOWS = {
    "task": "tiny/knows",
    "data.train_examples": 24,
    "prompts": 12,
    "buckets": (24,),
}
KINDS: dict[str, dict[str, Any]] = {
    "l2": {"decay": "l2", "decay_coefficient": 1.0},
    "low rank": {"rank": 2},
    "replay": {"quantize": "int4", "rounding": "replay", "window": 3, **QUANTIZED},
    "residual": {"quantize": "w8a8", "rounding": "residual", **QUANTIZED},
    "naive": {"quantize": "int4", "rounding": "naive", **QUANTIZED},
    "quzo": {"quantize": "w8a8", "rounding": "quzo", **QUANTIZED},
    "grpo": {"method": "grpo", "temperature": 1.0, "grpo.learning_rate": 1e-3},
    "sft": {"method": "sft", "sft.learning_rate": 1e-2, **KNOWS},
}


@pytest.mark.parametrize("kind", slow_except({"l2", "replay"}, KINDS))
def test_every_kind_of_run_goes_on_and_ends_the_same(
    kind: str, tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the fourth generation: the third is not in the checkpoint."""
    config = get_config(str(small_model))
    config.update_from_flattened_dict(KINDS[kind])
    train.run(config, tmp_path / "whole")
    method, generations = train.METHODS[config.method], []

    def step(*args: Any) -> Any:
        generations.append(args[1].generation)
        if len(generations) == 4:
            raise RuntimeError("killed")
        return method.step(*args)

    monkeypatch.setitem(train.METHODS, config.method, method._replace(step=step))
    with pytest.raises(RuntimeError, match="killed"):
        train.run(config, tmp_path / "parts")
    train.run(config, tmp_path / "parts")
    again = [3, 4, 5] if config.method == "es" else [2, 3, 4, 5]
    assert generations == [0, 1, 2, 3, *again]
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.fixture
def copied(tmp_path: Path, finished_run: Path, small_model: Path) -> Any:
    """A finished run of one's own to damage, and how to go on with it."""
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)

    def go_on(**changes: Any) -> Outcome:
        config = get_config(str(small_model))
        config.update(changes)
        train.run(config, workdir)
        return outcome(workdir)

    return workdir, go_on


def cut_ledger(workdir: Path, generations: int) -> None:
    """Takes the ledger back to where so many generations had happened."""
    path = workdir / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + generations]))
    (workdir / "summary.json").unlink()


def test_half_a_ledger_line_is_asked_again(copied: Any, expected: Outcome) -> None:
    workdir, go_on = copied
    cut_ledger(workdir, 5)
    path = workdir / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    # The checkpoint after 6 generations is ahead of the ledger now.
    assert go_on() == expected


def test_rows_of_lost_generations_do_not_stay(
    copied: Any, expected: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, go_on = copied
    cut_ledger(workdir, 2)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"generation": 6, "fitn')
    got = go_on()
    assert [row["generation"] for row in got.metrics] == list(range(6))
    assert [row["generation"] for row in got.evaluations] == [0, 3, 6]
    assert got == expected
    assert "going on after 2 generations" in capsys.readouterr().out


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def truncate(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])


def zero(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)


def half_write(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("6.orbax-checkpoint-tmp"))


# Of orbax, whose reads go on in an event loop that it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("newest_only", [True, False])
@pytest.mark.parametrize("damage", [empty, truncate, zero, half_write])
def test_a_damaged_checkpoint_costs_only_time(
    damage: Callable[[Path], None],
    newest_only: bool,
    copied: Any,
    expected: Outcome,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir, go_on = copied
    (workdir / "summary.json").unlink()
    damage(workdir / "checkpoints" / "6")
    if not newest_only and damage is not half_write:
        damage(workdir / "checkpoints" / "4")
    shutil.rmtree(workdir / "model")
    assert go_on() == expected
    said = "the checkpoint after 6 generations cannot be read"
    assert (said in capsys.readouterr().out) == (damage is not half_write)
    assert not list(workdir.glob("checkpoints/*tmp*"))
    gc.collect()  # so that what is ignored above is not raised in another test


def test_without_any_checkpoint_the_ledger_is_enough(
    copied: Any, expected: Outcome
) -> None:
    workdir, go_on = copied
    cut_ledger(workdir, 4)
    shutil.rmtree(workdir / "checkpoints")
    assert go_on() == expected


def test_a_finished_run_only_says_so(
    copied: Any, expected: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, go_on = copied
    before = (workdir / "model" / "model.safetensors").stat().st_mtime_ns
    assert go_on() == expected
    assert (workdir / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "this run finished before" in capsys.readouterr().out


def test_deleted_evaluations_are_made_again(copied: Any, expected: Outcome) -> None:
    """The base is evaluated before, though the run is long past it."""
    workdir, go_on = copied
    (workdir / "summary.json").unlink()
    (workdir / "evaluations.jsonl").unlink()
    got = go_on()
    assert got.summary == expected.summary
    assert got.evaluations == [expected.evaluations[0], expected.evaluations[-1]]


def test_an_extended_run_is_the_longer_run(
    tmp_path: Path, small_model: Path, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = get_config(str(small_model))
    config.generations = 8
    config.eval_every = 4
    train.run(config, tmp_path / "long")
    longer = outcome(tmp_path / "long")
    workdir, go_on = copied
    ask = train.ask

    def watching(*args: Any, **kwargs: Any) -> Any:
        # Its presence says that a run is complete.
        assert not (workdir / "summary.json").exists()
        return ask(*args, **kwargs)

    monkeypatch.setattr(train, "ask", watching)
    config.generations = 8
    train.run(config, workdir)
    ledger = ledgers.read(workdir / "ledger.jsonl")
    assert sorted(ledger.fingerprints) == [6, 8]
    assert ledger.fingerprints[8] == longer.fingerprint
    assert rows(workdir / "metrics.jsonl")[-1]["generation"] == 7
    model = (workdir / "model" / "model.safetensors").read_bytes()
    assert model == longer.model
    with pytest.raises(InputError, match="has 8 generations, more than 6"):
        go_on()
    (workdir / "summary.json").unlink()
    with pytest.raises(InputError, match=r"jes\.export .* --generations=6"):
        go_on()


def test_memory_may_change_and_what_is_computed_may_not(
    copied: Any, expected: Outcome
) -> None:
    workdir, go_on = copied
    cut_ledger(workdir, 3)
    with pytest.raises(InputError) as caught:
        go_on(sigma=0.2, seed=1)
    text = str(caught.value)
    assert "belongs to a run with other settings" in text
    assert "sigma: 0.1 there, 0.2 here" in text
    assert "seed: 0 there, 1 here" in text
    assert "alpha" not in text
    assert go_on(chunk=1).fitness == expected.fitness
    record = json.loads((workdir / "config.json").read_text())
    assert record["resolved"] == {"chunk": 1, "slots": 0}


def test_other_base_weights_under_the_same_name_are_refused(
    tmp_path: Path, small_model: Path, copied: Any
) -> None:
    from small_run import write_model

    workdir, _ = copied
    cut_ledger(workdir, 3)
    other = write_model(tmp_path / "other", seed=1)
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["model"] = str(other)
    (workdir / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="starts from other weights than those of"):
        train.run(get_config(str(other)), workdir)


def test_one_process_at_a_time(tmp_path: Path, small_model: Path) -> None:
    workdir = tmp_path / "run"
    with (
        alone(workdir),
        pytest.raises(InputError, match="another process is running in"),
    ):
        train.run(get_config(str(small_model)), workdir)
    assert not workdir.exists()


def test_runs_in_a_thread_too() -> None:
    """Only the main thread can take signals; a notebook may run in another."""
    raised: list[Exception] = []

    def target() -> None:
        try:
            with stop_request() as request:
                request.check()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert raised == []


def test_tidy_keeps_what_happened(tmp_path: Path) -> None:
    for name in ("2", "4", "6", "5.orbax-checkpoint-tmp-1"):
        (tmp_path / name).mkdir()
    checkpoints.tidy(tmp_path, 4)
    assert checkpoints.saved(tmp_path) == [4, 2]
    assert len(list(tmp_path.iterdir())) == 2
