"""An imitation of `gcloud`: what the scripts ask of it, on a folder.

The folder `ROOT` holds the states of a queued resource and its node as files, and
buckets and the homes of two workers as folders. What comes through ssh is run there.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["ROOT"])
WORDS = sys.argv[1:]
PAIRS = [word[2:].partition("=")[::2] for word in WORDS if re.match("--[a-z-]+=", word)]
FLAGS = dict(PAIRS)


def show(path: Path) -> None:
    """The next of the states that a file holds; the last one stays."""
    if (ROOT / "broken").exists():
        sys.exit("ERROR: UNAVAILABLE: no network")
    if not path.exists():
        sys.exit("ERROR: (gcloud.describe) NOT_FOUND: Resource 'x' was not found")
    states = path.read_text().split()
    print(states[0])
    path.write_text(" ".join(states[1:] or states))


def hold() -> None:
    """Waits, while a test asks for it, so that it can act between two looks."""
    if (ROOT / "hold").exists():
        (ROOT / "hold").rename(ROOT / "held")
        until = time.monotonic() + 60
        while (ROOT / "held").exists() and time.monotonic() < until:
            time.sleep(0.01)


def place(name: str) -> Path:
    """Where a file or an object is."""
    return ROOT / name.replace("gs://", "buckets/") if "gs://" in name else Path(name)


def names(folder: Path) -> set[str]:
    """All files in a folder but the excluded ones."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    exclude = FLAGS.get("exclude")
    return {name for name in found if exclude is None or not re.match(exclude, name)}


def rsync(source: Path, target: Path) -> None:
    """Copies new files, and deletes what is not in the source if it is told to."""
    if not source.exists():
        sys.exit(f"ERROR: Did not find existing container at: {source}")
    for name in names(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)
    if "--delete-unmatched-destination-objects" in WORDS:
        for name in names(target) - names(source):
            (target / name).unlink()


def create() -> None:
    """A queued resource; it goes through the states of the file `after_create`."""
    if (ROOT / "queued").exists():
        sys.exit("ERROR: ALREADY_EXISTS")
    (ROOT / "queued").write_text((ROOT / "after_create").read_text())
    (ROOT / "node").write_text("READY")
    for worker in "01":
        (ROOT / "home" / worker).mkdir(parents=True)


def delete() -> None:
    """Deletes it, and the disks of its node."""
    (ROOT / "queued").unlink()
    (ROOT / "node").unlink(missing_ok=True)
    shutil.rmtree(ROOT / "home", ignore_errors=True)


def ssh() -> int:
    """Runs a command at home; the first exit status that is not zero."""
    statuses = []
    for worker in "01" if FLAGS["worker"] == "all" else FLAGS["worker"]:
        home = ROOT / "home" / worker
        env = {**os.environ, "HOME": str(home), "WORKER_NUMBER": worker}
        # As ssh does, without the settings of whoever calls.
        for name in ("RUN", "TPU", "BUCKET", "CONFIG", "PROJECT"):
            env.pop(name, None)
        done = subprocess.run(FLAGS["command"], shell=True, cwd=home, env=env)
        statuses.append(done.returncode)
    return next(filter(None, statuses), 0)


def main() -> int:
    """Notes the call, and does what it asks."""
    with open(ROOT / "calls", "a") as file:
        file.write(shlex.join(["gcloud", *WORDS]) + "\n")
    match [word for word in WORDS if not word.startswith("-")]:
        case ["compute", "tpus", "queued-resources", "describe", _]:
            hold()
            show(ROOT / "queued")
        case ["compute", "tpus", "tpu-vm", "describe", _]:
            show(ROOT / "node")
        case ["compute", "tpus", "queued-resources", "create", _]:
            create()
        case ["compute", "tpus", "queued-resources", "delete", _]:
            delete()
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            for worker in "01":
                shutil.copy(source, ROOT / "home" / worker / target.split(":")[1])
        case ["compute", "tpus", "tpu-vm", "ssh", _]:
            return ssh()
        case ["storage", "objects", "list", url]:
            found = [path.name for path in place(url.removesuffix("/*")).glob("*")]
            print(*found[:1], sep="\n", end="\n" if found else "")
        case ["storage", "rsync", source, target]:
            rsync(place(source), place(target))
        case ["storage", "cp", source, target]:
            shutil.copy2(place(source), place(target))
        case _:
            sys.exit(f"unknown: {shlex.join(WORDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
