"""Tasks learned one after another: the runs, their table and their figure."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from matplotlib.figure import Figure

from jes import train
from jes.forgetting.figures import caption, spread
from jes.forgetting.methods import folder_of, is_finished, method_config
from jes.forgetting.report import mean_error
from jes.io.console import console


def run_chain(
    base: ml_collections.ConfigDict,
    tasks: list[str],
    methods: list[str],
    seeds: list[int],
    workdir: Path,
) -> None:
    """Trains the tasks one after another, each from the model of the one before."""
    watched = dict.fromkeys([*tasks, *base.eval_tasks])
    for seed in seeds:
        for method in methods:
            model = base.model
            for stage, task in enumerate(tasks):
                # With the same noise in each stage their displacements could correlate.
                config = method_config(base, method, seed + 1000 * stage)
                config.model, config.task = model, task
                if stage:
                    config.quantize = ""  # the model of the stage before is codes
                config.eval_tasks = tuple(t for t in watched if t != task)
                config.eval_every = config.generations
                folder = folder_of(workdir, method, seed) / f"stage-{stage}"
                if not is_finished(config, folder):
                    console.print(f"{method}, seed {seed}, stage {stage}: {task}")
                    train.run(config, folder)
                model = str(folder / "model")


def chain_report(
    config: ml_collections.ConfigDict,
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
    out: Path,
) -> None:
    """Writes chain.csv, chain.md and chain.png: every task after every stage.

    Args:
      config: settings of the study.
      tasks: the chain.
      methods, seeds: what was run.
      workdir: of the runs.
      out: folder of the report, which exists.
    """
    priors = list(config.eval_tasks)
    table: dict[tuple[str, int, int], dict[str, float]] = {}
    for method in methods:
        for seed in seeds:
            folder = folder_of(workdir, method, seed)
            for stage in range(len(tasks)):
                path = folder / f"stage-{stage}" / "summary.json"
                evaluations = json.loads(path.read_text())["evaluations"]
                if stage == 0:
                    table[method, seed, 0] = chain_row(evaluations, "before", priors)
                table[method, seed, stage + 1] = chain_row(evaluations, "after", priors)
    columns = [*tasks, "priors", *priors]
    with (out / "chain.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "stage", *columns])
        for (method, seed, stage), row in table.items():
            cells = [f"{row[column]:.6g}" for column in columns]
            writer.writerow([method, seed, stage, *cells])
    text = chain_markdown(table, tasks, methods, seeds)
    (out / "chain.md").write_text(text)
    chain_figure(table, tasks, methods, seeds).savefig(out / "chain.png", dpi=120)
    console.print(text)
    console.print(f"tables and figures in {out}")


def chain_row(
    evaluations: dict[str, dict[str, Any]], when: str, priors: Sequence[str]
) -> dict[str, float]:
    """Accuracies in percent, and their mean over the prior tasks."""
    row = {name: 100 * one[when] for name, one in evaluations.items()}
    return row | {"priors": sum(row[name] for name in priors) / len(priors)}


def chain_markdown(
    table: dict[tuple[str, int, int], dict[str, float]],
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> str:
    """Accuracy on every task after every stage, means ± standard errors."""
    columns = [*tasks, "priors"]
    lines = [
        f"Accuracy in %, mean ± standard error over {len(seeds)} seeds.",
        "",
        f"| method | after | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 2)}",
    ]
    for method in methods:
        for stage, name in enumerate(["the base model", *tasks]):
            rows = [table[method, seed, stage] for seed in seeds]
            cells = [mean_error([row[c] for row in rows], ".1f") for c in columns]
            lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chain_figure(
    table: dict[tuple[str, int, int], dict[str, float]],
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> Figure:
    """A picture a method: the course of every task over the stages."""
    made = Figure(figsize=(5 * len(methods), 4), layout="constrained")
    stages = range(len(tasks) + 1)
    for axes, method in zip(
        made.subplots(1, len(methods), squeeze=False)[0], methods, strict=True
    ):
        for column in (*tasks, "priors"):
            rows = [
                [table[method, s, stage][column] for s in seeds] for stage in stages
            ]
            mean, error = zip(*map(spread, rows), strict=True)
            axes.errorbar(stages, mean, error, marker="o", capsize=3, label=column)
        axes.set_xticks(stages, ["base", *tasks])
        axes.set_ylim(-2, 102)
        caption(axes, method)
        axes.set(xlabel="learned so far, in this order", ylabel="accuracy, %")
    return made
