"""What a run leaves in its folder: evaluations, distances, the model, the summary."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_collections

from jes.core.anchor import distance
from jes.core.noise import PyTree
from jes.errors import InputError
from jes.experiment import ON_TRAIN, Experiment
from jes.io import runs
from jes.io.console import console
from jes.io.interrupts import StopRequest
from jes.io.metrics import Writer, keep_rows, read_rows, write_json
from jes.io.plots import training_curves
from jes.rollout import examine
from jes.sampling.kl import divergence
from jes.scoring import Score

KL_ROWS = 8
"""Answers whose logits, of base and tuned model, are held at once for the KL."""


@contextmanager
def writing(workdir: Path, done: int) -> Iterator[Writer]:
    """The metrics files, cut back to what happened before `done` generations."""
    # Its presence says that the run is complete: one that was is to go on here.
    (workdir / "summary.json").unlink(missing_ok=True)
    keep_rows(workdir / "metrics.jsonl", lambda row: row["generation"] < done)
    for name in ("evaluations", "distances"):
        keep_rows(workdir / f"{name}.jsonl", lambda row: row["generation"] <= done)
    writer = Writer(workdir, done)
    try:
        yield writer
    finally:
        writer.close()


def evaluate(
    experiment: Experiment,
    generation: int,
    params: PyTree,
    base: PyTree,
    writer: Writer,
    stop: StopRequest,
) -> None:
    """Scores the centre on held-out examples, and measures how far it is from the base.

    What a run before this one has done for this generation is not done again.

    Args:
      experiment: of the run.
      generation: how many generations led to `params`.
      params: the centre.
      base: the anchor; None if none is kept.
      writer: of the rows.
      stop: asked before every batch.
    """
    rows = read_rows(writer.workdir / "evaluations.jsonl")
    have = {row["task"] for row in rows if row["generation"] == generation}
    for name, (evaluation, questions) in experiment.evaluations.items():
        if name in have:
            continue
        score = examine(
            evaluation,
            params,
            questions,
            batch_size=experiment.settings.eval_batch,
            before_batch=stop.check,
        )
        row = {
            "generation": generation,
            "task": name,
            "examples": len(questions),
            **without_unasked(score),
        }
        writer.write("evaluations", generation, row)
        console.print(
            f"after {generation} generations: {name} "
            f"{100 * score.accuracy:.1f} % of {len(questions)} {kind_of(name)} examples"
        )
    rows = read_rows(writer.workdir / "distances.jsonl")
    if base is not None and generation not in {row["generation"] for row in rows}:
        row = distance_row(experiment, params, base, stop)
        writer.write("distances", generation, {"generation": generation, **row})


def kind_of(name: str) -> str:
    """Of which examples an evaluation is."""
    return "training" if name.endswith(ON_TRAIN) else "held-out"


def without_unasked(score: Score) -> dict[str, Any]:
    """A score as a row, without what the task does not ask for."""
    row = score._asdict()
    if math.isnan(score.hits) and not math.isnan(score.accuracy):
        del row["hits"], row["false_alarms"]
    return row


def distance_row(
    experiment: Experiment, params: PyTree, base: PyTree, stop: StopRequest
) -> dict[str, Any]:
    """One row of `distances.jsonl`: ‖θ - θ_0‖, where it lies, and KL(base || θ)."""
    far = distance(params, base)
    row: dict[str, Any] = {
        "norm": far.norm,
        "relative": far.relative,
        "moved": far.moved,
        "largest": far.largest,
        **{f"norm/{kind}": norm for kind, norm in far.norms.items()},
        **{f"moved/{kind}": share for kind, share in far.moved_shares.items()},
    }
    for name, answers in experiment.base_answers.items():
        stop.check()
        evaluation, _ = experiment.evaluations[name]
        kl = divergence(
            experiment.pretrained.model,
            base,
            params,
            answers,
            batch_size=min(experiment.settings.eval_batch, KL_ROWS),
            buckets=experiment.settings.buckets,
            dtype=evaluation.dtype,
        )
        row |= {f"kl/{name}/{key}": value for key, value in kl._asdict().items()}
    return row


def finish(
    experiment: Experiment, generations: int, params: PyTree, workdir: Path
) -> dict[str, Any]:
    """Saves the model and the curves, and writes the summary last."""
    trained = dataclasses.replace(experiment.pretrained, params=params)
    # In the precision that the members answered in, so that it answers as evaluated.
    trained.save(workdir / "model", dtype=experiment.settings.dtype)
    rows = read_rows(workdir / "evaluations.jsonl")
    evaluations = {}
    for name in experiment.evaluations:
        of_task = {row["generation"]: row for row in rows if row["task"] == name}
        evaluations[name] = {
            "before": of_task[0]["accuracy"],
            "after": of_task[generations]["accuracy"],
            "lowest": min(row["accuracy"] or 0 for row in of_task.values()),
            "examples": of_task[0]["examples"],
        }
    training_curves(workdir)
    metrics = read_rows(workdir / "metrics.jsonl")
    distances = read_rows(workdir / "distances.jsonl")
    summary = {
        "evaluations": evaluations,
        "generations": generations,
        "answers": experiment.answers_a_generation * generations,
        "seconds": sum(row["seconds"] for row in metrics),
        "tokens": sum(row["tokens"] for row in metrics),
        "displacement_norm": metrics[-1]["displacement_norm"] if metrics else None,
        "displacement_norm_drift": (
            metrics[-1]["displacement_norm_drift"] if metrics else None
        ),
        "distance": distances[-1] if distances else None,
    }
    write_json(workdir / "summary.json", summary)
    report(workdir, summary)
    return summary


def finished(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None for any other.

    Raises:
      InputError: if the folder is another run's, or a longer one's.
    """
    path = workdir / "summary.json"
    if runs.check(workdir, config.to_dict()) is None or not path.is_file():
        return None
    summary = json.loads(path.read_text())
    check_length(workdir, summary["generations"], config.generations)
    return summary if summary["generations"] == config.generations else None


def check_length(workdir: Path, done: int, generations: int) -> None:
    """Raises InputError where a run has gone further than it is to go."""
    if done > generations:
        earlier = (
            f"; an earlier state is rebuilt by: python -m jes.export --run={workdir} "
            f"--out=FOLDER --generations={generations}"
        )
        raise InputError(
            f"{workdir} has gone {done} generations, more than {generations}"
            + (earlier if (workdir / "ledger.jsonl").exists() else "")
        )


def report(workdir: Path, summary: dict[str, Any]) -> None:
    """Prints what changed and where everything is."""

    def percent(share: float | None) -> str:
        return "not finite" if share is None else f"{100 * share:.1f} %"

    for name, accuracy in summary["evaluations"].items():
        console.print(
            f"{name}: {percent(accuracy['before'])} -> {percent(accuracy['after'])} "
            f"on {accuracy['examples']} {kind_of(name)} examples"
        )
    console.print(
        f"{summary['generations']} generations in {summary['seconds']:.0f} s; model in "
        f"{workdir / 'model'}, curves with `tensorboard --logdir {workdir}`"
    )
