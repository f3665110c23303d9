"""Several processes, on one host or many, that are one run.

Each process has devices of its own and computes the same update. Only the members'
scores go from process to process, by `exchange`. The first process alone writes.

A signal or an error in one process ends all of them: every exchange of values begins
with an exchange of status codes.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jes.errors import InputError
from jes.io.interrupts import Stopped

RUNNING, DONE, FAILED = 0, 100, 101
"""Status codes of a process; any other is the number of the signal that stopped it."""


LEAST = 256
"""Bytes that are sent at least where a text is."""
LONGER = 30
"""Seconds that JAX would wait longer for a process than this one does."""


class PeerLost(InputError):
    """A peer stopped responding: skip JAX's shutdown barrier, which would wait."""


class RunDone(Exception):
    """The first process has nothing left to do."""


def join(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> None:
    """Waits for the other processes; must come before any other use of JAX.

    Args:
      coordinator: 'host:port' of the first process.
      processes, process: how many there are, and the number of this one. Without all
        three JAX looks for them (on TPU VMs, under SLURM and a few others).
      timeout: seconds without a heartbeat after which a process is given up.

    Raises:
      InputError: if they do not connect, or only some of the three are given.
    """
    address = (coordinator, processes, process)
    named = address != (None, None, None)
    if named and None in address:
        raise InputError("--coordinator, --processes and --process go together")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator={coordinator} must be host:port")
    # SIGTERM stops the run; JAX would take it for a preemption notice.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX aborts the process, with a dump, when a peer does not come in time.
    waiting = threading.Timer(timeout, _give_up, (timeout,))
    waiting.start()
    try:
        jax.distributed.initialize(
            *address,
            cluster_detection_method="deactivate" if named else None,
            initialization_timeout=timeout + LONGER,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        raise InputError(f"the processes did not connect: {line}") from error
    finally:
        waiting.cancel()


def _give_up(timeout: int) -> None:
    """Ends this process, whose main thread waits for others in JAX."""
    message = f"error: the processes did not connect: not all came within {timeout} s"
    print(message, file=sys.stderr, flush=True)
    os._exit(2)


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def exchange(make: Callable[[], np.ndarray]) -> np.ndarray:
    """The arrays of `make` of all processes, alike in shape: [processes, ...].

    Raises:
      Stopped: if any process got a signal to stop.
      RunDone: if the first process is done.
      InputError: if another process failed; `PeerLost` if one stopped responding.
      Exception: that of `make`, where it was this process that failed.
    """
    if jax.process_count() == 1:
        return make()[None]
    try:
        values = make()
    except BaseException as error:
        _announce(error)
        raise
    _agree(RUNNING)
    return _gather(values)


def from_first(make: Callable[[], Any]) -> Any:
    """The value of `make` in the first process, as JSON, in all; see `exchange`."""
    return from_all(lambda: make() if first() else None)[0]


def from_all(make: Callable[[], Any]) -> list[Any]:
    """The values of `make` of all processes, as JSON, in order; see `exchange`."""
    text = json.dumps(make())
    if jax.process_count() == 1:
        return [json.loads(text)]
    sent = np.frombuffer(text.encode(), np.uint8)
    lengths = exchange(lambda: np.array([sent.size], np.uint32))[:, 0]
    # Of few lengths: each is a program of its own.
    padded = np.zeros(max(LEAST, 1 << int(lengths.max() - 1).bit_length()), np.uint8)
    padded[: sent.size] = sent
    rows = zip(exchange(lambda: padded), lengths, strict=True)
    return [json.loads(row[:length].tobytes()) for row, length in rows]


def check_same(what: str, make: Callable[[], str]) -> None:
    """Raises InputError in all processes if the text of `make` differs between any."""
    if jax.process_count() == 1:
        return
    digests = exchange(
        lambda: np.frombuffer(hashlib.sha256(make().encode()).digest(), np.uint8)
    )
    different = np.flatnonzero((digests != digests[0]).any(-1))
    if different.size:
        raise _known(InputError(f"process {different[0]} has {what} than the first"))


@contextmanager
def together() -> Iterator[None]:
    """Around a run: its end, or an error, in one process ends it in all."""
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
        _agree(DONE)
    except RunDone:
        pass
    except BaseException as error:
        _announce(error)
        raise


def _known(error: Any) -> Any:
    """Marks an error that all processes know of: it is not announced."""
    error.announced = True
    return error


def _announce(error: BaseException) -> None:
    """Sends this process's last status code to the others, once."""
    if getattr(error, "announced", False):
        return
    _known(error)
    code = error.signal_number if isinstance(error, Stopped) else FAILED
    with suppress(PeerLost):  # the first error says more
        _gather(np.array([code], np.uint32))


def _agree(mine: int) -> None:
    """Exchanges status codes; raises for those that end the run."""
    codes = _gather(np.array([mine], np.uint32))[:, 0].tolist()
    if FAILED in codes:
        number = codes.index(FAILED)
        raise _known(InputError(f"process {number} has failed: see its own output"))
    for code in codes:
        if code not in (RUNNING, DONE):
            raise _known(Stopped(code))
    if DONE in codes and mine != DONE:
        raise _known(RunDone())


def _gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, as bytes: JAX has no float64 by default."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    try:
        gathered = np.asarray(multihost_utils.process_allgather(data))
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jaxlib raises both
        reason = str(error).partition("\n")[0][:200]
        raise _known(
            PeerLost(
                "another process of the run stopped responding; start the same command "
                f"again in all of them to go on ({reason})"
            )
        ) from error
    return gathered.view(values.dtype).reshape(-1, *values.shape)
