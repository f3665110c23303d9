"""The rows of a run in wandb or trackio too, with its settings and its answers.

The two have the same functions. What they keep goes where their own settings say
(`WANDB_MODE=offline`, `TRACKIO_DIR`), in the project 'jes' unless `WANDB_PROJECT` or
`TRACKIO_PROJECT` names another.
"""

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jes.errors import InputError
from jes.io.metrics import numbers_of

TRACKERS = ("wandb", "trackio")


class Tracker:
    """A run of wandb or trackio; a run that goes on is the same one there."""

    def __init__(self, name: str, workdir: Path, settings: Mapping[str, Any]) -> None:
        """Begins it.

        Raises:
          InputError: if the package is not installed.
        """
        try:
            self.module: Any = importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"tracker={name!r} needs a package: pip install {name}"
            ) from error
        project = os.environ.get(f"{name.upper()}_PROJECT", "jes")
        folder = str(workdir.resolve())
        more: dict[str, Any] = {}
        if name == "wandb":
            number = hashlib.sha256(folder.encode()).hexdigest()[:16]
            more = {"id": number, "dir": folder}
        self.run = self.module.init(
            project=project,
            name=workdir.resolve().name,
            config=dict(settings),
            resume="allow",
            **more,
        )

    def write(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a row, by the names that TensorBoard has them under."""
        self.run.log(numbers_of(name, row), step=step)

    def answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows of `answers.jsonl` as a table."""
        columns = list(rows[0])
        data = [[row[name] for name in columns] for row in rows]
        table = self.module.Table(columns=columns, data=data)
        self.run.log({f"answers/{rows[0]['task']}": table}, step=step)

    def close(self) -> None:
        """Waits until everything is written."""
        self.run.finish()
