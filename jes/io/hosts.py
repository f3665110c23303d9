"""Several processes, on one host or many, that are one run.

Each has devices of its own and computes the same update; only what members came to
goes from process to process, by `exchange`. The first process alone writes. What ends
one of them, a signal or an error, ends them all: every exchange says first whether
all are well.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jes.errors import InputError
from jes.io.interrupts import Stopped

WELL, OVER, FAILED = 0, 100, 101
"""What a process says of itself; anything else is the number of a signal."""


class Gone(InputError):
    """A process has gone without a word. Not to be waited for at the exit either."""


class Over(Exception):
    """The run is over: the first process has nothing left to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """How processes find each other.

    Attributes:
      coordinator: 'host:port' of the first process; '' to be found by JAX, which knows
        TPU VMs, SLURM and some others.
      processes, process: how many there are, and the number of this one.
      timeout: seconds without a sign of life after which a process is given up.
    """

    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    timeout: int = 300

    @property
    def named(self) -> bool:
        """Whether it is said here who the processes are, or some of it."""
        return bool(self.coordinator) or (self.processes, self.process) != (None, None)

    def join(self) -> None:
        """Waits for the other processes; before anything else is done with JAX.

        Raises:
          InputError: if they do not come, or the settings do not say who they are.
        """
        settings = (self.coordinator or None, self.processes, self.process)
        if self.named and None in settings:
            raise InputError("--coordinator, --processes and --process go together")
        # SIGTERM is for the run, not for JAX.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                *settings,
                # None of its ways to find them, where everything is said.
                cluster_detection_method="deactivate" if self.named else None,
                initialization_timeout=self.timeout,
                heartbeat_timeout_seconds=self.timeout,
                shutdown_timeout_seconds=self.timeout,
            )
        except (ValueError, RuntimeError) as error:
            line = str(error).strip().partition("\n")[0]
            raise InputError(f"the processes did not come together: {line}") from error


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def exchange(make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives in every process: [processes, ...], the same everywhere.

    Args:
      make: gives an array of one dtype and shape in all processes.

    Raises:
      Stopped: if any process was asked to stop.
      Over: if the first process is done.
      InputError: if another process failed; `Gone` if it does not answer.
      Exception: that of `make`, where it was this process that failed.
    """
    if jax.process_count() == 1:
        return make()[None]
    try:
        values = make()
    except BaseException as error:
        _say(error)
        raise
    _agree(WELL)
    return _gather(values)


def from_first(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in the first process, in all of them; raises as `exchange`."""
    sent = np.frombuffer(make() if first() else b"", np.uint8)
    (length, *_) = exchange(lambda: np.array([sent.size], np.uint32))[:, 0]
    padded = np.zeros(length, np.uint8)
    padded[: sent.size] = sent
    return exchange(lambda: padded)[0].tobytes()


def check_same(what: str, make: Callable[[], str]) -> None:
    """Raises InputError in all processes if the text of `make` differs between any."""
    if jax.process_count() == 1:
        return
    digests = exchange(
        lambda: np.frombuffer(hashlib.sha256(make().encode()).digest(), np.uint8)
    )
    different = np.flatnonzero((digests != digests[0]).any(-1))
    if different.size:
        error = InputError(f"process {different[0]} has {what} than the first")
        error.told = True  # type: ignore[attr-defined]
        raise error


@contextmanager
def together() -> Iterator[None]:
    """Around a run: an error or the end of it in one process ends it in all."""
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
        _agree(OVER)
    except Over:
        pass
    except BaseException as error:
        _say(error)
        raise


def _say(error: BaseException) -> None:
    """Tells the others why this process ends, once."""
    if getattr(error, "told", False):
        return
    error.told = True  # type: ignore[attr-defined]
    code = error.signal_number if isinstance(error, Stopped) else FAILED
    with suppress(Gone):  # the first error says more
        _gather(np.array([code], np.uint32))


def _agree(mine: int) -> None:
    """Raises what the others have to say, unless it is what this process says too."""
    codes = _gather(np.array([mine], np.uint32))[:, 0].tolist()
    failed = [process for process, code in enumerate(codes) if code == FAILED]
    signals = [code for code in codes if code not in (WELL, OVER, FAILED)]
    error: Any
    if failed:
        error = InputError(f"process {failed[0]} has failed, as its own output says")
    elif signals:
        error = Stopped(signals[0])
    elif OVER in codes and mine != OVER:
        error = Over()
    else:
        return
    error.told = True
    raise error


def _gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, bit for bit: JAX has no float64 by default."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    try:
        gathered = np.asarray(multihost_utils.process_allgather(bits))
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jaxlib raises both
        gone = Gone(
            "another process of the run has gone; start the same command again in all "
            f"of them, and it goes on ({str(error).partition(chr(10))[0][:200]})"
        )
        gone.told = True  # type: ignore[attr-defined]
        raise gone from error
    return gathered.view(values.dtype).reshape(-1, *values.shape)
