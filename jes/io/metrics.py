"""One JSON object a row, and the same numbers for TensorBoard."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorboardX


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file, none if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a kill can cut the last line short
            continue
    return rows


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a JSONL file with the complete rows that are to be kept."""
    if path.exists():
        part = path.with_suffix(".part")
        kept = [row for row in read_rows(path) if keep(row)]
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


class Writer:
    """Appends rows to a JSONL file and their numbers to TensorBoard."""

    def __init__(self, workdir: Path, start: int) -> None:
        """Opens the files; events of steps from `start` on are superseded."""
        self.workdir = workdir
        self.board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start
        )

    def write(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Appends `row` to `<name>.jsonl`; non-finite numbers are written as null."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in row.items()
        }
        with (self.workdir / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(clean) + "\n")
        task = f"{row['task']}/" if "task" in row else ""
        for key, value in row.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{name}/{task}{key}", value, step)

    def close(self) -> None:
        """Flushes the events."""
        self.board.close()
