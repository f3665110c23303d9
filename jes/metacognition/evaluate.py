"""Measures whether a model knows what it knows (2602.02605): a table and a figure.

    python -m jes.metacognition.evaluate --model=runs/esma_triviaqa_tiny --out=FOLDER
    python -m jes.metacognition.evaluate --model=tiny --tasks=tiny/knows,tiny/knows_chat
    python -m jes.metacognition.evaluate --model=FOLDER --tasks=trivia_qa --root=DATA

Every question is asked, and in a context of its own whether the model knows the
answer. d' and c are log-linear; in brackets a 95 % interval over questions. The rows
`threshold` do not read the answer to the second question: they say yes where the
difference of log p(yes) and log p(no) is above the value that agrees best with the
model's own correctness on training questions.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jes.config import DTYPES
from jes.errors import InputError
from jes.evaluate import load_model, make_evaluation
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.metrics import write_json
from jes.metacognition.answers import Answers, collect, write
from jes.metacognition.figures import answers_figure
from jes.metacognition.signal_detection import (
    auroc2,
    best_threshold,
    bootstrap,
)
from jes.models.weights import Pretrained
from jes.questions import prepare
from jes.tasks import TASKS, load_task
from jes.tasks.task import Example

SHOWN = {
    "accuracy": "accuracy %",
    "strict": "accuracy by strict match %",
    "yes_rate": "says yes %",
    "other_rate": "says neither yes nor no %",
    "alignment": "alignment, yes = right %",
    "yes_failure_rate": "wrong, of yes %",
    "no_failure_rate": "right, of no %",
    "d_prime": "d'",
    "d_prime_clip": "d', rates cut at 1e-4 as in the paper",
    "d_prime_without_other": "d' where it says yes or no",
    "criterion": "criterion c",
    "auroc2": "AUROC2",
    "rmi": "relative meta-information",
}
"""Metrics and how the table calls them."""


def measure(
    pretrained: Pretrained,
    name: str,
    *,
    examples: int = 0,
    root: str = "",
    dtype: Any = "float32",
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Answers, dict[str, dict[str, Any]]]:
    """One task's held-out questions, and the threshold fitted on its training ones.

    Args:
      pretrained: the model.
      name: of a task in `jes.tasks.TASKS`.
      examples: how many held-out questions, 0 for all. The threshold is fitted on as
        many training questions.
      root, seed: see `jes.tasks.load_task`.
      dtype: of the weights that answer.
      batch_size: prompts answered at once.

    Returns:
      The answers, and metrics of two ways to say yes: 'answers', as generated, and,
      where the task has training questions and words for yes and no, 'threshold'.
    """
    task = load_task(name, root=root, seed=seed, test=examples)
    evaluation = make_evaluation(pretrained, task, dtype=dtype)

    def ask_about(rows: Sequence[Example]) -> Answers:
        questions = prepare(evaluation, rows)
        return collect(evaluation, pretrained.params, questions, batch_size=batch_size)

    if not task.test:
        raise InputError(f"task {name} has no examples to evaluate on")
    answers = ask_about(task.test)
    measured = {"answers": with_intervals(answers)}
    train = task.train[: len(task.test)]
    if train and task.claims is not None and np.isfinite(answers.confidence).all():
        fitted = ask_about(train)
        threshold = best_threshold(fitted.confidence, fitted.correct)
        measured["threshold"] = {
            **with_intervals(by_threshold(answers, threshold)),
            "threshold": threshold,
        }
    return answers, measured


def by_threshold(answers: Answers, threshold: float) -> Answers:
    """The same answers, with yes where the confidence is above a threshold."""
    return answers._replace(
        yes=answers.confidence > threshold, other=np.zeros_like(answers.other)
    )


def with_intervals(answers: Answers) -> dict[str, Any]:
    """The metrics of `Answers.report`, and intervals (low, high) of d' and AUROC2."""
    metrics: dict[str, Any] = dict(answers.report())
    metrics["d_prime_interval"] = answers.d_prime_interval()
    if np.isfinite(answers.confidence).all():
        confident = answers.confidence, answers.correct
        metrics["auroc2_interval"] = bootstrap(auroc2, *confident)
    return metrics


def table(name: str, ways: Mapping[str, Mapping[str, Any]]) -> Table:
    """The metrics of a task, a column for each way to say yes."""
    shown = Table(name, *(f"by {way}" for way in ways))
    for metric, title in SHOWN.items():
        cells = [cell(title, metrics, metric) for metrics in ways.values()]
        shown.add_row(title, *cells)
    return shown


def cell(title: str, metrics: Mapping[str, Any], metric: str) -> str:
    """A number with its interval, if it has one; empty where it is undefined."""
    value = metrics[metric]
    if np.isnan(value):
        return ""
    if title.endswith("%"):
        return f"{100 * value:.1f}"
    low, high = metrics.get(f"{metric}_interval", (np.nan, np.nan))
    return f"{value:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny", help="folder, hub id, 'tiny', or run"
    )
    parser.add_argument("--tasks", default="tiny/knows", help="comma-separated")
    parser.add_argument("--examples", type=at_least(0), default=0, help="of each task")
    parser.add_argument("--root", default="", help="folder of parquet files")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default a run's, or float32"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=256)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of drawn examples")
    parser.add_argument("--out", type=Path, help="folder for table, answers, figure")
    args = parser.parse_args()

    def command() -> None:
        names = args.tasks.split(",")
        for name in names:  # found out before the model is loaded
            if name not in TASKS:
                raise InputError(f"there is no task {name!r}")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        pretrained, dtype = load_model(args.model)
        answers, measured = {}, {}
        for name in names:
            answers[name], measured[name] = measure(
                pretrained,
                name,
                examples=args.examples,
                root=args.root,
                dtype=args.dtype or dtype,
                batch_size=args.batch_size,
                seed=args.seed,
            )
        for name, ways in measured.items():
            console.print(table(name, ways))
        if args.out:
            report(args.out, answers, measured)

    guarded(command)


def report(
    out: Path, answers: Mapping[str, Answers], measured: Mapping[str, Any]
) -> None:
    """Writes metrics.json, a CSV file of answers for each task, and answers.png."""
    write_json(out / "metrics.json", measured)
    for name, each in answers.items():
        write(out / f"{name.replace('/', '_')}.csv", each)
    answers_figure(answers).savefig(out / "answers.png", dpi=120)
    console.print(f"metrics, answers and figure in {out}")


if __name__ == "__main__":
    main()
