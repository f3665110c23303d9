r"""ESMA and what it is compared with: methods and seeds, then a table and a figure.

    python -m jes.metacognition --config=configs/esma_triviaqa.py:tiny --seeds=0,1,2 \
        --methods=es,sft:1e-4:100,objective:alignment,l2:1 --out=RESULTS

The config is one of `jes.train`. Every method and seed is a run of its own in
`WORKDIR/METHOD/seed-S`; stopped at any moment, the same command goes on. Methods are
those of `python -m jes.forgetting` and

    sft:RATE:STEPS    supervised fine-tuning of the answer to 'do you know'
    objective:NAME    another fitness, of `jes.metacognition.objectives`

Beside them stands the base model, and for each model what a threshold on its log-odds
of yes comes to that is fitted on training questions (rows `+ threshold`). The task of
the config and those of its `eval_tasks` whose answers say if the model knows them are
measured (a prompt that lets it answer "I don't know" is prompting alone).
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import config_flags

from jes.errors import InputError
from jes.forgetting.figures import spread
from jes.forgetting.methods import folder_of, method_config
from jes.forgetting.report import mean_error
from jes.forgetting.study import folders, run_all, split, whole
from jes.io import command_line, memory, runs
from jes.io.console import console
from jes.io.metrics import write_json
from jes.metacognition.evaluate import measure
from jes.models.weights import load
from jes.quantize import load_base
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
Measured = dict[tuple[str, int, str, str], dict[str, Any]]
"""(method, seed, task, way to say yes) -> metrics."""


def measure_all(
    base: ml_collections.ConfigDict,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
) -> Measured:
    """Asks all models about themselves; what was asked before is not asked again."""
    names = [base.task, *base.eval_tasks]
    names = [name for name in names if asks_about(base, name)]
    measured: Measured = {}
    for seed in seeds:
        for method in (BASE, *methods):
            folder = folder_of(workdir, method, seed)
            config = base if method == BASE else method_config(base, method, seed)
            found = measure_model(config, method, seed, names, folder)
            for name, ways in found.items():
                for way, metrics in ways.items():
                    measured[method, seed, name, way] = metrics
    return measured


def asks_about(config: ml_collections.ConfigDict, name: str) -> bool:
    """Whether answers to a task say if the model knows them."""
    task = load_task(name, root=config.data.root, train=1, test=1)
    answers = [""] if task.meta is None else ["", ""]
    return task.reward(task.test[0], *answers).yes is not None


def measure_model(
    config: ml_collections.ConfigDict,
    method: str,
    seed: int,
    names: Sequence[str],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """The metrics of one model on the tasks, kept in its folder."""
    path = folder / "metacognition.json"
    of = runs.plain(
        {
            "generations": 0 if method == BASE else config.generations,
            "data": config.data.to_dict(),
            **{k: config[k] for k in ("model", "quantize", "group_size", "dtype")},
        }
    )
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept["tasks"] if kept.get("of") == of else {}
    missing = [name for name in names if name not in found]
    if not missing:
        return {name: found[name] for name in names}
    if method == BASE:
        args = config.quantize, config.group_size, config.dtype
        model = load_base(config.model, *args)
    else:
        model = load(folder / "model")
    folder.mkdir(parents=True, exist_ok=True)
    for name in missing:
        _, found[name] = measure(
            model,
            name,
            examples=config.data.test,
            root=config.data.root,
            dtype=config.dtype,
            batch_size=config.eval_batch,
            seed=seed,
        )
        write_json(path, {"of": of, "tasks": found})
    return {name: found[name] for name in names}


def report(
    measured: Measured, methods: Sequence[str], seeds: Sequence[int], out: Path
) -> None:
    """Writes results.csv, results.md and metacognition.png."""
    rows = dict.fromkeys((m, way) for m, _, _, way in measured)
    order = {name: i for i, name in enumerate((BASE, *methods))}
    ways = sorted(rows, key=lambda row: (order[row[0]], row[1] != "answers"))
    tasks = list(dict.fromkeys(task for _, _, task, _ in measured))
    write_csv(out / "results.csv", measured)
    text = markdown(measured, ways, tasks, seeds)
    (out / "results.md").write_text(text)
    figure(measured, ways, tasks, seeds).savefig(out / "metacognition.png", dpi=120)
    console.print(text)
    console.print(f"table and figure in {out}")


def write_csv(path: Path, measured: Measured) -> None:
    """All numbers, a row for each method, seed, task and way to say yes."""
    rows = {key: flat(metrics) for key, metrics in measured.items()}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "task", "yes_by", *names])
        for key, row in rows.items():
            writer.writerow([*key, *(f"{number(row.get(n)):.6g}" for n in names)])


def flat(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics with the two ends of an interval apart."""
    row: dict[str, float | None] = {}
    for name, value in metrics.items():
        if isinstance(value, list | tuple):
            kind = name.removesuffix("_interval")
            row |= {f"{kind}_low": value[0], f"{kind}_high": value[1]}
        else:
            row[name] = value
    return row


def number(value: float | None) -> float:
    """Back from JSON, which has no NaN."""
    return np.nan if value is None else value


def markdown(
    measured: Measured,
    ways: Sequence[tuple[str, str]],
    tasks: Sequence[str],
    seeds: Sequence[int],
) -> str:
    """Means ± standard errors over the seeds, a table for each task."""
    text = f"Means ± standard errors over {len(seeds)} seeds.\n"
    headings = " | ".join(heading for heading, _ in COLUMNS.values())
    for task in tasks:
        text += (
            f"\n{task}:\n\n| method | {headings} |\n{'|---' * (len(COLUMNS) + 1)}|\n"
        )
        for method, way in ways:
            cells = []
            for name, (_, factor) in COLUMNS.items():
                values = values_of(measured, method, task, way, seeds, name)
                decimals = ".1f" if factor == 100 else ".2f"
                shown = mean_error([factor * value for value in values], decimals)
                cells.append("" if np.isnan(values).any() else shown)
            text += f"| {label(method, way)} | {' | '.join(cells)} |\n"
    return text


def values_of(
    measured: Mapping[tuple[str, int, str, str], Mapping[str, Any]],
    method: str,
    task: str,
    way: str,
    seeds: Sequence[int],
    name: str,
) -> list[float]:
    """A metric, seed by seed; NaN where there is none."""
    rows = [measured.get((method, seed, task, way), {}) for seed in seeds]
    return [number(row.get(name)) for row in rows]


def label(method: str, way: str) -> str:
    """How the table calls a row."""
    return f"`{method}`" + ("" if way == "answers" else " + threshold")


def figure(
    measured: Measured,
    ways: Sequence[tuple[str, str]],
    tasks: Sequence[str],
    seeds: Sequence[int],
) -> Figure:
    """d', AUROC2 and accuracy of every row, with standard errors over the seeds."""
    made = Figure(figsize=(12, 1.2 + 0.32 * len(ways)), layout="constrained")
    panels = {"d_prime": "d' (log-linear)", "auroc2": "AUROC2", "accuracy": "accuracy"}
    at = np.arange(len(ways))
    for axes, (name, title) in zip(
        made.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        for i, task in enumerate(tasks):
            rows = [values_of(measured, m, task, w, seeds, name) for m, w in ways]
            mean, error = zip(*map(spread, rows), strict=True)
            y = at + 0.16 * (i - (len(tasks) - 1) / 2)
            axes.errorbar(mean, y, xerr=error, fmt="o", capsize=2, label=task)
        axes.set_title(title, fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_yticks(at, [label(*row).replace("`", "") for row in ways])
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return made


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings of a run: a file in configs/.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", "Of all runs; by default runs/<config>_study.")
    flags.DEFINE_string("out", "", "Of table and figure; by default the workdir.")
    flags.DEFINE_string("methods", "es", "Comma-separated.")
    flags.DEFINE_string("seeds", "0", "Comma-separated.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        memory.give_back_freed_blocks()
        values = flags.FLAGS
        methods = split(values.methods, "methods")
        seeds = [whole(seed) for seed in split(values.seeds, "seeds")]
        workdir, out = folders(values, "study")
        config = config_flag.value
        if not asks_about(config, config.task):
            raise InputError(f"task {config.task} does not ask 'do you know'")
        run_all(config, methods, seeds, workdir)
        report(measure_all(config, methods, seeds, workdir), methods, seeds, out)

    command_line.start(command)


if __name__ == "__main__":
    main()
