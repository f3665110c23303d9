"""Command lines: what the user got wrong is one line, never a traceback of ours."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from jes.errors import InputError
from jes.io.interrupts import Stopped


def start(command: Callable[[list[str]], None]) -> None:
    """Parses absl flags and runs `command` with what is left of the command line."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error:
            raise  # absl prints these well
        # A config file is Python: it, or an override of it, may raise anything.
        except Exception as error:
            fail(f"--config: {error}", 2)

    app.run(lambda argv: guarded(lambda: command(argv)), flags_parser=parse)


def guarded(command: Callable[[], None]) -> None:
    """Runs `command`; errors that are not ours become a line and an exit status."""
    try:
        command()
    except InputError as error:
        fail(str(error), 2)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        fail(f"{error}; nothing that was recorded is lost, the same command goes on", 1)


def fail(message: str, status: int) -> NoReturn:
    """Prints `error: message` and exits."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
