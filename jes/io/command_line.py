"""Command lines: a mistake of the user is reported in one line, without a traceback."""

import argparse
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jes.errors import InputError, Unavailable
from jes.io.hosts import PeerLost
from jes.io.interrupts import Stopped

DEFAULTS = Path(__file__).parents[1] / "config.py"
"""Is a config file too: that of the default settings."""


def start(command: Callable[[list[str]], None], settings: Sequence[type] = ()) -> None:
    """Parses absl flags, with a config flag `--config`, and runs `command`.

    Args:
      command: takes what is left of the command line.
      settings: dataclasses that `--help` lists.
    """

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-h", "--helpfull"} & set(argv):
            show_help(settings)
            sys.exit(0)
        try:
            left = flags.FLAGS([with_shipped(argument) for argument in joined(argv)])
            # A file that could not be read raises at the first use of the config.
            getattr(flags.FLAGS["config"].value, "keys")  # noqa: B009
            return left
        # A config file is Python: it, or an override of it, may raise anything.
        except Exception as error:
            fail(reason(error), 2)

    def go_on(argv: list[str]) -> None:
        # Lower levels report what JAX and others find on the machine.
        logging.set_verbosity(logging.WARNING)
        guarded(lambda: command(argv), "the same command goes on from what was saved")

    app.run(go_on, flags_parser=parse)


def show_help(settings: Sequence[Any]) -> None:
    """Prints what the program does, its flags, and every setting with its default."""
    print((sys.modules["__main__"].__doc__ or "").strip(), "\n\nFlags:\n")
    for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]):
        if "." not in flag.name:
            print(f"  --{flag.name}  {flag.help}")
    print("\nSettings, --config.NAME=VALUE (of groups --config.GROUP.NAME=VALUE):")
    for kind in settings:
        print(f"\n{kind.__name__}:")
        lines, _ = inspect.getsourcelines(kind)
        for line in lines[2:]:
            text = re.sub(r": [^#]*? = ", " = ", line.strip(), count=1)
            if line.startswith("    @"):  # what follows is computed
                break
            print(f"  {text.partition('  # noqa')[0]}".rstrip())


def config_flag() -> flags.FlagHolder:
    """The flag `--config`: a file, or the name of one that ships; else the defaults."""
    given = [argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:]]
    if "config" not in given:  # as a default, it would be read outside of `start`
        sys.argv.insert(1, f"--config={DEFAULTS}")
    help_text = "Settings: a file, or one of: " + ", ".join(sorted(shipped()))
    return config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)


def shipped() -> dict[str, Path]:
    """The config files that ship, by name: in the package, or beside it in a clone."""
    folders = DEFAULTS.parent / "configs", DEFAULTS.parents[1] / "configs"
    files = (file for folder in folders for file in folder.glob("[!_]*.py"))
    return {file.stem: file for file in files}


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config... value` as `--config...=value`."""
    found: list[str] = []
    for argument in argv:
        before = found[-1] if found else ""
        waits = re.fullmatch("--?config[^=]*", before)
        if waits and not argument.startswith("-"):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def with_shipped(argument: str) -> str:
    """`--config=NAME[:VARIANT]` with the path of a file that ships, where it is one.

    And `--config.sigma=auto` with the number that stands for it.

    Raises:
      InputError: if there is neither such a file nor such a name.
    """
    flag, _, value = argument.partition("=")
    if flag.lstrip("-") == "config.sigma" and value == "auto":
        return f"{flag}=0"
    name, colon, variant = value.partition(":")
    if flag not in ("--config", "-config") or not value or Path(name).is_file():
        return argument
    known = shipped()
    if name not in known:
        hint = ", ".join(sorted(known))
        raise InputError(
            f"--config: there is no file {name}; configs that ship: {hint}"
        )
    return f"{flag}={known[name]}{colon}{variant}"


def config_name() -> str:
    """NAME or NAME_VARIANT of `--config=configs/NAME.py:VARIANT`, for a run folder.

    '' where none is given.
    """
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    file, _, variant = name.partition(":")
    if Path(file) == DEFAULTS:
        return ""
    return "_".join(filter(None, [Path(file).stem, variant]))


def reason(error: Exception) -> str:
    """One line that says what is wrong with the flags or the config file."""
    inner = error.args[0] if error.args else None
    if isinstance(error, AttributeError) and isinstance(inner, KeyError):
        # From ml_collections: the name; perhaps 'Did you mean "X" instead of "Y"?'.
        text = "; ".join(str(inner.args[0]).splitlines())
        text = re.sub('; (Did you mean ".*") instead of ".*"', r". \1", text)
        return f"there is no setting {text}"
    text = str(error).strip()
    if isinstance(error, InputError):
        return text
    if isinstance(error, flags.Error) and "Traceback" not in text:
        return text.replace("\n", " ")
    # The last line says what went wrong, those before it where.
    text = text.splitlines()[-1].strip()
    if "get_config() takes 0 positional arguments" in text:
        text = "this file has no variants: nothing may follow its name"
    return f"--config: {text}"


def guarded(command: Callable[[], None], after_os_error: str = "") -> None:
    """Runs `command`; turns expected errors into one line and an exit status.

    Args:
      command: what to run.
      after_os_error: added to the message after a full disk or the like.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see jes/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
    except PeerLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # skips JAX's shutdown barrier
    except Unavailable as error:
        fail(str(error), 1)
    except (InputError, OSError) as error:
        # A full disk (an OSError with a number) is no mistake in the input.
        mistake = getattr(error.__cause__, "errno", None) is None
        if mistake and not isinstance(error, OSError):
            fail(str(error), 2)
        fail("; ".join(filter(None, [str(error), after_os_error])), 1)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        fail("interrupted", 128 + signal.SIGINT)
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
