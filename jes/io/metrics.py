"""Files of JSON objects, and the same numbers for TensorBoard."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file; none if there is no file."""
    rows = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):  # a kill can cut the last line short
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a JSONL file with those of its complete rows that `keep` is true for."""
    if path.exists():
        part = path.with_suffix(".part")
        kept = filter(keep, read_rows(path))
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all.

    Raises:
      OSError: if it could not be written; the error names the file.
    """
    part = path.with_suffix(".part")
    try:
        with part.open("w") as file:
            text = json.dumps(finite(value), indent=2, allow_nan=False)
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks, however nested."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers_of(name: str, row: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a row, as `<name>/[<task>/]<key>`."""
    task = f"{row['task']}/" if "task" in row else ""
    return {
        f"{name}/{task}{key}": value
        for key, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


class Board:
    """TensorBoard events, written at once.

    `tensorboardX.SummaryWriter` writes from a thread. A full disk ends that thread, and
    the program then waits for it forever.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Starts an event file, which supersedes earlier files from step `start` on."""
        folder.mkdir(exist_ok=True)
        # The names hold a time in seconds: two processes may start within one.
        self.file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{start}")
        self._add(start, session_log=SessionLog(status=SessionLog.START))

    def write(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a row."""
        for key, value in numbers_of(name, row).items():
            self._add(step, summary=scalar(key, value))
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _add(self, step: int, **what: Any) -> None:
        self.file.write_event(Event(step=step, wall_time=time.time(), **what))
