"""Scores a model folder, or the weights that a run has reached, on tasks.

    python -m jes.evaluate --model=tiny --tasks=tiny/add,tiny/min
    python -m jes.evaluate --model=runs/tiny --tasks=tiny/min --examples=200

Accuracy is by lenient extraction; strict is right in exactly the format asked for.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from jes.config import CHOICES, DTYPES
from jes.errors import InputError
from jes.experiment import make_evaluation
from jes.export import load_base, read_ledger, replayed
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.metrics import write_json
from jes.models.weights import Pretrained, load
from jes.questions import prepare
from jes.rollout import examine
from jes.run_folder import recorded, score_row
from jes.scoring import Score
from jes.tasks import TASKS, load_task


def load_model(path: str) -> tuple[Pretrained, str]:
    """A model folder, hub id or 'tiny'; or the newest weights of a run folder.

    What the ledger has after the newest checkpoint is replayed. The run may be going on
    meanwhile.

    Returns:
      The model, and the dtype it is to answer in: float32, or that of the run.
    """
    folder = Path(path)
    if (folder / "ledger.jsonl").is_file():
        ledger = read_ledger(folder)
        count = len(ledger.fitness)
        reached = replayed(ledger, load_base(ledger), count, folder / "checkpoints")
        console.print(f"{path} after {count} generations")
        return reached, ledger.header["dtype"]
    if not (folder / "metrics.jsonl").is_file():
        return load(path), "float32"
    # A run of a baseline has no ledger, but in the end a model.
    record = recorded(folder)
    if record is None or not (folder / "model").is_dir():
        raise InputError(f"{path} is a run without a ledger that is not finished")
    return load(folder / "model"), record["config"]["dtype"]


def evaluate(
    pretrained: Pretrained,
    tasks: list[str],
    *,
    data: dict[str, Any] | None = None,
    batch_size: int = 256,
    **settings: Any,
) -> dict[str, Score]:
    """Scores greedy answers on held-out examples of some tasks: floats.

    Args:
      pretrained: the model.
      tasks: names in `jes.tasks.TASKS`.
      data: `root`, `seed` and `test` (held-out examples of each task; 0 for all) of
        `jes.tasks.load_task`.
      batch_size: prompts answered at once.
      settings: `mode` and `dtype`, see `jes.questions.Evaluation`.
    """
    scores = {}
    for name in tasks:
        task = load_task(name, **(data or {}))
        evaluation = make_evaluation(pretrained, task, **settings)
        questions = prepare(evaluation, evaluation.task.test)
        scores[name] = examine(
            evaluation, pretrained.params, questions, batch_size=batch_size
        )
    return scores


def table(scores: dict[str, Score]) -> Table:
    """Percentages of the examples, a row a task."""
    shown = Table("task", "accuracy %", "strict %", "formatted %", "truncated %")
    for name, score in scores.items():
        shares = (score.accuracy, score.strict, score.formatted, score.truncated)
        shown.add_row(name, *(f"{100 * share:.1f}" for share in shares))
    return shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny", help="folder, hub id, 'tiny', or run"
    )
    parser.add_argument("--tasks", help="comma-separated; one of: " + ", ".join(TASKS))
    parser.add_argument("--examples", type=at_least(0), default=0, help="of each task")
    parser.add_argument("--root", default="", help="folder of parquet files")
    parser.add_argument("--mode", default="generate", choices=CHOICES["mode"])
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default a run's, or float32"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=256)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of drawn examples")
    parser.add_argument("--out", type=Path, help="JSON file to write too")
    args = parser.parse_args()

    def command() -> None:
        if args.out:  # fails before the work, not after it
            args.out.parent.mkdir(parents=True, exist_ok=True)
        tiny = [name for name in TASKS if name.startswith("tiny/")]
        pretrained, dtype = load_model(args.model)
        scores = evaluate(
            pretrained,
            args.tasks.split(",") if args.tasks else tiny,
            data={"root": args.root, "seed": args.seed, "test": args.examples},
            batch_size=args.batch_size,
            mode=args.mode,
            dtype=args.dtype or dtype,
        )
        console.print(table(scores))
        if args.out:
            write_json(args.out, {n: score_row(s) for n, s in scores.items()})

    guarded(command)


if __name__ == "__main__":
    main()
