"""Command lines: what the user got wrong is one line, never a traceback of ours."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jes.errors import InputError
from jes.io.hosts import Gone
from jes.io.interrupts import Stopped


def start(command: Callable[[list[str]], None]) -> None:
    """Parses absl flags and runs `command` with what is left of the command line.

    There is to be a config flag, `--config`; errors of the config file are the user's.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            left = flags.FLAGS(argv)
            # A file that could not be read shows at the first look into the config.
            getattr(flags.FLAGS["config"].value, "keys")  # noqa: B009
            return left
        # A config file is Python: it, or an override of it, may raise anything.
        except Exception as error:
            fail(reason(error), 2)

    def go_on(argv: list[str]) -> None:
        # Below are reports of what JAX and others have found on the machine.
        logging.set_verbosity(logging.WARNING)
        guarded(lambda: command(argv), "the same command goes on from what was saved")

    app.run(go_on, flags_parser=parse)


def config_name() -> str:
    """Of `--config=configs/NAME.py:VARIANT`, NAME_VARIANT or NAME: of a run folder."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    file, _, variant = name.partition(":")
    return "_".join(filter(None, [Path(file).stem, variant]))


def reason(error: Exception) -> str:
    """One line that says what is wrong with the flags or the config file."""
    inner = error.args[0] if error.args else None
    if isinstance(error, AttributeError) and isinstance(inner, KeyError):
        # Of ml_collections: the name, and on a second line perhaps a suggestion.
        return "there is no setting " + "; ".join(str(inner.args[0]).splitlines())
    text = str(error).strip()
    if isinstance(error, flags.Error) and "Traceback" not in text:
        return text.replace("\n", " ")
    # The last line is what went wrong, those before it tell where.
    return f"--config: {text.splitlines()[-1].strip()}"


def guarded(command: Callable[[], None], after_os_error: str = "") -> None:
    """Runs `command`; errors that are not ours become a line and an exit status.

    Args:
      command: what to run.
      after_os_error: what the user is told after a full disk or the like.
    """
    try:
        command()
    except Gone as gone:
        print(f"error: {gone}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # without JAX's wait for the others at the exit
    except InputError as error:
        # A full disk is no mistake in the input.
        # Those without a number are of the network.
        if getattr(error.__cause__, "errno", None) is None:
            fail(str(error), 2)
        fail("; ".join(filter(None, [str(error), after_os_error])), 1)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        fail("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        fail("; ".join(filter(None, [str(error), after_os_error])), 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first_line = str(error).partition("\n")[0]
        fail(f"out of memory ({first_line}): a smaller `chunk` takes less", 1)


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse `type`: whole numbers from `lowest` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {lowest}, not {text!r}"
            )
        return number

    return parse


def fail(message: str, status: int) -> NoReturn:
    """Prints `error: message` and exits."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
