"""Scores a model folder, or the weights that a run has reached, on tasks.

    python -m jes.evaluate --model=tiny --tasks=tiny/add,tiny/min
    python -m jes.evaluate --model=runs/tiny --tasks=tiny/min --examples=200

Accuracy is by lenient extraction; strict is right in exactly the format asked for.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from jes.config import DTYPES
from jes.errors import InputError
from jes.export import decay_anchor, evolution_of, load_base, read_ledger
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.metrics import write_json
from jes.io.runs import recorded
from jes.models.weights import Pretrained, load
from jes.questions import MODES, Evaluation, prepare
from jes.record import without_unasked
from jes.rollout import examine
from jes.scoring import Score
from jes.tasks import TASKS, Task, load_task
from jes.train import resume


def load_model(path: str) -> tuple[Pretrained, str]:
    """A model folder, hub id or 'tiny'; or the newest weights of a run folder.

    A run's weights are its newest checkpoint and what the ledger has after that; the
    run may be going on meanwhile.

    Returns:
      The model, and the dtype it is to answer in: float32, or that of the run.
    """
    if not (Path(path) / "ledger.jsonl").is_file():
        if not (Path(path) / "metrics.jsonl").is_file():
            return load(path), "float32"
        # A run of the baseline has no ledger, but in the end a model.
        record = recorded(Path(path))
        if record is None or not (Path(path) / "model").is_dir():
            raise InputError(f"{path} is a run without a ledger that is not finished")
        return load(Path(path) / "model"), record["config"]["dtype"]
    ledger = read_ledger(Path(path))
    base = load_base(ledger)
    folder = Path(path) / "checkpoints"
    evolution = evolution_of(ledger)
    anchor = decay_anchor(evolution, base)
    state = resume(evolution, base.params, anchor, ledger, folder)
    console.print(f"{path} after {state.generation} generations")
    return dataclasses.replace(base, params=state.params), ledger.header["dtype"]


def evaluate(
    pretrained: Pretrained,
    tasks: list[str],
    *,
    examples: int = 0,
    root: str = "",
    mode: str = "generate",
    dtype: Any = "float32",
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Score]:
    """Greedy answers on held-out examples.

    Args:
      pretrained: the model.
      tasks: names in `jes.tasks.TASKS`.
      examples: how many held-out examples of each task; 0 for all.
      root, seed: see `jes.tasks.load_task`.
      mode, dtype: see `jes.questions.Evaluation`.
      batch_size: prompts answered at once.

    Returns:
      A `Score` of floats for each task.
    """
    scores = {}
    for name in tasks:
        task = load_task(name, root=root, seed=seed, test=examples)
        evaluation = make_evaluation(pretrained, task, mode=mode, dtype=dtype)
        questions = prepare(evaluation, evaluation.task.test)
        scores[name] = examine(
            evaluation, pretrained.params, questions, batch_size=batch_size
        )
    return scores


def make_evaluation(pretrained: Pretrained, task: Task, **settings: Any) -> Evaluation:
    """How a model is examined on a task.

    Args:
      pretrained: the model.
      task: see `jes.tasks.load_task`.
      settings: see `jes.questions.Evaluation`.

    Raises:
      InputError: if the model has no tokenizer.
    """
    if pretrained.tokenizer is None:
        raise InputError("the model folder has no tokenizer, which tasks need")
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        eos_ids=pretrained.eos_ids,
        **settings,
    )


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
    parser.add_argument("--mode", default="generate", choices=MODES)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default a run's, or float32"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=256)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of drawn examples")
    parser.add_argument("--out", type=Path, help="JSON file to write too")
    args = parser.parse_args()

    def command() -> None:
        if args.out:  # found out before the work, not after it
            args.out.parent.mkdir(parents=True, exist_ok=True)
        tiny = [name for name in TASKS if name.startswith("tiny/")]
        pretrained, dtype = load_model(args.model)
        scores = evaluate(
            pretrained,
            args.tasks.split(",") if args.tasks else tiny,
            examples=args.examples,
            root=args.root,
            mode=args.mode,
            dtype=args.dtype or dtype,
            batch_size=args.batch_size,
            seed=args.seed,
        )
        console.print(table(scores))
        if args.out:
            write_json(args.out, {n: without_unasked(s) for n, s in scores.items()})

    guarded(command)


if __name__ == "__main__":
    main()
