"""The tables of a forgetting study, from the folders of its runs."""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from jes.forgetting.figures import Results, has_curve, spread, study_figure
from jes.forgetting.methods import (
    folder_of,
    matched,
    method_config,
    summary_of,
)
from jes.forgetting.systematic import displacements, reach, systematic
from jes.io.console import console
from jes.io.metrics import read_rows, write_json
from jes.models.weights import load

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
"""Key of a result -> heading and format in the table."""
MORE = ("prior_format", "target_strict", "target_format", "kl_target", "moved")
"""What else results.csv has: shares in percent, a KL in nats."""


def study_report(
    config: ml_collections.ConfigDict,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
    out: Path,
) -> None:
    """Writes results.csv, results.md, curves.json and forgetting.png into `out`.

    Args:
      config: settings of the study.
      methods, seeds: what was run.
      workdir: of the runs.
      out: folder of the report, which exists.
    """
    priors = list(config.eval_tasks)
    results: Results = {}
    for method in methods:
        for seed in seeds:
            found = result(workdir, method, seed, config.task, priors)
            results.setdefault(method, {})[seed] = found
    for method in matched(config, methods):
        for seed in seeds:
            add_controls(results, method, seed, workdir, config.task, priors)
    write_csv(out / "results.csv", results, priors)
    text = markdown(results, config.task, priors)
    text += slices(results)
    text += systematic_table(config, methods, seeds, workdir)
    hours = sum(one.get("hours", 0.0) for of in results.values() for one in of.values())
    text += f"\n{hours:.1f} hours of generations in all, without evaluations.\n"
    (out / "results.md").write_text(text)
    curves = {
        method: {str(seed): one["curve"] for seed, one in of_seed.items()}
        for method, of_seed in results.items()
        if has_curve(of_seed)
    }
    write_json(out / "curves.json", curves)
    study_figure(results, config.task).savefig(out / "forgetting.png", dpi=120)
    console.print(text)
    console.print(f"tables and figures in {out}")


def result(
    workdir: Path, method: str, seed: int, target: str, priors: Sequence[str]
) -> dict[str, Any]:
    """What a finished run came to, accuracies in percent, and how it got there."""
    summary = summary_of(workdir, method, seed)
    each = summary["answers"] / summary["generations"] / 1000
    curve = curve_of(folder_of(workdir, method, seed), target, priors, each)
    far = summary["distance"]
    return {
        **final(summary, target, priors),
        "trough": min(curve["prior"]),
        "recovery": curve["prior"][-1] - min(curve["prior"]),
        "prior_strict": curve["prior_strict"][-1],
        "prior_format": curve["prior_format"][-1],
        "target_strict": curve["target_strict"][-1],
        "target_format": curve["target_format"][-1],
        "kl_prior": mean_kl(far, priors),
        "kl_target": mean_kl(far, [target]),
        "law": summary["displacement_norm_drift"],
        "moved": 100 * far["moved"],
        **moves(folder_of(workdir, method, seed), far),
        "answers": summary["answers"] / 1000,
        "hours": summary["seconds"] / 3600,
        "curve": curve,
    }


def moves(folder: Path, far: dict[str, Any]) -> dict[str, float]:
    """Of a quantised model, percent of its codes that moved."""
    rows = read_rows(folder / "metrics.jsonl")
    shares = [row["codes_changed"] for row in rows if "codes_changed" in row]
    if not shares:
        return {}
    return {
        "changed": 100 * float(np.mean(shares)),
        "moved_codes": 100 * far["moved"],
    }


def final(
    summary: dict[str, Any], target: str, priors: Sequence[str]
) -> dict[str, Any]:
    """Accuracies in percent at the end, and the norm, of a summary."""
    after = {name: 100 * e["after"] for name, e in summary["evaluations"].items()}
    known = [after[name] for name in priors]
    return {
        "target": after[target],
        "prior": float(np.mean(known)),
        "worst": min(known),
        "norm": summary["displacement_norm"],
        **{name: after[name] for name in priors},
    }


def mean_kl(row: dict[str, Any], tasks: Sequence[str]) -> float | None:
    """Mean over tasks of the KL in nats a token; None where it was not measured."""
    found = [row.get(f"kl/{task}/full") for task in tasks]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if len(known) == len(tasks) else None


def curve_of(
    folder: Path, target: str, priors: Sequence[str], each: float
) -> dict[str, list]:
    """The course of a run at its evaluations: accuracies in percent, norm, KL.

    Args:
      folder: of the run.
      target, priors: its tasks.
      each: thousands of answers a generation.
    """
    scores: dict[int, dict[str, dict[str, Any]]] = {}
    for row in read_rows(folder / "evaluations.jsonl"):
        scores.setdefault(row["generation"], {})[row["task"]] = row
    far = {row["generation"]: row for row in read_rows(folder / "distances.jsonl")}
    times = sorted(scores)
    laws = {
        row["generation"] + 1: row["displacement_norm_drift"]
        for row in read_rows(folder / "metrics.jsonl")
    }

    def course(key: str, *tasks: str) -> list[float]:
        return [
            float(np.mean([100 * scores[time][task][key] for task in tasks]))
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
        "law": [0.0 if time == 0 else laws[time] for time in times],
        "kl_prior": [mean_kl(far[time], priors) for time in times],
    }


def add_controls(
    results: Results,
    method: str,
    seed: int,
    workdir: Path,
    target: str,
    priors: Sequence[str],
) -> None:
    """Plain ES shrunk to this method's norm, and stopped at its target accuracy."""
    name = f"shrunk to {method}"
    summary = summary_of(workdir, name, seed)
    results.setdefault(name, {})[seed] = final(summary, target, priors)
    curve = results["es"][seed]["curve"]
    goal = results[method][seed]["target"]
    reached = [i for i, value in enumerate(curve["target"]) if value >= goal]
    if reached:
        at = reached[0]
        known = {task: curve[task][at] for task in priors}
        results.setdefault(f"es stopped at {method}", {})[seed] = {
            "target": curve["target"][at],
            "prior": curve["prior"][at],
            "worst": min(known.values()),
            "norm": curve["norm"][at],
            "law": curve["law"][at],
            "kl_prior": curve["kl_prior"][at],
            "answers": curve["answers"][at],
            **known,
        }


def write_csv(path: Path, results: Results, priors: Sequence[str]) -> None:
    """One row a method and seed; accuracies in percent."""
    keys = [*COLUMNS, *MORE, *priors]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *keys])
        for method, of_seed in results.items():
            for seed, one in of_seed.items():
                cells = [one.get(key) for key in keys]
                shown = ["" if cell is None else f"{cell:.6g}" for cell in cells]
                writer.writerow([method, seed, *shown])


def markdown(results: Results, target: str, priors: Sequence[str]) -> str:
    """The table: means over seeds, ± one standard error of the mean."""
    runs = [one for of_seed in results.values() for one in of_seed.values()]
    known = {key for one in runs for key, value in one.items() if value is not None}
    columns = {key: COLUMNS[key] for key in COLUMNS if key in known}
    heads = ["method", "seeds", *(head for head, _ in columns.values())]
    lines = [
        f"Target `{target}`; priors {', '.join(f'`{p}`' for p in priors)}.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    results = {"(before)": before(results), **results}
    for method, of_seed in results.items():
        cells = [method, str(len(of_seed))]
        for key, (_, form) in columns.items():
            values = [one.get(key) for one in of_seed.values()]
            found = [value for value in values if value is not None]
            exact = key in ("answers", "law") and len(set(found)) == 1
            cells.append(mean_error(found[:1] if exact else found, form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def before(results: Results) -> dict[int, dict[str, Any]]:
    """The base model, as the runs of the first method found it."""
    found = {}
    for seed, one in next(iter(results.values())).items():
        start = {key: one["curve"][key][0] for key in ("target", "prior")}
        found[seed] = start
    return found


def slices(results: Results) -> str:
    """The runs at equal answers and at equal target accuracy, between evaluations.

    The answers are those of the shortest run; the target is three quarters of the way
    from the start to the best end.
    """
    runs = {
        method: [one["curve"] for one in of_seed.values()]
        for method, of_seed in results.items()
        if has_curve(of_seed)
    }
    curves = [curve for of_seed in runs.values() for curve in of_seed]
    answers = min(curve["answers"][-1] for curve in curves)
    start = float(np.mean([curve["target"][0] for curve in curves]))
    best = max(float(np.mean([c["target"][-1] for c in of])) for of in runs.values())
    goal = start + 0.75 * (best - start)
    lines = [
        "",
        f"After {answers:.0f} thousand answers, and where the target reaches "
        f"{goal:.1f} %:",
        "",
        "| method | target %, equal answers | priors %, equal answers | "
        "priors %, equal target | answers, thousands | ‖θ-θ₀‖ |",
        "|---|---|---|---|---|---|",
    ]
    for method, of_seed in runs.items():
        equal = [crossing(curve, "answers", answers) for curve in of_seed]
        reached = [crossing(curve, "target", goal) for curve in of_seed]
        cells = [
            *(among(equal, key) for key in ("target", "prior")),
            *(among(reached, key) for key in ("prior", "answers", "norm")),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def crossing(curve: dict[str, list], key: str, value: float) -> dict[str, float] | None:
    """The state where `key` first comes to a value, between evaluations linearly."""
    steps = curve[key]
    for i, (before, after) in enumerate(itertools.pairwise(steps)):
        if before <= value <= after:
            share = (value - before) / (after - before) if after > before else 0.0
            return {
                name: curve[name][i] + share * (curve[name][i + 1] - curve[name][i])
                for name in ("target", "prior", "answers", "norm")
            }
    return None


def among(states: Sequence[dict[str, float] | None], key: str) -> str:
    """Mean ± error of those that came to it, and how many if not all did."""
    known = [state[key] for state in states if state is not None]
    few = f" ({len(known)} of {len(states)})" if 0 < len(known) < len(states) else ""
    return (mean_error(known, ".1f") or "not reached") + few


def systematic_table(
    config: ml_collections.ConfigDict,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
) -> str:
    """How far the seeds of a method went in a common direction, if that can be told."""
    if len(seeds) < 2 or config.dtype != "float32" or config.rounding != "none":
        return ""  # saved in less, a model's small displacement is mostly rounding
    base = load(config.model).params

    def moved(method: str) -> list[np.ndarray]:
        folders = [folder_of(workdir, method, seed) / "model" for seed in seeds]
        return displacements(base, folders)

    gradients = [m for m in methods if m.startswith("grpo:")]
    direction = np.mean(moved(gradients[0]), axis=0) if gradients else None
    lines = [
        "",
        "Systematic motion: along the displacement of GRPO, the mean inner product "
        "of two seeds' displacements, and the most that is possible.",
        "",
        "| method | along GRPO | squared, of pairs | reach | reach squared |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        run = method_config(config, method, seeds[0])
        if run.method != "es" or run.decay == "l1":
            continue  # no bound is known for these
        found = systematic(moved(method), direction)
        most = reach(run.alpha, run.generations, run.decay_coefficient)
        along = f"{found.along:.3f} ± {found.along_error:.3f}" if gradients else ""
        lines.append(
            f"| {method} | {along} | {found.square:.3f} ± {found.error:.3f} | "
            f"{most:.3f} | {most**2:.3f} |"
        )
    return "\n".join(lines) + "\n"


def mean_error(values: Sequence[float], form: str) -> str:
    """'mean ± standard error', or the value alone where there is one."""
    if not values:
        return ""
    mean, error = spread(values)
    return f"{mean:{form}}" + (f" ± {error:{form}}" if len(values) > 1 else "")
