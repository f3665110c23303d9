"""Several processes, on one host or many, that are one run.

Each process has devices of its own and computes the same update. Only the members'
scores go from process to process, by `exchange`. The first process alone writes.

A signal or an error in one process ends all of them: every exchange of values begins
with an exchange of status codes. Where the error was one of settings or data, all exit
as for that; else as for what may work the next time.
"""

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jes.errors import InputError, Unavailable
from jes.io.interrupts import Stopped

RUNNING, DONE, FAILED, MISTAKEN = 0, 100, 101, 102
"""Status codes of a process; any other is the number of the signal that stopped it."""


LEAST = 256
"""Bytes that are sent at least where a text is."""
PIECE = 2**28
"""Bytes of an array that are sent at once: devices hold them too."""
LONGER = 30
"""Seconds that JAX would wait longer for a process than this one does."""


class PeerLost(Unavailable):
    """A peer stopped responding: skip JAX's shutdown barrier, which would wait."""


class RunDone(Exception):
    """The first process has nothing left to do."""


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    timeout: int,
    devices: Sequence[int] | None = None,
) -> None:
    """Waits for the other processes; must come before any other use of JAX.

    Args:
      coordinator: 'host:port' of the first process.
      processes, process: how many there are, and the number of this one. Without all
        three JAX looks for them (on TPU VMs, under SLURM and a few others).
      timeout: seconds without a heartbeat after which a process is given up.
      devices: numbers of those of the host that are this process's; by default all.

    Raises:
      InputError: if only some of the three are given, or there is nothing to join.
      Unavailable: if they do not connect.
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
            local_device_ids=devices,
            cluster_detection_method="deactivate" if named else None,
            initialization_timeout=timeout + LONGER,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        kind = InputError if isinstance(error, ValueError) else Unavailable
        raise kind(f"the processes did not connect: {line}") from error
    finally:
        waiting.cancel()


def _give_up(timeout: int) -> None:
    """Ends this process, whose main thread waits for others in JAX."""
    message = f"error: the processes did not connect: not all came within {timeout} s"
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def mark(workdir: Path) -> None:
    """Leaves `<workdir>.first` beside the run folder of the first process alone.

    For what copies run folders: which process is the first is up to the machines.

    Raises:
      InputError: if another has the folder of the run, from when it was the first.
    """
    marker = workdir.with_name(f"{workdir.name}.first")
    has = from_all(lambda: [socket.gethostname(), workdir.exists(), marker.exists()])
    before = [name for name, folder, marked in has if folder and marked]
    if before and not has[0][1]:
        raise _known(
            InputError(
                f"{workdir} is on {before[0]}, whose process was the first before; now "
                f"one on {has[0][0]} is: copy it there, or use a common disk"
            )
        )
    if first():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def exchange(make: Callable[[], np.ndarray]) -> np.ndarray:
    """The arrays of `make` of all processes, alike in shape: [processes, ...].

    Raises:
      Stopped: if any process got a signal to stop.
      RunDone: if the first process is done.
      InputError: if another process found a mistake; `Unavailable` if it failed, and
        `PeerLost` if one stopped responding.
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


def sent_by_first(tree: Any) -> Any:
    """The arrays of the first process, in all: trees of one structure and kind."""
    if jax.process_count() == 1:
        return tree
    _agree(RUNNING)

    def received(leaf: jax.Array) -> jax.Array:
        values = np.asarray(leaf) if first() else np.empty(leaf.shape, leaf.dtype)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        got = np.empty_like(data)
        for start in range(0, data.size, PIECE):
            piece = data[start : start + PIECE]
            sent = _answered(multihost_utils.broadcast_one_to_all, piece)
            got[start : start + PIECE] = sent
        return jax.device_put(got.view(leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(received, tree)


def check_same(what: str, make: Callable[[], str]) -> None:
    """Raises InputError in all processes if the text of `make` differs between any."""
    if jax.process_count() == 1:
        return
    digests = exchange(
        lambda: np.frombuffer(hashlib.sha256(make().encode()).digest(), np.uint8)
    )
    different = np.flatnonzero((digests != digests[0]).any(-1))
    if different.size:
        names = from_all(socket.gethostname)
        which = ", ".join(f"{number} ({names[number]})" for number in different)
        more = "es" if different.size > 1 else ""
        raise _known(
            InputError(f"process{more} {which}: {what} than the first ({names[0]})")
        )


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
    mistake = isinstance(error, InputError) and not isinstance(error, Unavailable)
    code = MISTAKEN if mistake else FAILED
    if isinstance(error, Stopped):
        code = error.signal_number
    with suppress(PeerLost):  # the first error says more
        _gather(np.array([code], np.uint32))


def _agree(mine: int) -> None:
    """Exchanges status codes; raises for those that end the run."""
    codes = _gather(np.array([mine], np.uint32))[:, 0].tolist()
    for code, kind in ((MISTAKEN, InputError), (FAILED, Unavailable)):
        if code in codes:
            number = codes.index(code)
            raise _known(kind(f"process {number} has failed: see its own output"))
    for code in codes:
        if code not in (RUNNING, DONE):
            raise _known(Stopped(code))
    if DONE in codes and mine != DONE:
        raise _known(RunDone())


def _gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, as bytes: JAX has no float64 by default."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    gathered = _answered(multihost_utils.process_allgather, data)
    return gathered.view(values.dtype).reshape(-1, *values.shape)


def _answered(ask: Callable[[np.ndarray], Any], data: np.ndarray) -> np.ndarray:
    """What all processes answer together; `PeerLost` where one does not."""
    try:
        return np.asarray(ask(data))
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jaxlib raises both
        reason = str(error).partition("\n")[0][:200]
        raise _known(
            PeerLost(
                "another process of the run stopped responding; start the same command "
                f"again in all of them to go on ({reason})"
            )
        ) from error
