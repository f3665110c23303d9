"""What a program prints: the console, and the progress of a run."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET = 60.0
"""Seconds without a line, where the output is not a terminal."""

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Shows on a terminal what is done, and for how long, until it is."""
    if not console.is_terminal:
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


class Bar(Progress):
    """Generations done, of which `done` at first, the last one's figures, time left.

    Where the output is not a terminal, a line every tenth of the run instead, and at
    most every `QUIET` seconds one of what goes on.
    """

    def __init__(self, done: int, total: int, *, shown: bool = True) -> None:
        super().__init__(
            TextColumn("generation"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("[dim]{task.fields[doing]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self.total = total
        self.every = max(1, total // 10) if shown and not console.is_terminal else 0
        self.number = self.add_task(
            "", total=total, completed=done, figures="", doing=""
        )
        self.said, self.done = time.monotonic(), done

    def now(self, doing: str) -> None:
        """Shows what is done now; '' for more of the same."""
        if doing:
            self.update(self.number, doing=doing)
        if doing and self.every and time.monotonic() - self.said > QUIET:
            self.said = time.monotonic()
            console.print(f"generation {self.done + 1}/{self.total} {doing}")

    def show(self, done: int, row: Mapping[str, Any]) -> None:
        """Shows the figures of a row of `metrics.jsonl`."""
        if "fitness_mean" in row:
            learned = (
                f"reward {row['fitness_mean']:.3f} best {row['fitness_max']:.3f} "
                f"spread {row['fitness_std']:.3f}"
            )
        else:  # trained on labels, not on rewards
            learned = f"loss {row['loss']:.3f} right {100 * row['accuracy']:.1f} %"
        text = row["tokens"] + row.get("prompt_tokens", 0)  # read and written
        figures = f"{learned} {text / row['seconds']:,.0f} tok/s"
        self.update(self.number, completed=done, figures=figures)
        self.done = done
        if self.every and (done % self.every == 0 or done == self.total):
            self.said = time.monotonic()
            console.print(f"generation {done}/{self.total} {figures}")
