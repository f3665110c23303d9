"""Runs command lines of jes, each in a fork of one process that has imported it.

    python tests/command_lines.py < jobs.json > results.json

A job is `{"argv": [module, argument, ...], "fault": {...}}`, a result `{"status",
"stdout", "stderr", "seconds"}`. A fault hits one call of one function, just before it
would run: `{"at": "jes.train:tell", "call": 2, "do": "SIGKILL"}`. What it does is the
name of a signal (or of several in turn), of an errno that is raised as an OSError, or
`sleep`. Imports take longer than these runs do, and forking is safe until JAX starts a
backend.
"""

import errno
import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any


def plant(fault: dict[str, Any]) -> None:
    """Replaces the function of a fault by one that fails at the chosen call."""
    module, _, path = fault["at"].partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    setattr(owner, name, failing(getattr(owner, name), fault))


def failing(function: Callable, fault: dict[str, Any]) -> Callable:
    """`function`, with the fault at call number `call` (the first by default)."""
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.get("call", 1):
            for what in fault["do"].split():
                strike(what)
        return function(*args, **kwargs)

    return wrapped


def strike(what: str) -> None:
    """Sends this process a signal, raises an OSError, or hangs for a minute."""
    if what == "sleep":
        time.sleep(60)
    elif what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
        time.sleep(0.1)  # for the thread that answers
    else:
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job in a forked child and waits for it."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(run_main(job))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = {}
        for name, file in (("stdout", out), ("stderr", err)):
            file.seek(0)
            texts[name] = file.read().decode()
    return {"status": status, "seconds": time.monotonic() - began, **texts}


def run_main(job: dict[str, Any]) -> int:
    """The exit status of the module's `main` with these arguments."""
    module, *arguments = job["argv"]
    sys.argv = [f"{module}.py", *arguments]
    main = importlib.import_module(module).main
    if "fault" in job:
        plant(job["fault"])
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
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    """Runs the jobs of standard input, one after the other."""
    for name in ("train", "export", "evaluate"):
        importlib.import_module(f"jes.{name}")
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018  loads lazily
    json.dump([run_job(job) for job in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
