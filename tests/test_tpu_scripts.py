"""The scripts of tpu_scripts/, on imitations of what they call, which note how."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "tpu_scripts"
ALL = (
    "create",
    "setup",
    "run",
    "logs",
    "stop",
    "delete",
    "watch",
    "gpus",
    "worker",
)
FILES = [*(f"{name}.sh" for name in ALL), "slurm.sbatch"]


class Place:
    """A folder with imitations of commands, a checkout, and what was called there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkout = root / "a checkout"
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts")
        programs = root / "programs"
        programs.mkdir()
        python = shlex.join([sys.executable, "-IS", str(HERE / "imitations/gcloud.py")])
        sleep = shutil.which("sleep")
        note = 'printf "%s\\n" "${0##*/} $*" >>"$ROOT/calls"'
        for name, text in {
            "gcloud": f'exec {python} "$@"',
            "python3": (HERE / "imitations/python3.sh").read_text(),
            # A second is a tenth of one.
            "sleep": f'case $1 in *.*) ;; *) set -- "0.$1" ;; esac; exec {sleep} "$1"',
            # A signal to `srun` kills its tasks; one by `scancel` reaches them.
            "srun": f'{note}; while [ "${{1#--}}" != "$1" ]; do shift; done; '
            "trap 'kill -KILL $task' TERM; \"$@\" & task=$!; "
            'echo "$task" >"$ROOT/task"; wait "$task"',
            "scancel": note + '; kill "-${1#--signal=}" "$(cat "$ROOT/task")"',
            "scontrol": note,
        }.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        (root / "limit").write_text("8")
        (root / "after_create").write_text("ACTIVE")
        self.env = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(root),
            "TMPDIR": str(root),
            "ROOT": str(root),
            "PROJECT": "my project",
            "BUCKET": "gs://bucket/some runs",
            "POLL_SECONDS": "1",
            "SYNC_SECONDS": "5",
            "PAUSE_SECONDS": "1",
            "PYTHON": str(programs / "python3"),
        }

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen:
        """Starts a script in the checkout, its output to a file named like it."""
        with open(self.root / f"{script}.out", "w") as out:
            return subprocess.Popen(
                ["sh", f"tpu_scripts/{script}", *arguments],
                cwd=self.checkout,
                env={**self.env, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str]:
        """The exit status of a script, and all that it prints."""
        status = self.start(script, *arguments, **env).wait(timeout=60)
        return status, (self.root / f"{script}.out").read_text()

    def dry(self, script: str, *arguments: str, **env: str) -> list[list[str]]:
        """The commands that a dry run shows, as a shell reads them."""
        status, out = self.run(script, *arguments, DRY_RUN="1", **env)
        assert status == 0, out
        assert not self.calls()
        return [shlex.split(line) for line in out.splitlines() if ".sh: " not in line]

    def calls(self) -> list[list[str]]:
        """What was called, but for looks at states."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [shlex.split(line) for line in lines if " describe " not in line]

    def steps(self) -> list[str]:
        """What was called, as 'queued-resources create' or 'start', but for copies."""
        return [step(call) for call in self.calls() if call[1] != "storage"]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until something is so."""
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)

    def rows(self, folder: str) -> list[int]:
        """The generations of a ledger, which may not be there."""
        path = self.root / folder / "ledger.jsonl"
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        return [json.loads(line)["generation"] for line in lines]

    def trained(self) -> list[str]:
        """What the trainings were called with, in any order."""
        path = self.root / "trained"
        return path.read_text().splitlines() if path.exists() else []

    def commit(self) -> None:
        """Makes the checkout one of git's."""
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "x"]):
            subprocess.run(["git", *command], cwd=self.checkout, check=True)

    def make_tpu(self) -> None:
        """A TPU with jes on it, as create.sh and setup.sh leave it."""
        (self.root / "queued").write_text("ACTIVE")
        (self.root / "node").write_text("READY")
        for worker in "01":
            home = self.root / "home" / worker / "jes"
            shutil.copytree(SCRIPTS, home / "tpu_scripts")
            (home / ".venv/bin").mkdir(parents=True)
            shutil.copy(self.root / "programs/python3", home / ".venv/bin/python")

    def preempt(self) -> None:
        """Takes the TPU away, as a power cut would."""
        (self.root / "queued").write_text("SUSPENDED")
        (self.root / "node").write_text("PREEMPTED")
        self.kill()

    def kill(self) -> None:
        """Kills what runs on the workers."""
        for name in ("supervisor", "child"):
            for path in (self.root / "home").glob(f"*/jes/runs/*/{name}"):
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)


def step(call: list[str]) -> str:
    """What a call is about, in a word or two."""
    if call[0] == "git":
        return "git archive" if call[3] == "archive" else ""
    command = next((w[10:] for w in call if w.startswith("--command=")), None)
    if command is None:
        return " ".join(call[3:5] if call[:2] == ["gcloud", "compute"] else call[:3])
    words = shlex.split(command)
    if "worker.sh" not in command:
        return words[0]
    at = next(i for i, word in enumerate(words) if word.endswith("worker.sh"))
    return "status" if words[1] == "-c" else words[at + 1]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.kill()


TPU = ["jes", "--project=my project", "--zone=us-central2-b"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *TPU, "--quiet"]
DESCRIBE = [*QUEUED, "describe", *TPU, "--format=value(state.state)"]


def remote(command: list[str]) -> list[str]:
    """The words of a command for the workers."""
    assert command[: len(SSH)] == SSH
    assert command[-1].startswith("--command=")
    return shlex.split(command[-1].removeprefix("--command="))


@pytest.mark.parametrize("script", FILES)
def test_help(place: Place, script: str) -> None:
    for flag in ("-h", "--help"):
        status, out = place.run(script, flag)
        assert status == 0
        assert out.startswith("usage: ")
        assert script in out.splitlines()[0]
        assert "DRY_RUN=1" in out
    assert not place.calls()


@pytest.mark.parametrize(
    ("script", "arguments", "env", "message"),
    [
        ("create.sh", ["now"], {}, "takes no arguments, not 'now'"),
        ("create.sh", [], {"PROJECT": ""}, "PROJECT is not set"),
        ("create.sh", [], {"TPU": "My TPU"}, "TPU must be lower-case letters"),
        ("create.sh", [], {"SPOT": "yes"}, "SPOT must be 0 or 1, not 'yes'"),
        ("create.sh", [], {"WAIT_SECONDS": "2h"}, "WAIT_SECONDS must be a whole"),
        ("delete.sh", ["all"], {}, "takes no arguments, not 'all'"),
        ("setup.sh", ["."], {}, "takes no arguments, not '.'"),
        ("stop.sh", ["all"], {}, "takes no arguments, not 'all'"),
        ("run.sh", ["seed=1"], {}, "not a flag of jes.train: 'seed=1'"),
        ("run.sh", ["--config=x.py"], {}, "set CONFIG or RUN"),
        ("run.sh", [], {"RUN": "../x"}, "RUN must be letters"),
        ("run.sh", [], {"RUN": "a/b"}, "RUN must be letters"),
        ("run.sh", [], {"BUCKET": "bucket"}, "BUCKET must be like gs://bucket"),
        ("logs.sh", ["many"], {}, "LINES must be a whole number, not 'many'"),
        ("logs.sh", ["1", "2"], {}, "takes one number of lines, not '1 2'"),
        ("watch.sh", [], {"BUCKET": ""}, "BUCKET is not set"),
        ("gpus.sh", [], {"GPUS": "all"}, "GPUS must be numbers"),
        ("gpus.sh", [], {"PYTHON": "/no/python"}, "there is no /no/python"),
        ("gpus.sh", ["--workdir=x"], {}, "set CONFIG or RUN"),
        ("slurm.sbatch", ["x"], {}, "not a flag of jes.train: 'x'"),
        ("worker.sh", [], {}, "needs a command"),
        ("worker.sh", ["begin"], {}, "there is no command 'begin'"),
        ("worker.sh", ["logs"], {}, "logs needs a number of lines"),
    ],
)
def test_wrong_arguments(
    place: Place, script: str, arguments: list[str], env: dict, message: str
) -> None:
    status, out = place.run(script, *arguments, **env)
    assert status == 2
    assert f"{script}: error: " in out
    assert message in out
    assert not place.calls()


def test_dry_create(place: Place) -> None:
    shown = place.dry("create.sh", SPOT="1", VALID_UNTIL="6h", ACCELERATOR="v6e-8")
    assert shown == [
        DESCRIBE,
        [
            *[*QUEUED, "create", *TPU, "--node-id=jes", "--accelerator-type=v6e-8"],
            *["--runtime-version=tpu-ubuntu2204-base", "--quiet", "--spot"],
            "--valid-until-duration=6h",
        ],
        DESCRIBE,
    ]
    assert not {"--spot"} & set(place.dry("create.sh")[1])


def test_dry_setup(place: Place) -> None:
    archive, copy, unpack, install = place.dry("setup.sh", FOLDER="a folder")
    assert archive[:2] == ["git", "-C"]
    assert archive[3:] == [
        *["archive", "--format=tar.gz", "--output=jes.tar.gz", "HEAD"]
    ]
    assert copy == [
        *["gcloud", "compute", "tpus", "tpu-vm", "scp", "jes.tar.gz"],
        *["jes:jes.tar.gz", *TPU[1:], "--quiet", "--worker=all"],
    ]
    assert remote(unpack)[-1] == "a folder"
    assert remote(install)[-3:] == ["sh", "a folder/tpu_scripts/worker.sh", "install"]
    fetch, install = place.dry("setup.sh", REPOSITORY="https://x/y z", REVISION="main")
    assert "git fetch" in remote(fetch)[2]
    assert remote(fetch)[-3:] == ["jes", "https://x/y z", "main"]
    assert remote(install)[-1] == "install"


def test_dry_run_keeps_odd_values(place: Place) -> None:
    flag = '--config.data.root=/a b/it\'s $HOME "x"; *'
    save, start = place.dry("run.sh", flag, CONFIG="configs/my file.py", RUN="r.1")
    assert "--worker=all" in save
    assert remote(save)[-1] == "save"
    assert "--worker=all" in start
    words = remote(start)
    assert words[0] == "env"
    assert {"RUN=r.1", "CONFIG=configs/my file.py"} < set(words)
    assert "BUCKET=gs://bucket/some runs" in words
    assert words[-4:] == ["jes/tpu_scripts/worker.sh", "start", "--distributed", flag]
    (start,) = place.dry("run.sh", BUCKET="")
    assert remote(start)[-2:] == ["start", "--distributed"]


def test_dry_logs_stop_delete(place: Place) -> None:
    (all_logs,) = place.dry("logs.sh", "5")
    assert "--worker=all" in all_logs
    assert remote(all_logs)[-2:] == ["logs", "5"]
    (follow,) = place.dry("logs.sh", "-f")
    assert "--worker=0" in follow
    assert remote(follow)[-2:] == ["follow", "20"]
    (stop,) = place.dry("stop.sh")
    assert remote(stop)[-1] == "stop"
    looks, node, stop, delete = place.dry("delete.sh")
    assert looks == DESCRIBE
    assert node == [*QUEUED[:3], "tpu-vm", "describe", *TPU, "--format=value(state)"]
    assert remote(stop)[-1] == "stop"
    assert delete == [*QUEUED, "delete", *TPU, "--force", "--quiet"]


def test_dry_watch_shows_a_recovery(place: Place) -> None:
    shown = place.dry("watch.sh", "--config.seed=1")
    steps = [step(command) for command in shown if "describe" not in command]
    assert steps == [
        *["stop", "queued-resources delete", "queued-resources create"],
        *["git archive", "tpu-vm scp", "sh", "install", "save", "start"],
    ]
    assert remote(shown[-1])[-1] == "--config.seed=1"


def test_dry_gpus_and_slurm(place: Place) -> None:
    train = [place.env["PYTHON"], "-m", "jes.train"]
    rest = ["--config=configs/a b.py", "--workdir=runs/r", "--config.seed=1"]
    odd = {"CONFIG": "configs/a b.py", "RUN": "r"}
    (shown,) = place.dry("gpus.sh", "--config.seed=1", GPUS="0,2", **odd)
    assert shown == ["env", "CUDA_VISIBLE_DEVICES=0,2", *train, *rest]
    assert place.dry("gpus.sh", "--config.seed=1", **odd) == [[*train, *rest]]
    (shown,) = place.dry("slurm.sbatch", "--config.seed=1", STOP_SECONDS="9", **odd)
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=9"]
    assert shown == [*srun, *train, "--distributed", *rest]


def test_create_is_idempotent_and_waits(place: Place) -> None:
    (place.root / "after_create").write_text("CREATING WAITING_FOR_RESOURCES ACTIVE")
    status, out = place.run("create.sh")
    assert (status, place.steps()) == (0, ["queued-resources create"])
    assert "jes is WAITING_FOR_RESOURCES" in out
    status, out = place.run("create.sh")
    assert (status, place.steps()) == (0, ["queued-resources create"])
    assert "jes exists" in out


@pytest.mark.parametrize(
    ("states", "status"),
    [("PROVISIONING ACTIVE", 0), ("ACCEPTED FAILED", 1), ("ACCEPTED", 3)],
)
def test_create_with_a_request_before(place: Place, states: str, status: int) -> None:
    (place.root / "queued").write_text(states)
    got, out = place.run("create.sh", WAIT_SECONDS="2")
    assert (got, place.steps()) == (status, [])
    assert f"jes is {states.split()[-1]}" in out


@pytest.mark.parametrize("script", ["create.sh", "delete.sh"])
def test_an_unknown_state_is_not_none(place: Place, script: str) -> None:
    (place.root / "broken").touch()
    status, out = place.run(script)
    assert (status, place.calls()) == (1, [])
    assert "UNAVAILABLE: no network" in out
    assert "the state cannot be read" in out


def test_delete_is_idempotent(place: Place) -> None:
    place.make_tpu()
    place.preempt()
    assert place.run("delete.sh")[0] == 0
    assert place.steps() == ["queued-resources delete"]
    status, out = place.run("delete.sh")
    assert (status, len(place.steps())) == (0, 1)
    assert "jes does not exist" in out


def test_delete_keeps_a_run_that_is_nowhere_else(place: Place) -> None:
    place.make_tpu()
    (place.root / "limit").write_text("2")
    assert place.run("run.sh")[0] == 0
    place.wait_for(lambda: len(place.rows("home/0/jes/runs/jes")) == 2)
    status, out = place.run("delete.sh", BUCKET="")
    assert (status, place.steps()[-1]) == (1, "start")
    assert "BUCKET is not set" in out
    assert place.run("delete.sh")[0] == 0
    assert place.steps()[-1] == "queued-resources delete"
    assert place.trained().count("stopped") == 2
    assert place.rows("buckets/bucket/some runs/jes") == [0, 1]
    place.make_tpu()
    shutil.rmtree(place.root / "home/0/jes/tpu_scripts")
    status, out = place.run("delete.sh")
    assert (status, place.steps()[-1]) == (1, "stop")
    assert "the run could not be stopped: delete.sh -f" in out
    assert place.run("delete.sh", "-f")[0] == 0
    assert place.steps()[-1] == "queued-resources delete"


def test_run_is_idempotent_stops_and_goes_on(place: Place) -> None:
    place.make_tpu()
    (place.root / "limit").write_text("3")
    status, out = place.run("run.sh", "--config.x=a b")
    assert (status, out.count("jes is started")) == (0, 2)
    status, out = place.run("run.sh", "--config.x=a b")
    assert (status, out.count("jes is running already")) == (0, 2)
    place.wait_for(lambda: len(place.rows("home/0/jes/runs/jes")) == 3)
    status, out = place.run("stop.sh")
    assert (status, out.count("stopping jes")) == (0, 2)
    assert place.trained().count("stopped") == 2
    bucket = "buckets/bucket/some runs/jes"
    assert place.rows(bucket) == [0, 1, 2]
    assert (place.root / bucket / "checkpoints/3").exists()
    assert not (place.root / bucket / "summary.json").exists()
    assert "jes is not running" in place.run("stop.sh")[1]

    (place.root / "limit").write_text("8")
    assert place.run("run.sh", "--config.x=a b")[0] == 0
    codes = [place.root / f"home/{i}/jes/runs/jes.worker/code" for i in "01"]
    place.wait_for(lambda: all(path.exists() for path in codes))
    assert (place.root / bucket / "summary.json").exists()
    assert place.rows(bucket) == list(range(8))
    flags = "--config=configs/arc_c.py --workdir=runs/jes --distributed --config.x=a b"
    starts = [line for line in place.trained() if line != "stopped"]
    assert [line.partition(" -m jes.train")[0] for line in starts] == [
        *["all from 0:"] * 2,
        *["all from 3:"] * 2,
    ]
    assert all(line.endswith(flags) for line in starts)
    logs = place.run("logs.sh", "1")[1]
    assert logs.count("ended with exit status 0") == 2


def test_the_folder_that_counts_is_that_of_process_0(place: Place) -> None:
    """Which need not run on worker 0, and after a restart may run elsewhere."""
    place.make_tpu()
    (place.root / "first").write_text("1")
    (place.root / "limit").write_text("3")
    assert place.run("run.sh")[0] == 0
    place.wait_for(lambda: len(place.rows("home/1/jes/runs/jes")) == 3)
    shutil.rmtree(place.root / "home/0/jes/runs/jes")  # where nothing is written
    assert place.run("stop.sh")[0] == 0
    assert place.rows("buckets/bucket/some runs/jes") == [0, 1, 2]

    (place.root / "first").write_text("0")
    (place.root / "limit").write_text("8")
    status, out = place.run("watch.sh")
    assert status == 0, out
    assert "finished after 8 generations" in out
    assert place.rows("buckets/bucket/some runs/jes") == list(range(8))
    starts = [line.split(":")[0] for line in place.trained() if line != "stopped"]
    assert starts[2:] == ["all from 3", "all from 3"]
    assert not (place.root / "home/1/jes/runs/jes.first").exists()


def test_variables_and_flags_reach_the_workers(place: Place) -> None:
    given = {"HF_TOKEN": "a secret", "XLA_FLAGS": "--a=1 --b=2", "MINE": "x y"}
    given |= {"PASS": "MINE OTHER", "SSH_FLAGS": "--internal-ip --tunnel-through-iap"}
    start = place.dry("run.sh", BUCKET="", **given)[-1]
    assert {"--internal-ip", "--tunnel-through-iap"} < {*start}
    (command,) = (w for w in start if w.startswith("--command="))
    words = shlex.split(command.removeprefix("--command="))
    assert {"HF_TOKEN=hidden", "XLA_FLAGS=--a=1 --b=2", "MINE=x y"} < {*words}
    assert "OTHER" not in command
    assert "secret" not in command
    flags = "--service-account=me --network=there"
    create = place.dry("create.sh", CREATE_FLAGS=flags)[1]
    assert create[-2:] == flags.split()
    status, out = place.run("run.sh", PASS="A;B")
    assert status == 2
    assert "'A;B' is no name of a variable" in out

    place.make_tpu()
    assert place.run("run.sh", **given)[0] == 0
    place.wait_for(lambda: len(place.trained()) == 2)
    (call,) = (call for call in place.calls() if call[-1].endswith("--distributed"))
    assert "'HF_TOKEN=a secret'" in call[-1]


def test_a_bucket_that_cannot_be_read_is_no_new_run(place: Place) -> None:
    place.make_tpu()
    gcloud = place.root / "programs/gcloud"
    text = gcloud.read_text().replace("exec", '[ "$3" != list ] || exit 1\nexec')
    gcloud.write_text(text)
    status, out = place.run("run.sh")
    assert status == 1
    assert out.count("gs://bucket/some runs/jes cannot be read") == 2
    assert not place.trained()


def test_watch_recovers_from_a_preemption(place: Place) -> None:
    (place.root / "limit").write_text("4")
    place.commit()
    bucket = "buckets/bucket/some runs/jes"

    watch = place.start("watch.sh", "--config.x=a b", SPOT="1")
    place.wait_for(lambda: len(place.rows(bucket)) == 4)
    # Between two looks: one that is under way may start the run that it sees killed.
    (place.root / "hold").touch()
    place.wait_for((place.root / "held").exists)
    place.preempt()
    (place.root / "limit").write_text("8")
    (place.root / "held").unlink()
    out = place.root / "watch.sh.out"
    place.wait_for(lambda: watch.poll() is not None)
    assert watch.returncode == 0, out.read_text()

    assert "finished after 8 generations" in out.read_text()
    assert place.rows(bucket) == list(range(8))
    assert (place.root / bucket / "summary.json").exists()
    main = ("create", "delete", "scp", "install", "start")
    steps = [s.split()[-1] for s in place.steps() if s.split()[-1] in main]
    start = ["create", "scp", "install", "start"]
    assert steps == [*start, "delete", *start, "delete"]
    # Both workers took the four generations from the bucket.
    starts = [line.split(":")[0] for line in place.trained() if line != "stopped"]
    assert starts == ["all from 0", "all from 0", "all from 4", "all from 4"]


def test_watch_restarts_a_crash_and_gives_up(place: Place) -> None:
    place.commit()
    place.make_tpu()
    (place.root / "status").write_text("1")
    status, out = place.run("watch.sh", TRIES="2")
    assert status == 1
    assert "2 starts without progress" in out
    assert "ended with exit status 1 after 0 generations: starting it again" in out
    assert place.steps().count("start") == 2
    assert ": worker.sh: ended with exit status 1" in out  # its log, before it is gone
    assert place.steps()[-1] == "queued-resources delete"


def test_watch_starts_a_run_that_stalls_again(place: Place) -> None:
    place.commit()
    place.make_tpu()
    (place.root / "limit").write_text("4")  # and then it waits
    watch = place.start("watch.sh", STALL_SECONDS="1", TRIES="3", KEEP="1")
    place.wait_for(lambda: len(place.trained()) == 3 * 2 + 2 * 2)
    assert watch.wait(timeout=60) == 1
    out = (place.root / "watch.sh.out").read_text()
    assert "no generation for" in out
    assert "starting it again" in out
    assert "jes is left, and costs" in out
    assert "queued-resources delete" not in place.steps()


def test_watch_does_not_repeat_a_mistake(place: Place) -> None:
    place.commit()
    place.make_tpu()
    (place.root / "status").write_text("2")
    status, out = place.run("watch.sh")
    assert status == 2
    assert "the settings or the data are wrong" in out
    assert place.steps().count("start") == 1
    assert place.steps()[-1] == "queued-resources delete"


def test_watch_outlives_a_failing_network(place: Place) -> None:
    (place.root / "broken").touch()
    status, out = place.run("watch.sh", LOOKS="3")
    assert (status, place.calls()) == (1, [])
    assert "jes is NOT deleted, and costs" in out
    assert out.count("trying again") == 2
    assert "3 failures in a row" in out


def test_dry_worker(place: Place) -> None:
    there, here = "gs://bucket/some runs/r", "runs/r"
    rsync = ["gcloud", "storage", "rsync", "--recursive"]
    last = "^(ledger[.]jsonl|summary[.]json)$|.*[.]part$"
    ledger = "runs/r.worker/ledger.jsonl"
    assert place.dry("worker.sh", "save", RUN="r") == [
        ["cp", "runs/r/ledger.jsonl", ledger],
        [*rsync, f"--exclude={last}|^checkpoints/|^model/", here, there],
        ["gcloud", "storage", "cp", ledger, f"{there}/ledger.jsonl"],
        [
            *[*rsync, f"--exclude={last}", "--delete-unmatched-destination-objects"],
            *[here, there],
        ],
        ["gcloud", "storage", "cp", f"{here}/summary.json", f"{there}/summary.json"],
    ]
    assert place.dry("worker.sh", "start", "--config.x=a b", RUN="r") == [
        [
            *["gcloud", "storage", "objects", "list", f"{there}/*"],
            *["--format=value(name)", "--limit=1"],
        ],
        ["rm", "-rf", "runs/r.part"],
        ["mkdir", "-p", "runs/r.part"],
        [*rsync, there, "runs/r.part"],
        ["rm", "-rf", here],
        ["mv", "runs/r.part", here],
        [
            *[".venv/bin/python", "-m", "jes.train", "--config=configs/arc_c.py"],
            *[f"--workdir={here}", "--config.x=a b"],
        ],
    ]
    assert not (place.checkout / "runs").exists()


def test_worker_has_a_newer_python_where_needed(place: Place) -> None:
    (place.root / "old_python").touch()
    status, out = place.run("worker.sh", "install", DRY_RUN="1", EXTRA="cuda13")
    assert status == 0, out
    assert [shlex.split(line) for line in out.splitlines()] == [
        ["rm", "-rf", ".venv"],
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        [
            *["python3", "-m", "uv", "venv", "--quiet", "--seed"],
            *["--python", "3.12", ".venv"],
        ],
        [
            *[".venv/bin/python", "-m", "pip", "install", "--quiet"],
            *["--editable", ".[cuda13]"],
        ],
    ]


@pytest.mark.parametrize(("status", "starts"), [("1", 3), ("2", 1), ("143", 1)])
def test_gpus_restarts_after_a_crash(place: Place, status: str, starts: int) -> None:
    (place.root / "status").write_text(status)
    got, _ = place.run("gpus.sh", GPUS="1", TRIES="3", RUN="r")
    assert got == int(status)
    assert len(place.trained()) == starts
    assert place.trained()[0].startswith("1 from 0: -m jes.train")
    (place.root / "status").unlink()
    assert place.run("gpus.sh", RUN="r")[0] == 0
    assert place.rows("a checkout/runs/r") == list(range(8))


def test_gpus_passes_a_signal_on_once(place: Place) -> None:
    (place.root / "limit").write_text("2")
    script = place.start("gpus.sh", RUN="r")
    place.wait_for(lambda: len(place.rows("a checkout/runs/r")) == 2)
    script.terminate()
    assert script.wait(timeout=60) == 143
    assert place.trained()[1:] == ["stopped"]


def test_slurm_queues_itself_again_when_its_time_is_over(place: Place) -> None:
    (place.root / "limit").write_text("2")
    job = {"SLURM_JOB_ID": "17", "RUN": "r"}
    script = place.start("slurm.sbatch", **job)
    place.wait_for(lambda: len(place.rows("a checkout/runs/r")) == 2)
    script.terminate()
    assert script.wait(timeout=60) == 143
    assert place.trained()[1:] == ["stopped"]
    assert place.calls()[-2:] == [
        ["scancel", "--signal=TERM", "17"],
        ["scontrol", "requeue", "17"],
    ]
    (place.root / "limit").write_text("8")
    assert place.run("slurm.sbatch", **job)[0] == 0
    assert place.rows("a checkout/runs/r") == list(range(8))
    names = [call[0] for call in place.calls()]
    assert names == ["srun", "scancel", "scontrol", "srun"]


def test_slurm_leaves_a_preempted_job_to_slurm(place: Place) -> None:
    (place.root / "status").write_text("143")
    status, out = place.run("slurm.sbatch", SLURM_JOB_ID="17")
    assert status == 143
    assert "waiting for SLURM to end the job" in out
    assert [call[0] for call in place.calls()] == ["srun"]
