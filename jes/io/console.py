"""The progress bar of a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)


class Bar:
    """Generations done, the last one's figures, and the time left.

    Where the output is not a terminal, a line every so often instead.
    """

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self.progress = progress
        self.total = total
        self.every = max(1, total // 10)
        self.task = progress.add_task("", total=total, completed=done, figures="")

    def update(self, done: int, row: Mapping[str, Any]) -> None:
        """Shows the figures of a row of `metrics.jsonl`."""
        if "fitness_mean" in row:
            learned = (
                f"reward {row['fitness_mean']:.3f} best {row['fitness_max']:.3f} "
                f"spread {row['fitness_std']:.3f}"
            )
        else:  # learned from labels, not from rewards
            learned = f"loss {row['loss']:.3f} right {100 * row['accuracy']:.1f} %"
        figures = f"{learned} {row['tokens_per_second']:,.0f} tok/s"
        self.progress.update(self.task, completed=done, figures=figures)
        if not console.is_terminal and (done % self.every == 0 or done == self.total):
            console.print(f"generation {done}/{self.total} {figures}")


@contextmanager
def bar(done: int, total: int) -> Iterator[Bar]:
    """A bar over `total` generations of which `done` are behind us."""
    columns = (
        TextColumn("generation"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        yield Bar(shown, done, total)
