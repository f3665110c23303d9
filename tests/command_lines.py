"""Runs command lines of jes, each in a fork of one process that has imported it.

    python tests/command_lines.py 2 < jobs.json > results.json

The number is how many run at once (the first runs alone, and what it compiles is there
for the others).

A job is `{"argv": [module, argument, ...], "fault": {...}}`, a result `{"status",
"stdout", "stderr", "seconds"}`. With `"after": true` it waits until none is running,
and those without run beside it, also the first. With `"collectives": true` the last
line of its output lists what its compiled programs send from device to device, as
`[operation, bytes]`. A fault hits one call of one function, just before it
would run: `{"at": "jes.train:tell", "call": 2, "do": "SIGKILL"}`. What it does is the
name of a signal (or of several in turn), of an errno that is raised as an OSError, or
of an error; `sleep`; or `negated`, by which the function returns minus what it would.
Imports take longer than these runs do, and forking is safe until JAX starts a
backend.
"""

import errno
import functools
import importlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax

from jes.errors import InputError

# Another process is still writing a program: it is compiled here as well.
warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


FAILURES = {"InputError": InputError, "RuntimeError": RuntimeError}


def place(at: str) -> tuple[Any, str]:
    """The module or object that 'jes.train:tell' names, and the name in it."""
    module, _, path = at.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name


def failing(function: Callable, fault: dict[str, Any]) -> Callable:
    """`function`, with the fault at call number `call` (the first by default)."""
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.get("call", 1):
            if fault["do"] == "negated":
                return -function(*args, **kwargs)
            for what in fault["do"].split():
                strike(what)
        return function(*args, **kwargs)

    return wrapped


def strike(what: str) -> None:
    """Sends this process a signal, raises an error, or hangs for a minute."""
    if what == "sleep":
        time.sleep(60)
    elif what in FAILURES:
        raise FAILURES[what]("it failed")
    elif what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
        time.sleep(0.1)  # for the thread that answers
    else:
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))


class Child:
    """A job that runs in a forked child."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.began = time.monotonic()
        # Open until the child has ended.
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.pid = os.fork()
        if not self.pid:
            # Ignored in processes that were started in the background.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, file in enumerate(self.files, 1):
                os.dup2(file.fileno(), number)
            os._exit(run_main(job))

    def result(self, status: int) -> dict[str, Any]:
        """What came of it, once it has ended with this wait status."""
        for file in self.files:
            file.seek(0)
        out, err = (file.read().decode() for file in self.files)
        code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self.began
        return {"status": code, "stdout": out, "stderr": err, "seconds": seconds}


def run_jobs(jobs: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """The results of the jobs; one by one where `at_once` is 1."""
    running: dict[int, tuple[int, Child]] = {}
    results: dict[int, dict[str, Any]] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        # The first is alone: it fills the cache of compiled programs.
        grouped = any("after" in job for job in jobs)
        while waiting and len(running) < (at_once if results or grouped else 1):
            if running and waiting[0][1].get("after"):
                break
            number, job = waiting.pop(0)
            child = Child(job)
            running[child.pid] = number, child
        pid, status = os.wait()
        number, child = running.pop(pid)
        results[number] = child.result(status)
    return [results[number] for number in range(len(jobs))]


def run_main(job: dict[str, Any]) -> int:
    """The exit status of the module's `main` with these arguments."""
    module, *arguments = job["argv"]
    sys.argv = [f"{module}.py", *arguments]
    main = importlib.import_module(module).main
    if "fault" in job:
        owner, name = place(job["fault"]["at"])
        setattr(owner, name, failing(getattr(owner, name), job["fault"]))
    try:
        main()
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        traceback.print_exc()
        status = 130 if sys.exc_info()[0] is KeyboardInterrupt else 1
    if job.get("collectives"):
        print(json.dumps(collectives()))
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def collectives() -> list[tuple[str, int]]:
    """What the programs compiled in this process send: each operation, its bytes."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = re.compile(rf"= (.*?) ((?:{kinds})[a-z-]*)\(")
    client: Any = jax.local_devices()[0].client
    found = []
    for program in client.live_executables():
        for module in program.hlo_modules():
            for shapes, kind in pattern.findall(module.to_string()):
                found.append((kind, sum(map(size, ARRAY.findall(shapes)))))
    return found


ARRAY = re.compile(r"(pred|[a-z]+(?:\d+))\[([\d,]*)\]")
"""An array in the text of a program: its type, which ends with its bits, its shape."""


def size(array: tuple[str, str]) -> int:
    """Bytes of an array as `ARRAY` finds it."""
    kind, shape = array
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8


def main() -> None:
    """Runs the jobs of standard input."""
    for name in ("train", "export", "evaluate"):
        importlib.import_module(f"jes.{name}")
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018  loads lazily
    json.dump(run_jobs(json.load(sys.stdin), int(sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
