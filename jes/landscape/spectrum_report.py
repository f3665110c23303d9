"""Tables and figures of `jes.landscape.spectrum`, from what it has measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.io.console import console
from jes.io.metrics import write_json
from jes.landscape.curvature import cheap_index, second_differences
from jes.landscape.lanczos import Quadrature, density
from jes.landscape.measures import Measures, measure, measure_quadrature
from jes.landscape.pairs import OBJECTIVES
from jes.landscape.smoothed import Directions, along, held_out, spectrum
from jes.landscape.subspaces import overlap

HALVES = 5
"""Eigenvectors of a half of the pairs that the other half looks along."""
NOTES = """\
Curvature is that of a loss (minus the reward, minus the log-likelihood). d_eff is
(tr H)² / tr H² with signs, PR the participation ratio (Σ|λ|)² / Σλ², rank the effective
rank exp(-Σ p log p) with p = |λ| / Σ|λ|, negative the share of |λ| below 0 and, after
the stroke, of the eigenvalues. Brackets are 95 % intervals over directions, for these
prompts and this centre; ± standard errors over probes, of what is shuffled the
deviation over shuffles. Of rewards that are steps the trace is the difference of J at
the centre and J around it: a prompt or two at their threshold can make it.

Rows "pairs as an operator" are spectra of a sum of as many outer products as there are
pairs. In many dimensions their shape is that of the second differences, whatever the
landscape: with the second differences dealt out to other pairs it is the same. With
the rewards dealt out to other members, gradient is taken for curvature, too.
"""


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    directions: Directions,
    config: ml_collections.ConfigDict,
    vectors: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All that is said of a model, in plain numbers.

    Args:
      name: of the model.
      rows: of its results.jsonl.
      directions: of its perturbations, with coordinates along the top subspace and
        then along as many random vectors.
      config: all settings.
      vectors: more to find in both subspaces: `what`, the `square` of its length, and
        its coordinates, `top` and `random`.
    """
    parts = [row for row in rows if row["kind"] == "quadrature"]
    quadrature = Quadrature(
        *(np.array([row[part] for row in parts]) for part in ("nodes", "weights"))
    )
    first = parts[0]
    whole, errors = measure_quadrature(quadrature)
    shapes = {"SLQ of the surrogate": shape(whole, errors)}
    for row in rows:
        if row["kind"] == "dense":
            shapes["whole Hessian of the surrogate"] = shape(measure(row["values"]))
    seen = [
        (sigma, objective, *members_of(rows, sigma, objective))
        for sigma in config.curvature.sigmas
        for objective in OBJECTIVES
    ]
    indices, operators, curvatures, overlaps = {}, {}, [], []
    drawn = shares(directions, np.arange(len(directions.products)))
    overlaps.append({"what": "all perturbations", **drawn})
    for sigma, objective, values, centre in seen:
        label = f"{objective}, sigma {sigma:g}"
        differences = second_differences(values, centre)
        indices[f"pairs, {label}"] = cheap_index(differences, sigma)._asdict()
        weights = -differences.mean(1) / sigma**2
        means = values.mean(1)
        controls = {
            "rewards": shuffled(means, centre.mean(), sigma, config),
            "pairs": shuffled_pairs(weights, config),
        }
        operators[label] = operator(directions, weights, controls)
        curvatures.append(
            {"sigma": sigma, "objective": objective}
            | curvature_along(directions, weights, np.array(first["values"]))
        )
        overlaps += improving(directions, means, label, config.curvature.extreme)
    overlaps += [single(vector, directions.size) for vector in vectors]
    exact = [row["values"] for row in rows if row["kind"] == "exact"]
    return {
        "model": name,
        "parameters": directions.size,
        "examples": config.curvature.examples,
        "shapes": shapes,
        "indices": indices,
        "operators": operators,
        "curvatures": curvatures,
        "overlaps": overlaps,
        "top": {key: first[key] for key in ("values", "residuals")},
        "exact": exact[0] if exact else None,
        "quadrature": {k: v.tolist() for k, v in quadrature._asdict().items()},
    }


def members_of(
    rows: Sequence[Mapping[str, Any]], sigma: float, objective: str
) -> tuple[np.ndarray, np.ndarray]:
    """What members got, [2n, P] in their order, and the centre, [P]."""
    (centre,) = (row[objective][0] for row in rows if row["kind"] == "centre")
    chunks = [r for r in rows if r["kind"] == "members" and r["sigma"] == sigma]
    chunks.sort(key=lambda row: row["first"])
    return np.concatenate([row[objective] for row in chunks]), np.array(centre)


def shape(found: Measures, errors: Measures | None = None) -> dict[str, Any]:
    """Measures, and with them `<name>_error`."""
    more = {} if errors is None else errors._asdict()
    return found._asdict() | {f"{key}_error": value for key, value in more.items()}


def shuffled(
    values: np.ndarray, centre: float, sigma: float, config: ml_collections.ConfigDict
) -> list[np.ndarray]:
    """Weights of pairs whose rewards are dealt out at random, [n] for each control."""
    rng = np.random.default_rng(config.seed)
    dealt = [rng.permutation(values) for _ in range(config.curvature.shuffles)]
    return [-second_differences(one, np.array(centre)) / sigma**2 for one in dealt]


def shuffled_pairs(
    weights: np.ndarray, config: ml_collections.ConfigDict
) -> list[np.ndarray]:
    """The weights of other pairs, [n] for each control."""
    rng = np.random.default_rng(config.seed)
    return [rng.permutation(weights) for _ in range(config.curvature.shuffles)]


def operator(
    directions: Directions,
    weights: np.ndarray,
    controls: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, Any]:
    """Spectra of the sample operator: as measured, and of each kind of control."""
    own = spectrum(directions, weights)
    found = {"measured": shape(own.measures()), "eigenvalues": own.eigenvalues.tolist()}
    for name, drawn in controls.items():
        others = [spectrum(directions, one) for one in drawn]
        measures = np.array([one.measures() for one in others])
        mean, spread = measures.mean(0), measures.std(0, ddof=1)
        values = np.array([one.eigenvalues for one in others])
        found[name] = shape(Measures(*mean), Measures(*spread)) | {
            "lowest": values.min(0).tolist(),
            "highest": values.max(0).tolist(),
        }
    return found


def curvature_along(
    directions: Directions, weights: np.ndarray, top: np.ndarray
) -> dict[str, Any]:
    """What pairs say of directions that they have not chosen.

    These are of the other half of the pairs, and the surrogate's eigenvectors, those
    of positive and of negative eigenvalues `top` [k] apart.
    """
    found = held_out(directions, weights, HALVES)._asdict()
    for name, chosen in (("positive", top > 0), ("negative", top < 0)):
        own = directions.coordinates[:, : len(top)][:, chosen]
        if chosen.any():
            found[name] = along(own, weights)._asdict()
    return found


def improving(
    directions: Directions, values: np.ndarray, label: str, share: float
) -> list[dict[str, Any]]:
    """Overlaps of the best and the worst members, and of the ES update.

    Args:
      directions: n of them.
      values: of the members, [2n].
      label: of the objective.
      share: of the members that are best, or worst.
    """
    count = max(1, round(share * len(values)))
    order = np.argsort(values, kind="stable")
    fitness = (values - values.mean()) / (values.std() + 1e-8)
    update = fitness[0::2] - fitness[1::2]
    coordinates = update @ directions.coordinates
    square = update @ directions.products @ update
    return [
        {"what": f"best {100 * share:g} %, {label}"}
        | shares(directions, np.unique(order[-count:] // 2)),
        {"what": f"worst {100 * share:g} %, {label}"}
        | shares(directions, np.unique(order[:count] // 2)),
        {"what": f"ES update, {label}"} | both(coordinates, square, directions.size),
    ]


def shares(directions: Directions, chosen: np.ndarray) -> dict[str, Any]:
    """Pooled overlaps of some directions with the top and with a random subspace."""
    squares = np.diag(directions.products)[chosen]
    return both(directions.coordinates[chosen], squares, directions.size)


def both(coordinates: np.ndarray, squares: Any, size: int) -> dict[str, Any]:
    """Overlaps where the first half of the coordinates is the top, the rest random."""
    top, random = np.split(np.atleast_2d(coordinates), 2, axis=1)
    return {
        "vectors": len(top),
        "top": overlap(top, squares, size)._asdict(),
        "random": overlap(random, squares, size)._asdict(),
    }


def single(vector: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Overlaps of one vector."""
    coordinates = np.concatenate([vector["top"], vector["random"]])
    return {"what": vector["what"], **both(coordinates, vector["square"], size)}


def write_report(
    out: Path, reports: Sequence[dict[str, Any]], config: ml_collections.ConfigDict
) -> None:
    """Writes spectrum.json, spectrum.md and the figures.

    Args:
      out: folder, which exists.
      reports: from `report`, a model each.
      config: all settings.
    """
    text = f"Task `{config.task}`, {config.curvature.examples} training examples.\n\n"
    text += NOTES + "".join(map(markdown, reports))
    (out / "spectrum.md").write_text(text)
    write_json(out / "spectrum.json", {"models": list(reports)})
    for number, one in enumerate(reports):
        figure(one).savefig(out / f"spectrum-{number}.png", dpi=120)
    dimensions(reports).savefig(out / "dimensions.png", dpi=120)
    console.print(text)
    console.print(f"tables and figures in {out}")


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of one model."""
    title = f"\n### {found['model']}, {found['parameters']:,} weights\n"
    return title + "".join(
        [shape_table(found), top_table(found), along_table(found), overlap_table(found)]
    )


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table behind an empty line."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shape_table(found: Mapping[str, Any]) -> str:
    """Estimates of the shape of the spectrum, side by side."""
    lines = []
    for name, one in found["indices"].items():
        ranges = [
            f"{g(one[k])} [{g(one[f'{k}_low'])}, {g(one[f'{k}_high'])}]"
            for k in ("trace", "dimension")
        ]
        lines.append([name, ranges[0], g(one["square"]), ranges[1], *"----"])
    named = dict(found["shapes"])
    for label, one in found["operators"].items():
        named[f"pairs as an operator, {label}"] = one["measured"]
        named["the same, pairs shuffled"] = one["pairs"]
        named["the same, rewards shuffled"] = one["rewards"]
        lines += [shape_line(*pair) for pair in named.items()]
        named = {}
    heads = ["estimate", "tr H", "tr H²", "d_eff", "PR", "rank"]
    return table([*heads, "negative", "highest λ"], lines)


def shape_line(name: str, one: Mapping[str, Any]) -> list[str]:
    """A row of the table, of `shape`."""

    def cell(key: str, times: float = 1) -> str:
        error = one.get(f"{key}_error", np.nan)
        text = g(times * one[key])
        return f"{text} ± {times * error:.2g}" if np.isfinite(error) else text

    negative = f"{cell('negative_mass', 100)} % / {cell('negative_count', 100)} %"
    keys = ("trace", "square", "dimension", "participation", "rank")
    return [name, *map(cell, keys), negative, cell("largest")]


def top_table(found: Mapping[str, Any]) -> str:
    """The top of the surrogate's spectrum, by two methods."""
    values, residuals = found["top"]["values"], found["top"]["residuals"]
    exact = found["exact"] or []
    lines = [
        [f"{i + 1}", g(value), f"{residual:.2g}", g(exact[i]) if i < len(exact) else ""]
        for i, (value, residual) in enumerate(zip(values, residuals, strict=True))
    ]
    return table(["surrogate, number", "λ by Lanczos", "residual", "by ARPACK"], lines)


def along_table(found: Mapping[str, Any]) -> str:
    """Curvature along chosen directions, by pairs that had no part in the choice."""
    top = np.array(found["top"]["values"])
    heads = ["curvature", f"top {HALVES} of half the pairs", "the same, by the others"]
    signs = {"positive": top[top > 0], "negative": top[top < 0]}
    signs = {name: values for name, values in signs.items() if len(values)}
    lines = []
    for row in found["curvatures"]:
        cells = [f"{row['objective']}, sigma {row['sigma']:g}", g(row["within"])]
        cells.append(f"{g(row['beyond'])} ± {row['error']:.2g}")
        for name in signs:
            cells.append(f"{g(row[name]['curvature'])} ± {row[name]['error']:.2g}")
        lines.append(cells)
    for name, values in signs.items():
        mean = g(float(values.mean()))
        heads.append(f"along the surrogate's {len(values)} {name} (mean λ {mean})")
    return table(heads, lines)


def overlap_table(found: Mapping[str, Any]) -> str:
    """Shares in the top subspace and in a random one, in units of what chance gives."""
    lines = []
    for row in found["overlaps"]:
        top, random = row["top"], row["random"]
        part = top["expected"]
        lines.append(
            [
                row["what"],
                str(row["vectors"]),
                g(top["share"] / part),
                f"{g(top['low'] / part)} to {g(top['high'] / part)}",
                f"{top['p_value']:.2g}",
                g(random["share"] / part),
            ]
        )
    top = len(found["top"]["values"])
    share = f"share in the top {top}, over {top}/D = {part:.2g}"
    return table(
        ["perturbations", "number", share, "95 % of chance", "p", "in a random one"],
        lines,
    )


def g(value: float | None) -> str:
    """A number in three or four digits; a dash where it is undefined."""
    if value is None or np.isnan(value):
        return "-"
    if not np.isfinite(value):
        return "∞"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def figure(found: Mapping[str, Any]) -> Figure:
    """Of one model: the surrogate's spectrum, the pairs' operator, the overlaps."""
    rows = found["overlaps"]
    made = Figure(figsize=(15, 2.5 + 0.22 * len(rows)), layout="constrained")
    surrogate, pairs, overlaps = made.subplots(1, 3, width_ratios=[1, 1, 1.1])
    draw_density(surrogate, found)
    draw_operator(pairs, found)
    draw_overlaps(overlaps, rows)
    for axes in (surrogate, pairs, overlaps):
        axes.spines[["top", "right"]].set_visible(False)
    made.suptitle(f"{found['model']}, {found['parameters']:,} weights")
    return made


def draw_density(axes: Axes, found: Mapping[str, Any]) -> None:
    """Density by quadrature, and where the top eigenvalues are."""
    quadrature = Quadrature(*map(np.array, found["quadrature"].values()))
    low, high = quadrature.nodes.min(), quadrature.nodes.max()
    width = (high - low) / 150
    grid = np.linspace(low - 5 * width, high + 5 * width, 1500)
    shares = density(quadrature, grid, width)
    axes.semilogy(grid, shares, label="SLQ")
    floor = 1 / (10 * found["parameters"] * width)  # a tenth of one eigenvalue
    axes.set_ylim(floor, 3 * shares.max())
    top = np.array(found["top"]["values"])
    axes.plot(top, np.full(len(top), 2 * floor), "|", ms=12, label="top, by Lanczos")
    if found["exact"]:
        exact = np.array(found["exact"])
        axes.plot(exact, np.full(len(exact), 5 * floor), "x", label="ARPACK")
    axes.set(xlabel="λ", ylabel="share of the eigenvalues a unit of λ")
    axes.set_title("Hessian of the surrogate", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


def draw_operator(axes: Axes, found: Mapping[str, Any]) -> None:
    """Eigenvalues of the reward's operator by rank, in the band of the controls."""
    named = {k: v for k, v in found["operators"].items() if k.startswith("reward")}
    for number, (label, one) in enumerate(named.items()):
        color = f"C{number}"
        values = np.array(one["eigenvalues"])
        scale = np.abs(values).max() or 1.0
        at = np.arange(len(values))
        low, high = (
            np.array(one["rewards"][end]) / scale for end in ("lowest", "highest")
        )
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        middle = np.add(one["pairs"]["lowest"], one["pairs"]["highest"]) / (2 * scale)
        axes.plot(at, middle, ":", color="k", linewidth=1)
        axes.plot(at, values / scale, color=color, label=label.partition(", ")[2])
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.set(xlabel="rank", ylabel="λ over the largest |λ|")
    axes.set_title(
        "reward, pairs as an operator; shuffled: pairs (dots), rewards (bands)",
        fontsize="medium",
    )
    axes.legend(frameon=False, fontsize="small")


def draw_overlaps(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shares in the top subspace over k/D, with what chance gives."""
    at = np.arange(len(rows))
    part = np.array([row["top"]["expected"] for row in rows])
    limits = [np.array([r["top"][end] for r in rows]) / part for end in ("low", "high")]
    axes.barh(at, limits[1] - limits[0], left=limits[0], color="0.85", label="chance")
    for name, mark in (("top", "o"), ("random", "x")):
        share = np.array([row[name]["share"] for row in rows]) / part
        axes.plot(share, at, mark, label=f"in the {name} subspace")
    axes.set_yticks(at, [row["what"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set(xlabel="share of the squared norm, over k/D")
    axes.set_title("overlap with the surrogate's top subspace", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


def dimensions(reports: Sequence[Mapping[str, Any]]) -> Figure:
    """The effective dimension by every estimate, and of every model."""
    names = list(
        dict.fromkeys(n for one in reports for n in [*one["indices"], *one["shapes"]])
    )
    made = Figure(figsize=(9, 1.5 + 0.35 * len(names)), layout="constrained")
    axes = made.subplots()
    for number, one in enumerate(reports):
        shift = 0.12 * (number - (len(reports) - 1) / 2)
        dots = [
            (i + shift, *dimension_of(one, name))
            for i, name in enumerate(names)
            if name in one["indices"] or name in one["shapes"]
        ]
        at, value, low, high = np.array(dots).T
        shown = np.isfinite(value) & (value > 0)
        at, value, low, high = (part[shown] for part in (at, value, low, high))
        high = np.where(np.isfinite(high), high, value)
        error = np.array([value - low, high - value]).clip(0)
        label = f"{one['model']}, {one['parameters']:,} weights"
        axes.errorbar(value, at, xerr=error, fmt="o", capsize=2, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set(xlabel="(tr H)² / tr H²; what is not finite is not drawn")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return made


def dimension_of(found: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """The effective dimension, and the two ends of its interval, if there is one."""
    if name in found["indices"]:
        one = found["indices"][name]
        return one["dimension"], one["dimension_low"], one["dimension_high"]
    one = found["shapes"][name]
    value, error = one["dimension"], one.get("dimension_error", 0.0)
    error = 1.96 * error if np.isfinite(error) else 0.0
    return value, value - error, value + error
