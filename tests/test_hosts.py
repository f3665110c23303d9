"""Several processes are one run: the same bits, one that writes, little is sent."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoint import write_checkpoint
from small_run import EMBEDDED, SHAPE, outcome, rows, run_jobs, train_command

from jes.core import ledger as ledgers
from jes.export import rebuild
from jes.io.checkpoints import saved
from jes.models.shapes import QWEN2
from jes.models.weights import fingerprint

pytestmark = pytest.mark.slow
TIMEOUT = 30
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def processes(
    count: int, model: Path, workdir: Path, *changes: str, **last: Any
) -> list[dict[str, Any]]:
    """Jobs that are one run; `last` is of the last one. Others get other folders."""
    port, jobs = free_port(), []
    for number in range(count):
        own = workdir if number == 0 else workdir.with_name(f"{workdir.name}-{number}")
        argv = [
            *train_command(model, own, *changes),
            f"--coordinator=localhost:{port}",
            f"--processes={count}",
            f"--process={number}",
            f"--process_timeout={TIMEOUT}",
        ]
        jobs.append({"argv": argv, "after": number == 0, "collectives": True})
    jobs[-1] |= last
    return jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def results(folder: Path, small_model: Path) -> dict[str, list[dict[str, Any]]]:
    """What came of each run, a result a process."""
    wide = folder / "wide-model"
    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    shape = QWEN2 | SHAPE | {"vocab_size": vocabulary, "hidden_size": 64}
    write_checkpoint(wide, shape, tokenizer=EMBEDDED, dtype="float32", seed=0)
    killed = {"fault": {"at": "jes.train:tell", "call": 3, "do": "SIGKILL"}}
    runs = {
        "two": processes(2, small_model, folder / "two"),
        "wide": processes(2, wide, folder / "wide", "generations=1"),
        "three": processes(3, small_model, folder / "three", "generations=2"),
        "killed": processes(2, small_model, folder / "killed", **killed),
        "again": processes(2, small_model, folder / "killed"),
        "unlike": processes(2, small_model, folder / "unlike"),
    }
    runs["unlike"][1]["argv"].append("--config.seed=5")
    done = run_jobs([job for jobs in runs.values() for job in jobs], 3)
    return {name: [done.pop(0) for _ in jobs] for name, jobs in runs.items()}


def test_two_processes_are_one_with_two_devices(
    results: dict, folder: Path, finished_run: Path
) -> None:
    assert [r["status"] for r in results["two"]] == [0, 0], results["two"]
    assert outcome(folder / "two") == outcome(finished_run)


def test_every_process_has_the_same_weights(results: dict, folder: Path) -> None:
    for name, count in (("two", 2), ("three", 3), ("again", 2)):
        sealed = rows(folder / name.replace("again", "killed") / "ledger.jsonl")[-1]
        for number in range(1, count):
            said = f"process {number} has reached the weights {sealed['fingerprint']}"
            assert said in results[name][number]["stdout"]


def test_the_first_process_alone_writes(results: dict, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"wide-model", "two", "wide", "three", "killed"}


def test_members_need_not_divide_among_processes(
    results: dict, folder: Path, finished_run: Path
) -> None:
    assert [r["status"] for r in results["three"]] == [0, 0, 0], results["three"]
    ledger = ledgers.read(folder / "three" / "ledger.jsonl")
    expected = ledgers.read(finished_run / "ledger.jsonl").fitness[:2]
    np.testing.assert_array_equal(ledger.fitness, expected)
    assert fingerprint(rebuild(ledger).params) == ledger.fingerprints[2]


def sent(result: dict[str, Any]) -> list[list[Any]]:
    return json.loads(result["stdout"].splitlines()[-1])


def test_what_is_sent_does_not_grow_with_the_model(results: dict, folder: Path) -> None:
    """Scores of members and of an evaluation, texts, digests: not one weight."""
    small, wide = sent(results["two"][0]), sent(results["wide"][0])
    sizes = [
        (folder / name / "model" / "model.safetensors").stat().st_size
        for name in ("two", "wide")
    ]
    assert sizes[1] > 1.8 * sizes[0]
    assert sorted(small) == sorted(wide)
    assert {kind for kind, _ in small} == {"all-gather"}
    scores = 4 * 9 * 8  # members, fields of a score, bytes of a float64
    assert ["all-gather", scores] in small
    assert sum(size for _, size in small) < 3000
    # With another number of members in each of three processes: two, of which the
    # last has copies.
    assert ["all-gather", 6 * 9 * 8] in sent(results["three"][0])


def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    results: dict, folder: Path, finished_run: Path
) -> None:
    left, killed = results["killed"]
    assert killed["status"] == -9
    assert left["status"] not in (0, None)
    assert left["seconds"] < killed["seconds"] + 2 * TIMEOUT
    message = left["stderr"]
    assert "another process of the run stopped responding" in message or (
        "another task died" in message  # if JAX has noticed it first
    )
    assert [r["status"] for r in results["again"]] == [0, 0], results["again"]
    assert "going on after 3 generations" in results["again"][0]["stdout"]
    ours, theirs = outcome(folder / "killed"), outcome(finished_run)
    assert ours == theirs


def test_the_first_process_alone_saves_and_sends_what_it_has_saved(
    results: dict, folder: Path
) -> None:
    assert saved(folder / "two" / "checkpoints") == [6, 4]
    assert not (folder / "two-1").exists()
    assert "all-reduce" not in {kind for kind, _ in sent(results["two"][0])}
    assert "all-reduce" in {kind for kind, _ in sent(results["again"][0])}


@pytest.mark.parametrize(
    ("what", "status"), [("InputError", [2, 2, 2]), ("RuntimeError", [1, 1, 1])]
)
def test_all_exit_as_the_one_that_failed(
    what: str, status: list[int], folder: Path, small_model: Path
) -> None:
    """Wrong settings or data are not tried again; what a machine did wrong is."""
    fault = {"at": "jes.train:fitness_of", "call": 2, "do": what}
    jobs = processes(3, small_model, folder / what, fault=fault)
    done = run_jobs(jobs, 3)
    assert [result["status"] for result in done] == status, done
    assert "process 2 has failed: see its own output" in done[0]["stderr"]


def test_processes_that_come_apart_are_stopped_and_named(
    folder: Path, small_model: Path
) -> None:
    fault = {"at": "jes.train:fitness_of", "call": 2, "do": "negated"}
    done = run_jobs(processes(2, small_model, folder / "apart", fault=fault), 2)
    assert [result["status"] for result in done] == [2, 2], done
    here = socket.gethostname()
    message = f"process 1 ({here}): other weights after 2 generations than the first"
    assert all(message in result["stderr"] for result in done)
    assert len(ledgers.read(folder / "apart" / "ledger.jsonl").fitness) == 2
    assert not saved(folder / "apart" / "checkpoints")


def test_other_settings_are_refused_by_all(results: dict) -> None:
    for result in results["unlike"]:
        assert result["status"] == 2, result
        here = socket.gethostname()
        message = f"process 1 ({here}): other settings than the first ({here})"
        assert message in result["stderr"]


@pytest.mark.parametrize("process", [0, 1])
def test_a_peer_that_never_comes_is_one_line(process: int, tmp_path: Path) -> None:
    """JAX would abort the process, with status 134 and a dump."""
    address = f"--coordinator=localhost:{free_port()}", "--processes=2"
    flags = *address, f"--process={process}", "--process_timeout=2"
    done = subprocess.run(
        [sys.executable, "-m", "jes.train", *flags, f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    said = "error: the processes did not connect: not all came within 2 s"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
