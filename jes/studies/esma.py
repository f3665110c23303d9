r"""ESMA (2602.02605) and its baselines: does a model know what it knows?

    python -m jes.studies.esma --config=configs/esma_triviaqa.py:tiny --seeds=0,1,2 \
        --methods=es,sft:1e-4:100,objective:alignment,l2:1 --out=RESULTS

`jes.studies.grid` lists the methods. Beside them stands the base model, and for each
model a threshold on its log-odds of yes, fitted on training questions (rows
`+ threshold`). Measured are the task of the config and those of its `eval_tasks` that
ask whether the model knows the answer; `jes.studies.knowing` measures a single model.

OUT gets results.csv, and drawn from it results.md and metacognition.png.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from jes.errors import InputError
from jes.io.metrics import write_json
from jes.models.weights import load
from jes.quantize import load_base
from jes.run_folder import plain
from jes.studies import grid as grids
from jes.studies.grid import Grid, Row, grouped, mean_error, method_config
from jes.studies.knowing import measure
from jes.tasks import load_task

BASE = "base"
COLUMNS = {
    "accuracy": ("accuracy %", 100),
    "yes_rate": ("says yes %", 100),
    "other_rate": ("neither %", 100),
    "alignment": ("alignment %", 100),
    "d_prime": ("d'", 1),
    "criterion": ("c", 1),
    "auroc2": ("AUROC2", 1),
}
"""Metric -> heading and factor in the table; results.csv has all."""
PANELS = {"d_prime": "d' (log-linear)", "auroc2": "AUROC2", "accuracy": "accuracy"}
Groups = dict[tuple[str, str, str], list[Row]]
"""(task, method, way to say yes) -> rows of results.csv, one per seed."""


def collect(grid: Grid) -> None:
    """Trains the grid, asks all models about themselves, and writes results.csv."""
    if not asks_about_knowing(grid.config, grid.config.task):
        raise InputError(f"task {grid.config.task} does not ask 'do you know'")
    grid.run()
    grids.write_csv(grid.out / "results.csv", measure_all(grid))


def measure_all(grid: Grid) -> list[Row]:
    """A row per model, task and way to say yes; models are asked once."""
    config = grid.config
    names = [config.task, *config.eval_tasks]
    names = [name for name in names if asks_about_knowing(config, name)]
    return [
        {"method": method, "seed": seed, "task": name, "yes_by": way, **flat(metrics)}
        for seed in grid.seeds
        for method in (BASE, *grid.methods)
        for name, ways in measure_model(grid, method, seed, names).items()
        for way, metrics in ways.items()
    ]


def asks_about_knowing(config: ConfigDict, name: str) -> bool:
    """Whether answers to a task say if the model knows them."""
    task = load_task(name, root=config.data.root, train_examples=1, test_examples=1)
    answers = [""] if task.meta is None else ["", ""]
    return task.reward(task.test[0], *answers).yes is not None


def measure_model(grid: Grid, method: str, seed: int, names: Sequence[str]) -> Row:
    """Metrics of one model by task and way; kept in its folder for the next time."""
    folder, config = grid.folder(method, seed), grid.config
    if method != BASE:
        config = method_config(config, method, seed)
    path = folder / "metacognition.json"
    settings = {k: config[k] for k in ("model", "quantize", "group_size", "dtype")}
    generations = 0 if method == BASE else config.generations
    data = config.data.to_dict()
    of = plain({"generations": generations, "data": data, **settings})
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept["tasks"] if kept.get("of") == of else {}
    missing = [name for name in names if name not in found]
    if missing:
        base = method == BASE
        model = load_base(*settings.values()) if base else load(folder / "model")
    for name in missing:
        task = load_task(
            name, seed=seed, root=data["root"], test_examples=data["test_examples"]
        )
        options = {"dtype": config.dtype, "batch_size": config.eval_batch}
        _, found[name] = measure(model, task, **options)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": of, "tasks": found})
    return {name: found[name] for name in names}


def flat(metrics: Mapping[str, Any]) -> Row:
    """Metrics with the ends of an interval apart, NaN where JSON has null."""
    row: Row = {}
    for name, value in metrics.items():
        kind = name.removesuffix("_interval")
        ends = (name,) if kind == name else (f"{kind}_low", f"{kind}_high")
        for end, number in zip(ends, np.ravel(value), strict=True):
            row[end] = np.nan if number is None else number
    return row


def draw(out: Path) -> str:
    """Writes results.md and metacognition.png from results.csv."""
    rows = grids.read_csv(out / "results.csv")
    methods = list(grouped(rows, "method"))
    groups = grouped(rows, "task", "method", "yes_by")
    known = grouped(rows, "method", "yes_by")
    ways = [
        (m, w) for m in methods for w in ("answers", "threshold") if (m, w) in known
    ]
    seeds, tasks = len(grouped(rows, "seed")), list(grouped(rows, "task"))
    text = f"Means ± standard errors over {seeds} seeds.\n"
    heads = ["method", *(heading for heading, _ in COLUMNS.values())]
    for task in tasks:
        lines = [cells(groups.get((task, *way), []), way, seeds) for way in ways]
        text += f"\n{task}:\n\n" + grids.table(heads, lines)
    text += f"\n{grids.precision(seeds, rows[0]['correct'] + rows[0]['wrong'])}\n"
    (out / "results.md").write_text(text)
    figure(groups, ways, tasks).savefig(out / "metacognition.png", dpi=120)
    return text


def cells(rows: Sequence[Row], way: tuple[str, str], seeds: int) -> list[str]:
    """A line of the table: empty where a metric is undefined for a seed."""
    line = [label(*way)]
    for name, (_, factor) in COLUMNS.items():
        values = [factor * row[name] for row in rows]
        known = len(values) == seeds and not np.isnan(values).any()
        form = ".1f" if factor == 100 else ".2f"
        line.append(mean_error(values, form) if known else "")
    return line


def label(method: str, way: str) -> str:
    """What the table calls a row."""
    return f"`{method}`" + ("" if way == "answers" else " + threshold")


def figure(
    groups: Groups, ways: Sequence[tuple[str, str]], tasks: Sequence[str]
) -> Figure:
    """d', AUROC2 and accuracy of every row, with standard errors over the seeds."""
    made = Figure(figsize=(12, 1.2 + 0.32 * len(ways)), layout="constrained")
    panels = made.subplots(1, len(PANELS), sharey=True)
    at = np.arange(len(ways))
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for i, task in enumerate(tasks):
            found = [groups.get((task, *way), [{}]) for way in ways]
            values = [[row.get(name, np.nan) for row in rows] for rows in found]
            mean, error = zip(*map(grids.spread, values), strict=True)
            y = at + 0.16 * (i - (len(tasks) - 1) / 2)
            axes.errorbar(mean, y, xerr=error, fmt="o", capsize=2, label=task)
        grids.tidy(axes, title, legend=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_yticks(at, [label(*way).replace("`", "") for way in ways])
    axes.invert_yaxis()
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return made


def main() -> None:
    """The command line."""
    grids.run_study(collect, draw)


if __name__ == "__main__":
    main()
