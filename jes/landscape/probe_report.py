"""The table and the figure of `jes.probe`, from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.io.console import console
from jes.io.metrics import write_json
from jes.landscape.probes import (
    SIZES,
    best_of,
    bootstrap,
    deal_out,
    enough,
    gains_of,
    gaussian_best,
    halves,
    headroom,
    improving,
)

SHAM = "sham"
DEALS = 20
"""How often a null is dealt."""
PICK = 30
"""N of the table, or the largest there is: what the paper says is enough."""


class Answers:
    """The rows of one model at one σ, as bits.

    Attributes:
      pool, fresh: bool [S, M, P] and [S, M, F], right answers of S batches.
      other: float [S, M], shares of answers that are not those of the model itself.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], pool: int, fresh: int
    ) -> None:
        numbers = sorted({row["batch"] for row in rows})
        batches = [
            sorted(
                (row for row in rows if row["batch"] == number),
                key=lambda row: row["candidate"],
            )
            for number in numbers
        ]
        bits = np.array(
            [[from_hex(row["right"], pool + fresh) for row in one] for one in batches]
        )
        self.pool, self.fresh = bits[..., :pool], bits[..., pool:]
        self.other = np.array(
            [[row["other_answers"] for row in one] for one in batches], float
        )


def from_hex(text: str, count: int) -> np.ndarray:
    """Bools [count] from hexadecimal digits, the first in the highest bit."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed)[:count].astype(bool)


def write_report(
    config: ml_collections.ConfigDict, rows: list[dict[str, Any]], out: Path
) -> None:
    """Writes probe.json, probe.md and probe.png into `out`, of what has been asked."""
    pool, fresh = config.probe.pool, config.probe.fresh
    found = []
    for name in config.models:
        of_model = [row for row in rows if row["model"] == name]
        (itself,) = (row for row in of_model if row["batch"] == -1)
        base = from_hex(itself["right"], pool + fresh)
        for sigma in (*config.probe.sigmas, SHAM):
            chosen = [
                row
                for row in of_model
                if (row["batch"] == -2 if sigma == SHAM else row["batch"] >= 0)
                and (sigma == SHAM or row["sigma"] == sigma)
                and 0 <= row["candidate"] < config.probe.candidates
                and row["batch"] < config.probe.batches
            ]
            if chosen:
                answers = Answers(chosen, pool, fresh)
                if sigma == SHAM:  # from its mean: sampling is worse than greedy
                    both = np.concatenate([answers.pool, answers.fresh], -1)
                    base = both.mean((0, 1))
                found.append(
                    {"model": name, "sigma": sigma} | statistics(answers, base, pool)
                )
    write_json(out / "probe.json", {"task": config.task, "results": found})
    text = markdown(config, found)
    (out / "probe.md").write_text(text)
    figure(found, config.task).savefig(out / "probe.png", dpi=120)
    console.print(text)
    console.print(f"table and figure in {out}")


def statistics(answers: Answers, base: np.ndarray, pool: int) -> dict[str, Any]:
    """What the candidates of one model at one σ do.

    Args:
      answers: of S batches of M candidates.
      base: bool [P + F], of the model itself; or shares.
      pool: P.

    Returns:
      Rewards and gains as shares of the prompts: `base`, `mean` with its 95 % interval
      over candidates, `improving` with its, `other` answers; by N of the grid `best`,
      `best_error` (standard error over batches, NaN for one), `best_spread` (standard
      deviation of the best of one draw), `null`, and `fresh`, the gain of the same
      winners on fresh prompts (NaN without); `enough` (N_90), `q95` of the gain as a
      share of the headroom, standard deviations `own` and `noise` of candidates and of
      the finite pool.
    """
    rng = np.random.default_rng(0)
    gains = [gains_of(bits, base[:pool]) for bits in answers.pool]
    fresh = (
        [gains_of(bits, base[pool:]) for bits in answers.fresh]
        if len(base) > pool
        else None
    )
    sizes = [n for n in SIZES if n <= len(gains[0])]
    nulls = [
        [gains_of(deal_out(bits, rng), base[:pool]) for _ in range(DEALS)]
        for bits in answers.pool
    ]
    every = np.concatenate(gains)
    own, noise = np.mean(
        [halves(bits, base[:pool], rng) for bits in answers.pool], axis=0
    )
    best = np.array([[best_of(one, n)[0] for n in sizes] for one in gains])
    found: dict[str, Any] = {
        "base": float(base[:pool].mean()),
        "batches": len(gains),
        "mean": float(every.mean()),
        "mean_interval": bootstrap(np.mean, every, rng),
        "improving": improving(every),
        "improving_interval": bootstrap(improving, every, rng),
        "other": float(answers.other.mean()),
        "sizes": sizes,
        "best": best.mean(0).tolist(),
        "best_error": standard_error(best),
        "best_spread": [
            float(np.sqrt(np.mean([best_of(one, n)[1] for one in gains])))
            for n in sizes
        ],
        "null": [
            float(np.mean([best_of(deal, n)[0] for deals in nulls for deal in deals]))
            for n in sizes
        ],
        "enough": enough(best.mean(0), sizes),
        "q95": headroom(float(np.quantile(every, 0.95)), float(base[:pool].mean())),
        "own": float(np.sqrt(max(0.0, own))),
        "noise": float(np.sqrt(max(0.0, noise))),
    }
    if fresh is not None:
        honest = np.array(
            [
                [best_of(one, n, other)[0] for n in sizes]
                for one, other in zip(gains, fresh, strict=True)
            ]
        )
        found["fresh"] = honest.mean(0).tolist()
        found["fresh_error"] = standard_error(honest)
        found["fresh_mean"] = float(np.mean(fresh))
    return found


def standard_error(values: np.ndarray) -> list[float]:
    """Of the mean over the first axis; NaN for one."""
    if len(values) < 2:
        return [float("nan")] * values.shape[1]
    return (values.std(0, ddof=1) / np.sqrt(len(values))).tolist()


def markdown(config: ml_collections.ConfigDict, found: list[dict[str, Any]]) -> str:
    """All results, in percent."""
    probe = config.probe
    heads = [
        "model",
        "sigma",
        "reward %",
        "other answers %",
        "mean gain",
        "p(gain > 0) %",
        f"best of {picked(found[0])}",
        "of the null",
        "on fresh prompts",
        "mean on these",
        "sd own",
        "sd noise",
        "N_90",
        "q95 of headroom %",
    ]
    lines = [
        f"Task `{config.task}`: {probe.candidates} candidates x {probe.batches} "
        f"batches, {probe.pool} prompts. Gains in percentage points, ± one standard "
        "error over batches, [95 %] over candidates. The sham is the model sampling, "
        "and its gains are from its own mean.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for one in found:
        at = one["sizes"].index(picked(one))
        low, high = one["improving_interval"]
        fresh = mean = "-"
        if "fresh" in one:
            fresh = plus_minus(one["fresh"][at], one["fresh_error"][at])
            mean = f"{100 * one['fresh_mean']:.2f}"
        cells = [
            one["model"],
            one["sigma"] if one["sigma"] == SHAM else f"{one['sigma']:g}",
            f"{100 * one['base']:.1f}",
            f"{100 * one['other']:.1f}",
            f"{100 * one['mean']:.2f}",
            f"{100 * one['improving']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            plus_minus(one["best"][at], one["best_error"][at]),
            f"{100 * one['null'][at]:.2f}",
            fresh,
            mean,
            f"{100 * one['own']:.2f}",
            f"{100 * one['noise']:.2f}",
            str(one["enough"] or "-"),
            f"{100 * one['q95']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picked(one: Mapping[str, Any]) -> int:
    """N of the table."""
    return PICK if PICK in one["sizes"] else one["sizes"][-1]


def plus_minus(value: float, error: float) -> str:
    """In percentage points, with the error where there is one."""
    text = f"{100 * value:.2f}"
    return text if np.isnan(error) else f"{text} ± {100 * error:.2f}"


def figure(found: Sequence[dict[str, Any]], task: str) -> Figure:
    """Best of N, where it saturates, and how many perturbations improve."""
    made = Figure(figsize=(13, 7.6), layout="constrained")
    best, relative, share, mean, honest, change = made.subplots(2, 3).ravel()
    models = list(dict.fromkeys(one["model"] for one in found))
    labels = {name: Path(name).name for name in models}
    for number, model in enumerate(models):
        color = f"C{number}"
        rows = [one for one in found if one["model"] == model and one["sigma"] != SHAM]
        for one, style in zip(rows, ("-", "--", ":", "-.") * len(rows), strict=False):
            # Colours are those of the other panels.
            known = {} if number else {"label": f"sigma {one['sigma']:g}"}
            points = 100 * np.array(one["best"])
            best.errorbar(
                one["sizes"],
                points,
                196 * np.array(one["best_error"]),
                color=color,
                linestyle=style,
                capsize=2,
                **known,
            )
            if points[-1] > 0:
                relative.plot(
                    one["sizes"], points / points[-1], color=color, linestyle=style
                )
        sigmas = [one["sigma"] for one in rows]
        intervals(share, sigmas, rows, "improving", color=color, label=labels[model])
        intervals(mean, sigmas, rows, "mean", color=color, label=labels[model])
        pick = [one["sizes"].index(picked(one)) for one in rows]
        for key, style in (("best", "o-"), ("null", "x:"), ("fresh", "s--")):
            if key in rows[0]:
                values = [
                    100 * one[key][at] for one, at in zip(rows, pick, strict=True)
                ]
                names = {
                    "best": "on the pool",
                    "null": "null",
                    "fresh": "on fresh prompts",
                }
                known = {"label": names[key]} if number == 0 else {}
                honest.plot(sigmas, values, style, color=color, **known)
        change.plot(
            [100 * one["other"] for one in rows],
            [100 * one["improving"] for one in rows],
            "o-",
            color=color,
            label=labels[model],
        )
    sizes = found[0]["sizes"]
    chance = np.array([gaussian_best(n) for n in sizes])
    relative.plot(
        sizes,
        chance / chance[-1],
        color="0.5",
        linewidth=4,
        alpha=0.4,
        label="any Gaussian",
    )
    relative.axhline(0.9, color="0.7", linewidth=0.8)
    tidy(best, f"best of N on the pool, {task}", "N", "gain, points; bars 1.96 SE")
    bottom, top = best.get_ylim()
    best.set_ylim(bottom, top + 0.15 * (top - bottom))  # for the legend
    best.legend(frameon=False, fontsize="x-small", loc="upper center", ncols=2)
    tidy(relative, "the same, relative to the largest N", "N", "share")
    tidy(share, "perturbations that improve; bars 95 %", "sigma", "%")
    tidy(mean, "mean gain; bars 95 %", "sigma", "points")
    tidy(honest, f"best of {picked(found[0])}", "sigma", "gain, points")
    tidy(
        change,
        "improving, at equal change of answers",
        "other answers, %",
        "improving, %",
    )
    for axes in (share, mean, honest, change):
        axes.set_xscale("log")
    for axes in (mean, honest, best):
        axes.axhline(0, color="0.7", linewidth=0.8)
    return made


def intervals(
    axes: Axes, at: Sequence[float], rows: Sequence[dict[str, Any]], key: str, **kw: Any
) -> None:
    """A line of percentages with their intervals."""
    middle = 100 * np.array([one[key] for one in rows])
    ends = 100 * np.array([one[f"{key}_interval"] for one in rows]).T
    errors = np.abs(ends - middle)
    axes.errorbar(at, middle, errors, marker="o", capsize=3, **kw)


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles, and no more ink than needed."""
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="x-small")
