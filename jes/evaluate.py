"""Scores a model folder, or the weights that a run has reached, on tasks.

    python -m jes.evaluate --model=tiny --tasks=tiny/add,tiny/min
    python -m jes.evaluate --model=runs/tiny --examples=200  # on the tasks of the run
    python -m jes.evaluate --model=tiny --tasks=mytask.py --data=rows.jsonl

Accuracy is by lenient extraction; strict is right in exactly the format asked for.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from jes.config import CHOICES, DTYPES, Settings
from jes.core.mesh import make_mesh, replicated
from jes.errors import InputError
from jes.experiment import make_evaluation, task_for
from jes.export import load_base, read_ledger, replayed
from jes.io.command_line import at_least, guarded
from jes.io.console import console, doing
from jes.io.metrics import write_json
from jes.models.weights import Pretrained, load
from jes.questions import prepare
from jes.rollout import examine
from jes.run_folder import recorded, score_row, settings_in
from jes.tasks import TASKS, Asking


def load_model(path: str) -> tuple[Pretrained, str]:
    """A model folder, hub id or 'tiny'; or the newest weights of a run folder.

    What the ledger has after the newest checkpoint is replayed. The run may be going on
    meanwhile.

    Returns:
      The model, and the dtype it is to answer in: float32, or that of the run.
    """
    folder = Path(path)
    if not is_run(path):
        return load(path), "float32"
    if (folder / "ledger.jsonl").is_file():
        ledger = read_ledger(folder)
        count = len(ledger.fitness)
        reached = replayed(ledger, load_base(ledger), count, folder / "checkpoints")
        console.print(f"{path} after {count} generations")
        return reached, ledger.header["dtype"]
    # A run of a baseline has no ledger, but in the end a model.
    record = recorded(folder)
    if record is None or not (folder / "model").is_dir():
        raise InputError(f"{path} is a run without a ledger that is not finished")
    return load(folder / "model"), record["config"]["dtype"]


def evaluate(
    pretrained: Pretrained,
    tasks: Iterable[str],
    *,
    data: Mapping[str, Any] | None = None,
    asking: Asking = Asking(),  # noqa: B008  frozen
    batch_size: int = 256,
    **settings: Any,
) -> dict[str, dict[str, float]]:
    """Scores of greedy answers on held-out examples of some tasks, as `score_row`.

    Args:
      pretrained: the model.
      tasks: names in `jes.tasks.TASKS`, or those of one's own.
      data: `seed` and the fields of `jes.tasks.Data`.
      asking: how a task of one's own asks.
      batch_size: prompts answered at once.
      settings: `mode` and `dtype`, see `jes.questions.Evaluation`.
    """
    # Every device of this process has the model, and answers a part.
    params, rows = replicated(pretrained.params, make_mesh()), {}
    for name in tasks:
        task = task_for(pretrained, name, asking, **(data or {}))
        evaluation = make_evaluation(pretrained, task, **settings)
        questions = prepare(evaluation, task.test)
        with doing(f"{name}: {len(questions)} examples"):
            score = examine(evaluation, params, questions, batch_size=batch_size)
        rows[name] = score_row(score, task.parts)
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Rewards, also by name, and percentages of the examples; a row a task."""
    shares = "accuracy", "strict", "formatted", "truncated"
    every = dict.fromkeys(name for row in rows.values() for name in row)
    parts = [name for name in every if name.startswith("reward/")]
    shown = Table("task", "reward", *(f"{name} %" for name in shares), *parts)
    for name, row in rows.items():
        cells = [f"{100 * row[one]:.1f}" if one in row else "-" for one in shares]
        cells += [f"{row[one]:.3f}" if one in row else "-" for one in parts]
        shown.add_row(name, f"{row['reward']:.3f}", *cells)
    return shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny", help="folder, hub id, 'tiny', or run")
    add(
        "--tasks", help="comma-separated; by default those of the run, or the tiny ones"
    )
    add("--examples", type=at_least(0), help="of each task; 0 for all")
    add("--root", help="folder of parquet files, for tasks on public data")
    add("--data", help="held-out rows of a task of your own: a file, or a hub id")
    add("--prompt", help="its prompt: a template over the columns, or a column")
    add("--system", help="its system message")
    add("--mode", choices=CHOICES["mode"])
    add("--dtype", choices=DTYPES, help="of the weights; default the run's or float32")
    add("--batch-size", type=at_least(1), default=256)
    add("--seed", type=at_least(0), help="of drawn examples")
    add("--out", type=Path, help="JSON file to write too")
    args = parser.parse_args()

    def command() -> None:
        if args.out:  # fails before the work, not after it
            args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = settings_of(args.model)
        for name in ("prompt", "system", "mode", "seed"):
            if getattr(args, name) is not None:
                settings = dataclasses.replace(settings, **{name: getattr(args, name)})
        data = dataclasses.asdict(settings.data)
        given = {"root": args.root, "test_examples": args.examples}
        given |= {"train": args.data, "test": args.data}
        data |= {name: value for name, value in given.items() if value is not None}
        names = args.tasks.split(",") if args.tasks else tasks_of(args.model, settings)
        pretrained, dtype = load_model(args.model)
        rows = evaluate(
            pretrained,
            names,
            data=data | {"seed": settings.seed},
            asking=settings.asking,
            batch_size=args.batch_size,
            mode=settings.mode,
            dtype=args.dtype or dtype,
        )
        console.print(table(rows))
        if args.out:
            write_json(args.out, rows)

    guarded(command)


def is_run(model: str) -> bool:
    """Whether it is a run folder: a model folder with a ledger has weights, too."""
    folder = Path(model)
    rows = any((folder / f"{name}.jsonl").is_file() for name in ("ledger", "metrics"))
    return rows and not any(folder.glob("*.safetensors"))


def settings_of(model: str) -> Settings:
    """The settings of a run folder; the defaults for a model."""
    record = recorded(Path(model)) if is_run(model) else None
    return Settings() if record is None else settings_in(record)


def tasks_of(model: str, settings: Settings) -> list[str]:
    """The tasks of a run folder; the tiny ones for a model."""
    if not is_run(model):
        return [name for name in TASKS if name.startswith("tiny/")]
    return [settings.task, *settings.eval_tasks]


if __name__ == "__main__":
    main()
