r"""The forgetting study of 2605.30148: what is unlearned while a task is learned.

    python -m jes.studies.forgetting --config=configs/forgetting_tiny.py:quick
    python -m jes.studies.forgetting --config=configs/forgetting_tiny.py --seeds=0,1,2 \
        --methods=es,l2:1,l1:0.02,n:128,grpo:1e-5 --workdir=runs/study --out=RESULTS

The config is one of `jes.train`: the target task, the prior tasks (`eval_tasks`), how
long. `jes.studies.grid` lists the methods. Beside them stand controls for every decay
and for GRPO: the result of plain ES shrunk towards the base model to their norm, and ES
stopped early at their accuracy on the target.

`--chain=TASK,TASK,...` studies tasks learned one after another instead: each stage
starts from the model of the stage before, and is anchored there.

OUT gets results.csv, curves.json and study.json, and drawn from them results.md and
forgetting.png; of a chain chain.csv, chain.md and chain.png.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from jes.config import freeze
from jes.core.noise import PyTree
from jes.errors import InputError
from jes.experiment import make_experiment
from jes.io.metrics import read_rows, write_json
from jes.models.weights import load
from jes.rollout import examine
from jes.studies import grid as grids
from jes.studies.grid import Grid, Row, grouped, mean_error, method_config, spread

COLUMNS = {
    "target": ("target %", ".1f"),
    "prior": ("priors %", ".1f"),
    "worst": ("worst prior %", ".1f"),
    "trough": ("trough of priors %", ".1f"),
    "recovery": ("recovered", ".1f"),
    "prior_strict": ("priors strict %", ".1f"),
    "kl_prior": ("full KL on priors, nats", ".3f"),
    "norm": ("‖θ-θ₀‖", ".2f"),
    "law": ("drift law", ".2f"),
    "changed": ("codes moved a generation, %", ".2f"),
    "moved_codes": ("codes moved in all, %", ".1f"),
    "answers": ("answers, thousands", ".0f"),
}
"""Column of results.csv -> heading and format in the table."""
MORE = ("prior_format", "target_strict", "target_format", "kl_target", "moved")
"""Columns of results.csv that the table leaves out: percent, and a KL in nats."""
Curves = dict[str, dict[str, dict[str, list]]]
"""Method -> seed -> quantity -> its values at the evaluations of a run."""


# Data: results.csv, curves.json and study.json, from run folders.


def collect(grid: Grid) -> None:
    """Trains the grid and its controls, and writes the data of the study."""
    check(grid.config)
    grid.run()
    shrink(grid)
    rows: list[Row] = []
    curves: Curves = {}
    hours = 0.0
    for method, seed in grid:
        summary = grid.summary(method, seed)
        curve = curve_of(grid, method, seed)
        rows.append(result(grid, method, seed, curve))
        curves.setdefault(method, {})[str(seed)] = curve
        hours += summary["seconds"] / 3600
    for method in matched(grid):
        rows += [final(grid, f"shrunk to {method}", seed) for seed in grid.seeds]
        for row in [row for row in rows if row["method"] == method]:
            rows += stopped_rows(grid, row, curves["es"][str(row["seed"])])
    target, priors = grid.config.task, list(grid.config.eval_tasks)
    columns = ["method", "seed", *COLUMNS, *MORE, *priors]
    grids.write_csv(grid.out / "results.csv", rows, columns)
    write_json(grid.out / "curves.json", curves)
    study = {
        "target": target,
        "priors": priors,
        "questions": summary["evaluations"][target]["examples"],
        "hours": hours,
        "systematic": systematic_rows(grid),
    }
    write_json(grid.out / "study.json", study)


def check(config: ConfigDict) -> None:
    """Raises InputError if forgetting cannot be measured with these settings."""
    if config.anchor == "none":
        raise InputError("the study measures distances: anchor='none' cannot be used")
    if not config.eval_tasks:
        raise InputError("the study needs prior tasks: eval_tasks is empty")


def result(grid: Grid, method: str, seed: int, curve: dict[str, list]) -> Row:
    """What a finished run came to, accuracies in percent."""
    folder, summary = grid.folder(method, seed), grid.summary(method, seed)
    far, priors = summary["distance"], grid.config.eval_tasks
    last = ("prior_strict", "prior_format", "target_strict", "target_format")
    row = {
        **final(grid, method, seed),
        "trough": min(curve["prior"]),
        "recovery": curve["prior"][-1] - min(curve["prior"]),
        **{key: curve[key][-1] for key in last},
        "kl_prior": mean_kl(far, priors),
        "kl_target": mean_kl(far, [grid.config.task]),
        "law": summary["displacement_norm_drift"],
        "moved": 100 * far["moved"],
        "answers": summary["answers"] / 1000,
    }
    metrics = read_rows(folder / "metrics.jsonl")
    shares = [one["codes_changed"] for one in metrics if "codes_changed" in one]
    if shares:  # the model is quantized
        row["changed"] = 100 * float(np.mean(shares))
        row["moved_codes"] = row["moved"]
    return row


def final(grid: Grid, method: str, seed: int) -> Row:
    """Accuracies in percent at the end, and the norm."""
    summary = grid.summary(method, seed)
    after = {name: 100 * e["after"] for name, e in summary["evaluations"].items()}
    priors = {name: after[name] for name in grid.config.eval_tasks}
    return {
        "method": method,
        "seed": seed,
        "target": after[grid.config.task],
        "prior": float(np.mean(list(priors.values()))),
        "worst": min(priors.values()),
        "norm": summary["displacement_norm"],
        **priors,
    }


def mean_kl(row: Row, tasks: Sequence[str]) -> float | None:
    """Mean over tasks of the KL in nats per token; None where it was not measured."""
    found: list[Any] = [row.get(f"kl/{task}/full") for task in tasks]
    return None if None in found else float(np.mean(found))


def curve_of(grid: Grid, method: str, seed: int) -> dict[str, list]:
    """A run at its evaluations: accuracies in percent, answers in thousands, KL."""
    folder, summary = grid.folder(method, seed), grid.summary(method, seed)
    each = summary["answers"] / summary["generations"] / 1000
    target, priors = grid.config.task, list(grid.config.eval_tasks)
    rows = read_rows(folder / "evaluations.jsonl")
    scores = {(row["generation"], row["task"]): row for row in rows}
    times = sorted({generation for generation, _ in scores})
    far = {row["generation"]: row for row in read_rows(folder / "distances.jsonl")}
    laws = {
        row["generation"] + 1: row["displacement_norm_drift"]
        for row in read_rows(folder / "metrics.jsonl")
    }

    def course(key: str, *tasks: str) -> list[float]:
        return [
            float(np.mean([100 * scores[time, task][key] for task in tasks]))
            for time in times
        ]

    return {
        "generation": times,
        "answers": [time * each for time in times],
        "target": course("accuracy", target),
        "target_strict": course("strict", target),
        "target_format": course("formatted", target),
        "prior": course("accuracy", *priors),
        "prior_strict": course("strict", *priors),
        "prior_format": course("formatted", *priors),
        **{name: course("accuracy", name) for name in priors},
        "norm": [far[time]["norm"] for time in times],
        "law": [laws[time] if time else 0.0 for time in times],
        "kl_prior": [mean_kl(far[time], priors) for time in times],
    }


# Controls: plain ES, shrunk to the norm of a method or stopped at its accuracy.


def matched(grid: Grid) -> list[str]:
    """The methods with controls; none of a quantized model, which cannot be shrunk."""
    if "es" not in grid.methods or grid.config.rounding != "none":
        return []
    return [m for m in grid.methods if m.startswith(("l1:", "l2:", "grpo:"))]


def shrink(grid: Grid) -> None:
    """Evaluates plain ES moved back towards the base model, to the norm of others."""
    for seed in grid.seeds:
        todo = {m: grid.folder(f"shrunk to {m}", seed) for m in matched(grid)}
        todo = {m: p for m, p in todo.items() if not (p / "summary.json").is_file()}
        if not todo:
            continue
        config = method_config(grid.config, "es", seed)
        config.kl_prompts = 0
        experiment = make_experiment(freeze(config))
        base = experiment.pretrained.params
        tuned = load(grid.folder("es", seed) / "model").params
        full = grid.summary("es", seed)["displacement_norm"]
        for method, folder in todo.items():
            share = min(1.0, grid.summary(method, seed)["displacement_norm"] / full)
            params = jax.tree.map(lambda a, b, s=share: a + s * (b - a), base, tuned)
            found = {}
            for name, (evaluation, questions) in experiment.evaluations.items():
                size = experiment.settings.eval_batch
                score = examine(evaluation, params, questions, batch_size=size)
                found[name] = {"after": score.accuracy, "examples": len(questions)}
            folder.mkdir(parents=True, exist_ok=True)
            summary = {"evaluations": found, "displacement_norm": share * full}
            write_json(folder / "summary.json", summary)


def stopped_rows(grid: Grid, row: Row, curve: dict[str, list]) -> list[Row]:
    """Plain ES where it first has a method's target accuracy; empty if it never has."""
    at = [i for i, value in enumerate(curve["target"]) if value >= row["target"]]
    if not at:
        return []
    keys = ("target", "prior", "norm", "law", "kl_prior", "answers")
    found = {key: curve[key][at[0]] for key in (*keys, *grid.config.eval_tasks)}
    worst = min(found[task] for task in grid.config.eval_tasks)
    name = f"es stopped at {row['method']}"
    return [{"method": name, "seed": row["seed"], "worst": worst, **found}]


# Systematic motion: how far the seeds of a method went in a common direction.


def systematic_rows(grid: Grid) -> list[Row]:
    """A row per method of ES that a bound is known for, from the saved models."""
    config = grid.config
    if len(grid.seeds) < 2 or config.dtype != "float32" or config.rounding != "none":
        return []  # rounding to less precision hides small displacements
    base = load(config.model).params

    def moved(method: str) -> list[np.ndarray]:
        folders = [grid.folder(method, seed) / "model" for seed in grid.seeds]
        return displacements(base, folders)

    gradients = [m for m in grid.methods if m.startswith("grpo:")]
    direction = np.mean(moved(gradients[0]), axis=0) if gradients else None
    rows = []
    for method in grid.methods:
        run = method_config(config, method, grid.seeds[0])
        if run.method == "es" and run.decay != "l1":
            most = reach(run.alpha, run.generations, run.decay_coefficient)
            found = systematic(moved(method), direction)
            rows.append({"method": method, **found, "reach": most})
    return rows


def displacements(base: PyTree, folders: Sequence[Path]) -> list[np.ndarray]:
    """θ - θ_0 of the models in these folders as vectors, float32 [d]."""
    start = ravel_pytree(base)[0]
    return [
        np.asarray(ravel_pytree(load(folder).params)[0] - start) for folder in folders
    ]


def systematic(
    moved: Sequence[np.ndarray], direction: np.ndarray | None = None
) -> dict[str, float | None]:
    r"""What runs with different noise have in common.

    Displacements :math:`\Delta_a, \Delta_b` of two seeds share what the reward asks for
    and none of their noise, so :math:`E[\Delta_a \cdot \Delta_b]` is the square of the
    systematic motion.

    Args:
      moved: displacements [d] of at least two runs.
      direction: a vector [d] of any length, such as the displacement of a policy
        gradient, to measure the motion along.

    Returns:
      `square`, the mean of Δ_a · Δ_b over pairs, with its standard error `error` if
      the rest is an isotropic walk (|Δ_a| |Δ_b| / √d for a pair); `along`, the mean of
      Δ · g for the unit vector g, with `along_error` (|Δ| / √d), None without one.
    """
    size, lengths = len(moved[0]), np.linalg.norm(moved, axis=1)
    pairs = list(itertools.combinations(range(len(moved)), 2))
    products = [lengths[a] * lengths[b] for a, b in pairs]
    along = None
    if direction is not None:
        along = float(np.mean(moved @ (direction / np.linalg.norm(direction))))
    return {
        "along": along,
        "along_error": float(lengths.mean() / (size * len(moved)) ** 0.5),
        "square": float(np.mean([np.dot(moved[a], moved[b]) for a, b in pairs])),
        "error": float(np.mean(products) / (size * len(pairs)) ** 0.5),
    }


def reach(alpha: float, generations: int, coefficient: float = 0.0) -> float:
    r"""The most that systematic motion of z-scored ES can be.

    At most α per generation, so αT; with L2 decay and :math:`r = 1 - \alpha\lambda` it
    saturates at :math:`r (1 - r^T)/\lambda` (Cauchy-Schwarz on the update of
    2605.30148, Algorithm 1).
    """
    if not coefficient:
        return alpha * generations
    kept = 1 - alpha * coefficient
    return kept * (1 - kept**generations) / coefficient


# Tables.


def draw(out: Path) -> str:
    """Writes results.md and forgetting.png from the data."""
    rows = grids.read_csv(out / "results.csv")
    curves = json.loads((out / "curves.json").read_text())
    study = json.loads((out / "study.json").read_text())
    for row in rows:  # the CSV has six digits, the end of a curve all of them
        curve = curves.get(row["method"], {}).get(str(row["seed"]), {})
        row.update({key: curve[key][-1] for key in COLUMNS if key in curve})
    text = f"Target `{study['target']}`; priors "
    text += ", ".join(f"`{prior}`" for prior in study["priors"]) + ".\n\n"
    text += results_table(rows, curves)
    seeds = len(next(iter(curves.values())))
    text += f"\n{grids.precision(seeds, study['questions'])}\n" + slices(curves)
    if study["systematic"]:
        text += systematic_table(study["systematic"])
    text += (
        f"\n{study['hours']:.1f} hours of generations in all, without evaluations.\n"
    )
    (out / "results.md").write_text(text)
    figure(rows, curves, study["target"]).savefig(out / "forgetting.png", dpi=120)
    return text


def results_table(rows: Sequence[Row], curves: Curves) -> str:
    """Means over seeds, ± one standard error, after the base model."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    columns = {key: COLUMNS[key] for key in COLUMNS if key in known}
    before = [
        {key: curve[key][0] for key in ("target", "prior")}
        for curve in next(iter(curves.values())).values()
    ]

    def cells(name: str, found: Sequence[Row]) -> list[str]:
        line = [name, str(len(found))]
        for key, (_, form) in columns.items():
            values = [row[key] for row in found if row.get(key) is not None]
            exact = key in ("answers", "law") and len(set(values)) == 1
            line.append(mean_error(values[:1] if exact else values, form))
        return line

    heads = ["method", "seeds", *(head for head, _ in columns.values())]
    methods = {"(before)": before, **grouped(rows, "method")}
    return grids.table(heads, [cells(*item) for item in methods.items()])


def slices(curves: Curves) -> str:
    """The runs at equal answers and at equal target accuracy.

    The answers are those of the shortest run; the accuracy is three quarters of the way
    from the start to the best end.
    """
    every = [curve for of_seed in curves.values() for curve in of_seed.values()]
    answers = min(curve["answers"][-1] for curve in every)
    start = float(np.mean([curve["target"][0] for curve in every]))
    ends = [[c["target"][-1] for c in of_seed.values()] for of_seed in curves.values()]
    best = max(float(np.mean(values)) for values in ends)
    goal = start + 0.75 * (best - start)
    lines = []
    for method, of_seed in curves.items():
        equal = [crossing(curve, "answers", answers) for curve in of_seed.values()]
        reached = [crossing(curve, "target", goal) for curve in of_seed.values()]
        cells = [among(equal, key) for key in ("target", "prior")]
        cells += [among(reached, key) for key in ("prior", "answers", "norm")]
        lines.append([method, *cells])
    heads = [
        "method",
        "target %, equal answers",
        "priors %, equal answers",
        "priors %, equal target",
        "answers, thousands",
        "‖θ-θ₀‖",
    ]
    title = f"After {answers:.0f} thousand answers, and where the target reaches"
    return f"\n{title} {goal:.1f} %:\n\n{grids.table(heads, lines)}"


def crossing(curve: dict[str, list], key: str, value: float) -> Row | None:
    """The state where `key` first has a value, linear between evaluations."""
    steps = curve[key]
    for i, (before, after) in enumerate(itertools.pairwise(steps)):
        if before <= value <= after:
            share = (value - before) / (after - before) if after > before else 0.0
            return {
                name: curve[name][i] + share * (curve[name][i + 1] - curve[name][i])
                for name in ("target", "prior", "answers", "norm")
            }
    return None


def among(states: Sequence[Row | None], key: str) -> str:
    """Mean ± error of the runs that got there, and how many if not all did."""
    known = [state[key] for state in states if state is not None]
    few = f" ({len(known)} of {len(states)})" if 0 < len(known) < len(states) else ""
    return (mean_error(known) or "not reached") + few


def systematic_table(rows: Sequence[Row]) -> str:
    """How far the seeds went in a common direction, and the bound on it."""
    lines = []
    for row in rows:
        along = row["along"]
        known = "" if along is None else f"{along:.3f} ± {row['along_error']:.3f}"
        square = f"{row['square']:.3f} ± {row['error']:.3f}"
        most = row["reach"]
        lines.append([row["method"], known, square, f"{most:.3f}", f"{most**2:.3f}"])
    title = (
        "Systematic motion: along the displacement of GRPO, the mean inner product "
        "of two seeds' displacements, and the most that is possible."
    )
    heads = ["method", "along GRPO", "squared, of pairs", "reach", "reach squared"]
    return f"\n{title}\n\n{grids.table(heads, lines)}"


# The figure.


def figure(rows: Sequence[Row], curves: Curves, target: str) -> Figure:
    """Accuracies, the trade-off at the end, norms with the law of drift, and KL.

    A method has one color in all panels; accuracies and KL are of the first method of
    each name, so that they can be told apart.
    """
    made = Figure(figsize=(13, 9), layout="constrained")
    course, trade, norms, kl = made.subplots(2, 2).ravel()
    colors = {method: f"C{number % 10}" for number, method in enumerate(curves)}
    first = {m.partition(":")[0]: m for m in reversed(curves)}.values()
    for method, of_seed in curves.items():
        runs, color = list(of_seed.values()), colors[method]

        def line(axes: Axes, x: str, y: str, runs: Any = runs, **style: Any) -> None:
            grids.band(axes, runs[0][x], [run[y] for run in runs], **style)

        if method in first:
            line(course, "answers", "target", color=color, label=method)
            line(course, "answers", "prior", color=color, linestyle="--")
            line(kl, "answers", "kl_prior", color=color, label=method)
        line(norms, "generation", "norm", color=color, label=method)
        at, law = runs[0]["generation"], runs[0]["law"]
        if None not in law:
            norms.plot(at, law, ":", color="black", linewidth=1)
    trade_off(trade, rows, colors)
    course.set_ylim(-2, 124)  # room for the legend
    for axes in (course, kl):  # some methods take many times the answers of others
        axes.set_xscale("symlog", linthresh=50)
        axes.set_xlim(left=0)
    kl.set_yscale("symlog", linthresh=1e-2)
    kl.set_ylim(bottom=0)
    title = f"target {target} (solid) and mean of the priors (dashed)"
    answers = "sampled answers, thousands"
    accuracy = "held-out accuracy, %"
    grids.tidy(course, title, answers, accuracy, loc="upper center", ncol=4)
    title = "distance from the base model; dotted: the law of pure drift"
    grids.tidy(norms, title, "generation", "‖θ - θ₀‖")
    title = "KL(base || tuned) on the base model's answers to the priors"
    grids.tidy(kl, title, answers, "nats per token")
    if all(np.isnan(np.asarray(line.get_ydata(), float)).all() for line in kl.lines):
        kl.remove()  # it was not measured
    return made


def trade_off(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Target against priors at the end; gray lines join a kind of decay from λ = 0 on.

    Controls are hollow, in the color of the method that they are matched to.
    """
    paths: dict[str, list[tuple[float, float, float]]] = {"l1": [], "l2": []}
    for method, found in grouped(rows, "method").items():
        x, x_error = spread([row["target"] for row in found])
        y, y_error = spread([row["prior"] for row in found])
        run = method in colors
        axes.errorbar(
            x,
            y,
            y_error,
            x_error,
            marker="o" if run else "s" if method.startswith("shrunk") else "^",
            markerfacecolor=None if run else "none",
            linestyle="none",
            color=colors[method if run else method.split()[-1]],
            capsize=2,
            label=method,
        )
        kind, _, value = method.partition(":")
        for decay in ("l1", "l2") if method == "es" else (kind,):
            if decay in paths:
                paths[decay].append((float(value or 0), x, y))
    for points in filter(None, paths.values()):
        _, xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color="gray", linewidth=0.8, zorder=0)
    title = "at the end: target against priors (hollow: controls)"
    labels = "target accuracy, %", "mean prior accuracy, %"
    grids.tidy(axes, title, *labels, fontsize="x-small", ncol=2)


# Chains of tasks.


def collect_chain(grid: Grid, tasks: Sequence[str]) -> None:
    """Trains each task from the model of the one before; writes chain.csv."""
    check(grid.config)
    priors, rows = list(grid.config.eval_tasks), []
    watched = dict.fromkeys([*tasks, *priors])
    for method, seed in grid:
        model = grid.config.model
        for stage, task in enumerate(tasks):
            # Another seed, so that displacements of stages are independent.
            config = method_config(grid.config, method, seed + 1000 * stage)
            config.model, config.task = model, task
            if stage:
                config.quantize = ""  # the model of the stage before is quantized
            config.eval_tasks = tuple(t for t in watched if t != task)
            config.eval_every = config.generations
            folder = grid.folder(method, seed) / f"stage-{stage}"
            name = f"{method}, seed {seed}, stage {stage}: {task}"
            grids.train_once(config, folder, name)
            model = str(folder / "model")
            summary = json.loads((folder / "summary.json").read_text())
            for when in ("before", "after") if stage == 0 else ("after",):
                row = {n: 100 * e[when] for n, e in summary["evaluations"].items()}
                row["priors"] = sum(row[name] for name in priors) / len(priors)
                done = stage + (when == "after")
                rows.append({"method": method, "seed": seed, "stage": done, **row})
    columns = ["method", "seed", "stage", *tasks, "priors", *priors]
    grids.write_csv(grid.out / "chain.csv", rows, columns)


def draw_chain(out: Path) -> str:
    """Writes chain.md and chain.png: every task after every stage."""
    rows = grids.read_csv(out / "chain.csv")
    names = list(rows[0])
    columns = names[3 : names.index("priors") + 1]
    stages = ["the base model", *columns[:-1]]
    lines = [
        [method, stages[stage], *(mean_error([r[c] for r in found]) for c in columns)]
        for (method, stage), found in grouped(rows, "method", "stage").items()
    ]
    seeds = len(grouped(rows, "seed"))
    text = f"Accuracy in %, mean ± standard error over {seeds} seeds.\n\n"
    text += grids.table(["method", "after", *columns], lines)
    if seeds > 1:
        text += f"\n{grids.precision(seeds)}\n"
    (out / "chain.md").write_text(text)
    chain_figure(rows, columns).savefig(out / "chain.png", dpi=120)
    return text


def chain_figure(rows: Sequence[Row], columns: Sequence[str]) -> Figure:
    """A panel per method: accuracy on each task over the stages."""
    methods = grouped(rows, "method")
    made = Figure(figsize=(5 * len(methods), 4), layout="constrained")
    panels = made.subplots(1, len(methods), squeeze=False)[0]
    for axes, (method, found) in zip(panels, methods.items(), strict=True):
        stages = grouped(found, "stage")
        for column in columns:
            values = [spread([row[column] for row in stages[s]]) for s in stages]
            mean, error = zip(*values, strict=True)
            axes.errorbar(
                list(stages), mean, error, marker="o", capsize=3, label=column
            )
        axes.set_xticks(list(stages), ["base", *columns[:-1]])
        axes.set_ylim(-2, 102)
        grids.tidy(axes, method, "learned so far, in this order", "accuracy, %")
    return made


def main() -> None:
    """The command line."""
    flags.DEFINE_string("chain", "", "Tasks to learn one after another.")

    def collect_chosen(grid: Grid) -> None:
        if flags.FLAGS.chain:
            collect_chain(grid, grids.split(flags.FLAGS.chain, "chain"))
        else:
            collect(grid)

    def draw_chosen(out: Path) -> str:
        return draw_chain(out) if flags.FLAGS.chain else draw(out)

    methods = "es,l2:1,l1:0.02,answers:128,shuffled,grpo:1e-5"
    grids.run_study(collect_chosen, draw_chosen, methods=methods)


if __name__ == "__main__":
    main()
