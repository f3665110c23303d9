"""Measures whether one model knows what it knows (2602.02605): a table and a figure.

    python -m jes.studies.knowing --model=runs/esma_triviaqa_tiny --out=FOLDER
    python -m jes.studies.knowing --model=tiny --tasks=tiny/knows,tiny/knows_chat
    python -m jes.studies.knowing --model=FOLDER --tasks=trivia_qa --root=DATA

The model answers every question, and in a separate context whether it knows the answer.
d' and c are log-linear; in brackets a 95 % interval over questions. The column
`threshold` ignores the generated yes or no: it says yes where log p(yes) - log p(no) is
above the value that agrees best with the model's own correctness on training questions.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from scipy.special import expit

from jes.config import DTYPES
from jes.core.members import unperturbed
from jes.core.noise import PyTree
from jes.core.tree import with_dtype
from jes.errors import InputError
from jes.evaluate import load_model
from jes.experiment import make_evaluation
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.metrics import write_json
from jes.metacognition import auroc2, best_threshold, bootstrap, counts, d_prime, report
from jes.models.weights import Pretrained
from jes.questions import Evaluation, Question, prepare
from jes.sampling.generate import generate
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.prompts import encode_continuation
from jes.scoring import rewards_of
from jes.studies.grid import tidy, write_csv
from jes.tasks import load_task
from jes.tasks.task import Example, Task

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
"""Metric -> its name in the table."""
BINS = 10
"""Of the calibration, with equally many questions each."""


class Answers(NamedTuple):
    """Greedy answers to Q questions, from which every metric can be computed.

    Attributes:
      examples: the questions.
      texts, metas: the answers, and the answers to 'do you know' ('' where the task
        does not ask it in a separate context).
      correct, strict: bool [Q], by the task's lenient and strict match.
      yes: bool [Q], whether the model says that it knows.
      other: bool [Q], whether it says neither clearly yes nor clearly no; a late yes
        counts as yes all the same.
      confidence: float64 [Q], log p(yes) - log p(no) in nats as the first words of the
        answer to 'do you know'; NaN where the task has no such words.
    """

    examples: Sequence[Example]
    texts: list[str]
    metas: list[str]
    correct: np.ndarray
    strict: np.ndarray
    yes: np.ndarray
    other: np.ndarray
    confidence: np.ndarray

    def report(self) -> dict[str, float]:
        """The metrics of `jes.metacognition.report`, and strict accuracy."""
        metrics = report(self.correct, self.yes, self.other, self.confidence)
        return {**metrics, "strict": float(self.strict.mean())}

    def d_prime_interval(self) -> tuple[float, float]:
        """A 95 % interval of the log-linear d', over questions."""
        return bootstrap(
            lambda correct, yes: d_prime(counts(correct, yes)), self.correct, self.yes
        )

    @property
    def graded(self) -> bool:
        """Whether there is a confidence."""
        return bool(np.isfinite(self.confidence).all())

    def report_with_intervals(self) -> dict[str, Any]:
        """The metrics, and intervals (low, high) of d' and AUROC2."""
        found: dict[str, Any] = self.report()
        found["d_prime_interval"] = self.d_prime_interval()
        if self.graded:
            found["auroc2_interval"] = bootstrap(auroc2, self.confidence, self.correct)
        return found


def collect(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
) -> Answers:
    """Asks the questions of a task, so many at once, and whether the model knows.

    Raises:
      InputError: if the task does not ask whether the model knows.
    """
    asks = 1 if evaluation.task.meta is None else 2
    prompts = [q.prompt for q in questions]
    prompts += [list(q.meta) for q in questions if asks == 2]
    weights = with_dtype(params, jnp.dtype(evaluation.dtype))
    said = generate(
        evaluation.model,
        weights,
        prompts,
        evaluation.max_new_tokens,
        eos_ids=evaluation.eos_ids,
        batch_size=batch_size,
        buckets=evaluation.buckets,
    )
    count = len(questions)
    texts = [map(tuple, said[k * count :][:count]) for k in range(asks)]
    asked = list(enumerate(zip(*texts, strict=True)))
    earned = rewards_of(evaluation, questions, asked)
    if np.isnan(earned[:, 4]).any():
        name = evaluation.task.name
        raise InputError(f"task {name} does not ask whether the model knows")
    words = evaluation.tokenizer.backend_tokenizer.decode_batch(said)
    return Answers(
        examples=[q.example for q in questions],
        texts=words[:count],
        metas=words[count:] or [""] * count,
        correct=earned[:, 1] == 1,
        strict=earned[:, 2] == 1,
        yes=earned[:, 4] == 1,
        other=earned[:, 3] == 0,
        confidence=confidence(evaluation, weights, questions, batch_size),
    )


def confidence(
    evaluation: Evaluation, params: PyTree, questions: Sequence[Question], size: int
) -> np.ndarray:
    """log p(yes) - log p(no) after 'do you know', float64 [Q].

    Where both words are single tokens this is the difference of their logits; its
    sigmoid is the confidence of 2602.02605. Other spellings are not counted.
    """
    words = evaluation.task.claims
    if words is None:
        return np.full(len(questions), np.nan)
    claims = [encode_continuation(evaluation.tokenizer, word) for word in words]
    # Sorted by length, so that few shapes are compiled.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].meta))
    size = min(size, len(questions))
    differences = np.zeros(len(questions))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        metas = [list(questions[i].meta) for i in chosen]
        metas += metas[-1:] * (size - len(metas))
        sizes = evaluation.buckets, evaluation.parts
        batch = pack_choices(metas, [claims] * size, *sizes)
        (logs,) = log_likelihoods(evaluation.model, unperturbed(params), batch)
        yes, no = np.asarray(logs, float).T
        differences[chosen] = (yes - no)[: len(chosen)]
    return differences


def measure(
    pretrained: Pretrained,
    task: Task,
    *,
    dtype: Any = "float32",
    batch_size: int = 256,
) -> tuple[Answers, dict[str, dict[str, Any]]]:
    """Answers to a task's held-out questions, and their metrics.

    Args:
      pretrained: the model.
      task: the threshold is fitted on as many training questions as are held out.
      dtype: of the weights that answer.
      batch_size: prompts answered at once.

    Returns:
      The answers, and metrics by way to say yes: 'answers', as generated, and, where
      the task has training questions and words for yes and no, 'threshold'.
    """
    if not task.test:
        raise InputError(f"task {task.name} has no examples to evaluate on")
    evaluation = make_evaluation(pretrained, task, dtype=dtype)

    def answers_to(rows: Sequence[Example]) -> Answers:
        questions = prepare(evaluation, rows)
        return collect(evaluation, pretrained.params, questions, batch_size=batch_size)

    answers = answers_to(task.test)
    measured = {"answers": answers.report_with_intervals()}
    train = task.train[: len(task.test)]
    if train and answers.graded:
        fitted = answers_to(train)
        threshold = best_threshold(fitted.confidence, fitted.correct)
        by_threshold = answers._replace(
            yes=answers.confidence > threshold, other=np.zeros_like(answers.other)
        )
        metrics = by_threshold.report_with_intervals()
        measured["threshold"] = metrics | {"threshold": threshold}
    return answers, measured


def metrics_table(name: str, ways: Mapping[str, Mapping[str, Any]]) -> Table:
    """The metrics of a task, a column for each way to say yes."""

    def cell(metrics: Mapping[str, Any], metric: str) -> str:
        value = metrics[metric]
        if np.isnan(value):
            return ""
        if SHOWN[metric].endswith("%"):
            return f"{100 * value:.1f}"
        low, high = metrics.get(f"{metric}_interval", (np.nan, np.nan))
        return f"{value:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")

    shown = Table(name, *(f"by {way}" for way in ways))
    for metric, title in SHOWN.items():
        shown.add_row(title, *(cell(metrics, metric) for metrics in ways.values()))
    return shown


def figure(answers: Mapping[str, Answers]) -> Figure:
    """For each task the ROC of the confidence, and the calibration."""
    made = Figure(figsize=(9, 3.6 * len(answers)), layout="constrained")
    grid = made.subplots(len(answers), 2, squeeze=False)
    for (name, each), (left, right) in zip(answers.items(), grid, strict=True):
        draw_roc(left, each, f"{name}: telling right from wrong answers")
        draw_calibration(right, each)
    return made


def draw_roc(axes: Axes, answers: Answers, title: str) -> None:
    """Yes when right against yes when wrong: as generated, and over all thresholds."""
    right = answers.correct
    axes.plot([0, 1], [0, 1], ":", color="gray")
    if 0 < right.mean() < 1:
        if answers.graded:
            order = np.argsort(-answers.confidence, kind="stable")
            last = np.append(np.diff(answers.confidence[order]) != 0, True)
            hits = np.cumsum(right[order])[last] / right.sum()
            alarms = np.cumsum(~right[order])[last] / (~right).sum()
            area = auroc2(answers.confidence, right)
            label = f"by log p(yes) - log p(no), area {area:.2f}"
            axes.plot(np.append(0, alarms), np.append(0, hits), label=label)
        point = answers.yes[~right].mean(), answers.yes[right].mean()
        axes.plot(*point, "o", label="as answered")
    tidy(axes, title, "yes, of the wrong", "yes, of the right", loc="lower right")


def draw_calibration(axes: Axes, answers: Answers) -> None:
    """Share of right answers against the confidence, in bins of as many questions."""
    axes.plot([0, 1], [0, 1], ":", color="gray")
    tidy(axes, "calibration", "confidence, p(yes) / (p(yes) + p(no))", "share right")
    if answers.graded:
        order = np.argsort(answers.confidence, kind="stable")
        for chosen in np.array_split(order, min(BINS, len(order))):
            share = answers.correct[chosen].mean()
            error = np.sqrt(share * (1 - share) / len(chosen))
            at = expit(answers.confidence[chosen]).mean()
            axes.errorbar(at, share, error, fmt="o", color="C0", capsize=2)


def write_results(
    out: Path, answers: Mapping[str, Answers], measured: Mapping[str, Any]
) -> None:
    """Writes metrics.json, a CSV file of answers for each task, and answers.png."""
    write_json(out / "metrics.json", measured)
    for name, each in answers.items():
        names = ["number", "example", *Answers._fields[1:]]
        examples = [json.dumps(one, ensure_ascii=False) for one in each.examples]
        rows = zip(range(len(examples)), examples, *each[1:], strict=True)
        table = [dict(zip(names, row, strict=True)) for row in rows]
        write_csv(out / f"{name.replace('/', '_')}.csv", table)
    figure(answers).savefig(out / "answers.png", dpi=120)
    console.print(f"metrics, answers and figure in {out}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny", help="folder, hub id, 'tiny', or run")
    add("--tasks", default="tiny/knows", help="comma-separated")
    add("--examples", type=at_least(0), default=0, help="of each task; 0: all")
    add("--root", default="", help="folder of parquet files")
    add("--dtype", choices=DTYPES, help="of the weights; default the run's or float32")
    add("--batch-size", type=at_least(1), default=256)
    add("--seed", type=at_least(0), default=0, help="of drawn examples")
    add("--out", type=Path, help="folder for table, answers, figure")
    args = parser.parse_args()

    def command() -> None:
        size = {"root": args.root, "seed": args.seed, "test_examples": args.examples}
        tasks = {name: load_task(name, **size) for name in args.tasks.split(",")}
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        pretrained, dtype = load_model(args.model)
        options = {"dtype": args.dtype or dtype, "batch_size": args.batch_size}
        answers: dict[str, Answers] = {}
        measured: dict[str, Any] = {}
        for name, task in tasks.items():
            answers[name], measured[name] = measure(pretrained, task, **options)
        for name, ways in measured.items():
            console.print(metrics_table(name, ways))
        if args.out:
            write_results(args.out, answers, measured)

    guarded(command)


if __name__ == "__main__":
    main()
