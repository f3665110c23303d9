"""One JSON object a row, and the same numbers for TensorBoard."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from jes.core.ledger import append_row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file, none if there is no file."""
    rows = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a kill can cut the last line short
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a JSONL file with the complete rows that are to be kept."""
    if path.exists():
        part = path.with_suffix(".part")
        kept = [row for row in read_rows(path) if keep(row)]
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
    """The value with None for numbers that JSON does not have, however nested."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Board:
    """TensorBoard events, written at once.

    `tensorboardX.SummaryWriter` writes from a thread, which a full disk ends; the
    program then waits for it for ever.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Starts a file of events; earlier files' steps from `start` are superseded."""
        folder.mkdir(exist_ok=True)
        # Two processes may start within a second, which is all their names tell.
        self.file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{start}")
        log = SessionLog(status=SessionLog.START)
        self._add(start, session_log=log)

    def write(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a row, as `<name>/[<task>/]<key>`."""
        task = f"{row['task']}/" if "task" in row else ""
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._add(step, summary=scalar(f"{name}/{task}{key}", value))
        self.file.flush()

    def _add(self, step: int, **what: Any) -> None:
        self.file.write_event(Event(step=step, wall_time=time.time(), **what))


class Writer:
    """Appends rows to JSONL files and their numbers to TensorBoard."""

    def __init__(self, workdir: Path, start: int) -> None:
        """Opens the files; events of steps from `start` on are superseded."""
        self.workdir = workdir
        self.board = Board(workdir / "tensorboard", start)
        # Superseded as events, but the evaluation at the start is not done again.
        for name in ("evaluations", "distances"):
            for row in read_rows(workdir / f"{name}.jsonl"):
                if row["generation"] >= start:
                    self.board.write(name, row["generation"], row)

    def write(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Appends `row` to `<name>.jsonl`; non-finite numbers are written as null."""
        append_row(self.workdir / f"{name}.jsonl", finite(row))
        self.board.write(name, step, row)

    def close(self) -> None:
        """Closes the events."""
        self.board.file.close()
