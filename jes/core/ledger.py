"""The ledger: a run as a file of kilobytes, replayable from the base model.

One JSON object a line. The first is the header (what a replay needs to know), then
one row a generation, `{"generation": g, "fitness": [...]}`, and wherever a run ended,
`{"generation": g, "fingerprint": "..."}`: the hash of the weights after g generations.
Fitness is float32, written with the fewest digits that read back to the same bits;
a fitness that is not finite is null.

A row is appended and flushed before the run goes on, so a kill can leave at worst one
incomplete last line, which `read` leaves out and `repair` cuts off.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = "jes-ledger-1"


class Ledger(NamedTuple):
    """What a ledger file says.

    Attributes:
      path: the file.
      header: settings of the run.
      fitness: one float32 array [N] a generation, in order.
      fingerprints: number of generations -> fingerprint of the weights after them.
      size: bytes of the file up to the end of the last complete row.
    """

    path: Path
    header: dict[str, Any]
    fitness: list[np.ndarray]
    fingerprints: dict[int, str]
    size: int


def create(path: Path, header: Mapping[str, Any]) -> None:
    """Starts a ledger; the file appears whole or not at all."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)  # a kill can leave one
    append_row(part, {"format": FORMAT, **header})
    part.replace(path)


def append_generation(path: Path, generation: int, fitness: np.ndarray) -> None:
    """Commits a generation: it has happened once this returns."""
    # The fewest digits of float32 that read back to the same bits.
    numbers = np.asarray(fitness, np.float32)
    values = [float(str(f)) if np.isfinite(f) else None for f in numbers]
    append_row(path, {"generation": generation, "fitness": values})


def append_fingerprint(path: Path, generations: int, fingerprint: str) -> None:
    """Notes the hash of the weights after this many generations."""
    append_row(path, {"generation": generations, "fingerprint": fingerprint})


def read(path: Path) -> Ledger:
    """Reads a ledger, leaving out an incomplete last line.

    Raises:
      FileNotFoundError, ValueError: where there is no ledger, or only a damaged one.
    """
    rows, size = _complete_rows(path)
    if not rows or rows[0].get("format") != FORMAT:
        raise ValueError(f"{path} is not a ledger of this version ({FORMAT})")
    ledger = Ledger(path, rows[0], [], {}, size)
    for number, row in enumerate(rows[1:], 2):
        try:
            _add_row(ledger, row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error})") from None
    return ledger


def repair(path: Path) -> Ledger:
    """Reads a ledger and cuts an incomplete last line off the file."""
    ledger = read(path)
    if path.stat().st_size > ledger.size:
        os.truncate(path, ledger.size)
    return ledger


def _complete_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file, and the bytes up to the end of the last complete one."""
    rows, size = [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (line.endswith(b"\n") and isinstance(row, dict)):
                raise ValueError("it is cut short")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is damaged ({error})") from None
        rows.append(row)
        size += len(line)
    return rows, size


def _add_row(ledger: Ledger, row: Mapping[str, Any]) -> None:
    if "fingerprint" in row:
        ledger.fingerprints[row["generation"]] = row["fingerprint"]
        return
    due = len(ledger.fitness)
    if row["generation"] != due:
        raise ValueError(f"generation {row['generation']} where {due} is due")
    values = [math.nan if f is None else f for f in row["fitness"]]
    if ledger.fitness and len(values) != len(ledger.fitness[0]):
        raise ValueError(f"{len(values)} members, {len(ledger.fitness[0])} before")
    ledger.fitness.append(np.array(values, np.float32))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a line to a JSONL file; it is on disk when this returns."""
    line = json.dumps(row, allow_nan=False) + "\n"
    try:
        with path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # that of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
