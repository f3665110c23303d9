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
KINDS = {"": "accuracy", "_strict": "strict", "_format": "formatted"}
"""End of a column -> key of an evaluation."""
Curve = dict[str, list]
"""Quantity -> its values at the evaluations of a run."""
Curves = dict[str, dict[str, Curve]]
"""Method -> seed -> the run."""


# Data: results.csv, curves.json and study.json, from run folders.


def collect(grid: Grid) -> None:
    """Trains the grid and its controls, and writes the data of the study."""
    check(grid.config)
    grid.run()
    shrink(grid)
    target, priors = grid.config.task, list(grid.config.eval_tasks)
    rows: list[Row] = []
    curves: Curves = {}
    hours = 0.0
    for method, seed in grid:
        curve = curve_of(grid, method, seed)
        rows.append(result(grid, method, seed, curve))
        curves.setdefault(method, {})[str(seed)] = curve
        summary = grid.summary(method, seed)
        hours += summary["seconds"] / 3600
    for method in matched(grid):
        rows += [shrunk(grid, method, seed) for seed in grid.seeds]
        rows += [row for s in grid.seeds for row in stopped(grid, method, s, curves)]
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


def result(grid: Grid, method: str, seed: int, curve: Curve) -> Row:
    """The results of a finished run, accuracies in percent."""
    summary = grid.summary(method, seed)
    far, trough = summary["distance"], min(curve["prior"])
    row = {
        **{key: values[-1] for key, values in curve.items()},
        "trough": trough,
        "recovery": curve["prior"][-1] - trough,
        "kl_target": mean_kl(far, [grid.config.task]),
        "norm": summary["displacement_norm"],
        "moved": 100 * far["moved"],
        "answers": summary["answers"] / 1000,
    }
    metrics = read_rows(grid.folder(method, seed) / "metrics.jsonl")
    shares = [one["codes_changed"] for one in metrics if "codes_changed" in one]
    if shares:  # the model is quantized
        row |= {"changed": 100 * mean(shares), "moved_codes": row["moved"]}
    return row_of(grid, method, seed, row)


def row_of(grid: Grid, method: str, seed: int, found: Row) -> Row:
    """Results with the method, the seed and the worst of the priors."""
    worst = min(found[prior] for prior in grid.config.eval_tasks)
    return {"method": method, "seed": seed, "worst": worst, **found}


def mean(values: Any) -> float:
    """A mean that JSON can hold."""
    return float(np.mean(values))


def mean_kl(row: Row, tasks: Sequence[str]) -> float | None:
    """Mean over tasks of the KL in nats per token; None where it was not measured."""
    found: list[Any] = [row.get(f"kl/{task}/full") for task in tasks]
    return None if None in found else mean(found)


def curve_of(grid: Grid, method: str, seed: int) -> Curve:
    """A run at its evaluations: accuracies in percent, answers in thousands, KL."""
    folder, summary = grid.folder(method, seed), grid.summary(method, seed)
    each = summary["answers"] / summary["generations"] / 1000
    rows = read_rows(folder / "evaluations.jsonl")
    scores = {(row["generation"], row["task"]): row for row in rows}
    times = sorted({generation for generation, _ in scores})
    far = {row["generation"]: row for row in read_rows(folder / "distances.jsonl")}
    laws = {
        row["generation"] + 1: row["displacement_norm_drift"]
        for row in read_rows(folder / "metrics.jsonl")
    }
    target, priors = grid.config.task, list(grid.config.eval_tasks)
    columns = {name: ("accuracy", [name]) for name in priors}
    for end, key in KINDS.items():
        columns |= {f"target{end}": (key, [target]), f"prior{end}": (key, priors)}
    return {
        "generation": times,
        "answers": [time * each for time in times],
        "norm": [far[time]["norm"] for time in times],
        "law": [laws[time] if time else 0.0 for time in times],
        "kl_prior": [mean_kl(far[time], priors) for time in times],
        **{
            name: [mean([100 * scores[t, of][key] for of in tasks]) for t in times]
            for name, (key, tasks) in columns.items()
        },
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
        folders = {m: grid.folder(f"shrunk to {m}", seed) for m in matched(grid)}
        todo = [m for m in folders if not (folders[m] / "summary.json").is_file()]
        if not todo:
            continue
        config = method_config(grid.config, "es", seed)
        config.kl_prompts = 0
        experiment = make_experiment(freeze(config))
        base = experiment.pretrained.params
        tuned = load(grid.folder("es", seed) / "model").params
        full = grid.summary("es", seed)["displacement_norm"]
        for method in todo:
            share = min(1.0, grid.summary(method, seed)["displacement_norm"] / full)
            params = jax.tree.map(lambda a, b, s=share: a + s * (b - a), base, tuned)
            found = {}
            for name, (evaluation, questions) in experiment.evaluations.items():
                size = experiment.settings.eval_batch
                score = examine(evaluation, params, questions, batch_size=size)
                found[name] = {"after": score.accuracy, "examples": len(questions)}
            folders[method].mkdir(parents=True, exist_ok=True)
            summary = {"evaluations": found, "displacement_norm": share * full}
            write_json(folders[method] / "summary.json", summary)


def shrunk(grid: Grid, method: str, seed: int) -> Row:
    """Plain ES with the norm of a method."""
    name = f"shrunk to {method}"
    summary, priors = grid.summary(name, seed), grid.config.eval_tasks
    after = {task: 100 * e["after"] for task, e in summary["evaluations"].items()}
    after["target"] = after[grid.config.task]
    after["prior"] = mean([after[task] for task in priors])
    return row_of(grid, name, seed, after | {"norm": summary["displacement_norm"]})


def stopped(grid: Grid, method: str, seed: int, curves: Curves) -> list[Row]:
    """Plain ES where it first has a method's target accuracy; empty if it never has."""
    plain, goal = curves["es"][str(seed)], curves[method][str(seed)]["target"][-1]
    keys = ("target", "prior", "norm", "law", "kl_prior", "answers")
    for at, value in enumerate(plain["target"]):
        if value >= goal:
            found = {key: plain[key][at] for key in (*keys, *grid.config.eval_tasks)}
            return [row_of(grid, f"es stopped at {method}", seed, found)]
    return []


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
    return [np.asarray(ravel_pytree(load(f).params)[0] - start) for f in folders]


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
    squares = [np.dot(a, b) for a, b in itertools.combinations(moved, 2)]
    products = [a * b for a, b in itertools.combinations(lengths, 2)]
    along = None
    if direction is not None:
        along = mean(moved @ (direction / np.linalg.norm(direction)))
    return {
        "along": along,
        "along_error": float(lengths.mean() / (size * len(moved)) ** 0.5),
        "square": mean(squares),
        "error": mean(products) / (size * len(products)) ** 0.5,
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
    priors = ", ".join(f"`{prior}`" for prior in study["priors"])
    precision = grids.precision(len(next(iter(curves.values()))), study["questions"])
    text = f"Target `{study['target']}`; priors {priors}.\n\n"
    text += f"{results_table(rows, curves)}\n{precision}\n{slices(curves)}"
    if study["systematic"]:
        text += systematic_table(study["systematic"])
    hours = f"{study['hours']:.1f} hours of generations in all"
    text += f"\n{hours}, without evaluations.\n"
    (out / "results.md").write_text(text)
    figure(rows, curves, study["target"]).savefig(out / "forgetting.png", dpi=120)
    return text


def results_table(rows: Sequence[Row], curves: Curves) -> str:
    """Means over seeds, ± one standard error, after the base model."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    columns = {key: COLUMNS[key] for key in COLUMNS if key in known}
    runs = next(iter(curves.values())).values()
    before = [{key: curve[key][0] for key in ("target", "prior")} for curve in runs]
    lines = []
    for name, found in {"(before)": before, **grouped(rows, "method")}.items():
        line = [name, str(len(found))]
        for key, (_, form) in columns.items():
            values = [row[key] for row in found if row.get(key) is not None]
            exact = key in ("answers", "law") and len(set(values)) == 1
            line.append(mean_error(values[:1] if exact else values, form))
        lines.append(line)
    heads = ["method", "seeds", *(head for head, _ in columns.values())]
    return grids.table(heads, lines)


def slices(curves: Curves) -> str:
    """The runs at equal answers and at equal target accuracy.

    The answers are those of the shortest run; the accuracy is three quarters of the way
    from the start to the best end.
    """
    runs = {method: list(of_seed.values()) for method, of_seed in curves.items()}
    every = list(itertools.chain(*runs.values()))
    answers = min(curve["answers"][-1] for curve in every)
    start = mean([curve["target"][0] for curve in every])
    best = max(mean([c["target"][-1] for c in found]) for found in runs.values())
    goal = start + 0.75 * (best - start)
    lines = []
    for method, found in runs.items():
        equal = [crossing(curve, "answers", answers) for curve in found]
        reached = [crossing(curve, "target", goal) for curve in found]
        cells = [among(equal, key) for key in ("target", "prior")]
        cells += [among(reached, key) for key in ("prior", "answers", "norm")]
        lines.append([method, *cells])
    title = f"After {answers:.0f} thousand answers, and where the target reaches"
    heads = ["method", *(f"{key} %, equal answers" for key in ("target", "priors"))]
    heads += ["priors %, equal target", "answers, thousands", "‖θ-θ₀‖"]
    return f"\n{title} {goal:.1f} %:\n\n{grids.table(heads, lines)}"


def crossing(curve: Curve, key: str, value: float) -> Row | None:
    """The state where `key` first has a value, linear between evaluations."""
    for i, (before, after) in enumerate(itertools.pairwise(curve[key])):
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

        line(norms, "generation", "norm", color=color, label=method)
        if method in first:
            line(course, "answers", "target", color=color, label=method)
            line(course, "answers", "prior", color=color, linestyle="--")
            line(kl, "answers", "kl_prior", color=color, label=method)
        if None not in runs[0]["law"]:
            law = runs[0]["generation"], runs[0]["law"]
            norms.plot(*law, ":", color="black", linewidth=1)
    trade_off(trade, rows, colors)
    course.set_ylim(-2, 124)  # room for the legend
    for axes in (course, kl):  # some methods take many times the answers of others
        axes.set_xscale("symlog", linthresh=50)
        axes.set_xlim(left=0)
    kl.set_yscale("symlog", linthresh=1e-2)
    kl.set_ylim(bottom=0)
    title = f"target {target} (solid) and mean of the priors (dashed)"
    labels = "sampled answers, thousands", "held-out accuracy, %"
    grids.tidy(course, title, *labels, loc="upper center", ncol=4)
    title = "distance from the base model; dotted: the law of pure drift"
    grids.tidy(norms, title, "generation", "‖θ - θ₀‖")
    title = "KL(base || tuned) on the base model's answers to the priors"
    grids.tidy(kl, title, labels[0], "nats per token")
    if all(np.isnan(np.asarray(line.get_ydata(), float)).all() for line in kl.lines):
        kl.remove()  # it was not measured
    return made


def trade_off(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Target against priors at the end; gray lines join a kind of decay from λ = 0 on.

    Controls are hollow, in the color of the method that they are matched to.
    """
    ends = {}
    for method, found in grouped(rows, "method").items():
        (x, y), (x_error, y_error) = spread([(r["target"], r["prior"]) for r in found])
        ends[method] = x, y
        control = method not in colors
        axes.errorbar(
            x,
            y,
            y_error,
            x_error,
            fmt="o" if not control else "s" if method.startswith("shrunk") else "^",
            markerfacecolor="none" if control else None,
            color=colors[method.split()[-1] if control else method],
            capsize=2,
            label=method,
        )
    for kind in ("l1:", "l2:"):
        path = [m for m in ends if m == "es" or (m.startswith(kind) and "+" not in m)]
        path.sort(key=lambda m: float(m.partition(":")[2] or 0))
        points = np.array([ends[m] for m in path]).reshape(-1, 2)
        axes.plot(*points.T, color="gray", linewidth=0.8, zorder=0)
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
            config.update(model=model, task=task, eval_every=config.generations)
            config.eval_tasks = tuple(t for t in watched if t != task)
            if stage:
                config.quantize = ""  # the model of the stage before is quantized
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
            curve = zip(*values, strict=True)
            axes.errorbar(list(stages), *curve, marker="o", capsize=3, label=column)
        axes.set_xticks(list(stages), ["base", *columns[:-1]])
        axes.set_ylim(-2, 102)
        grids.tidy(axes, method, "learned so far, in this order", "accuracy, %")
    return made


def main() -> None:
    """The command line."""
    flags.DEFINE_string("chain", "", "Tasks to learn one after another.")

    def collect_chosen(grid: Grid) -> None:
        chain = flags.FLAGS.chain
        collect_chain(grid, grids.split(chain, "chain")) if chain else collect(grid)

    def draw_chosen(out: Path) -> str:
        return draw_chain(out) if flags.FLAGS.chain else draw(out)

    methods = "es,l2:1,l1:0.02,answers:128,shuffled,grpo:1e-5"
    grids.run_study(collect_chosen, draw_chosen, methods=methods)


if __name__ == "__main__":
    main()
