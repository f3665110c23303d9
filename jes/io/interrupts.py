"""Ctrl-C and SIGTERM: finish what is running on the device, save, then stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jes.io.console import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


Before = Callable[[str], None]
"""Called with what comes next (or '', for more of the same) wherever it is safe to
stop: it may raise `Stopped`."""


def proceed(doing: str = "") -> None:
    """A `Before` that lets everything go on."""


class Stopped(Exception):
    """A signal has asked the run to stop.

    Attributes:
      signal_number: of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def check(self, doing: str = "") -> None:
        """Raises `Stopped` if a signal came: a `Before`."""
        del doing
        if self.signal_number is not None:
            raise Stopped(self.signal_number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second one stops at once.

    Python runs signal handlers between two steps of the main thread, which may compile
    or wait for the device for minutes. So a thread reads the signals, from the pipe
    that the system writes their numbers to.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can handle signals
        return

    def note(number: int, _: object) -> None:
        request.signal_number = number

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, request), daemon=True)
    watcher.start()
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(pipe_before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, request: StopRequest) -> None:
    """Handles the signals that arrive in a pipe until its other end is closed."""
    asked = False
    while byte := os.read(reader, 1):
        number = byte[0]
        if number not in SIGNALS:
            continue
        if asked:
            console.show_cursor()  # which a progress bar hides
            os._exit(128 + number)  # no clean-up: a run survives being killed
        asked = True
        request.signal_number = number
        console.print("stopping: saving first (once more to stop at once)")
