"""Tables and the figure of `jes.metacognition.sparsity`, from its rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jes.io.console import console
from jes.io.metrics import finite, write_json
from jes.metacognition.signal_detection import bootstrap, counts, d_prime

Rows = dict[tuple[str, float], dict[str, Any]]
"""(part, share) -> a row of results.jsonl."""

TO_BEAT = ("random of equal norm", "shrunk")
"""What a claim of sparsity is measured by."""
COLUMNS = {
    "alignment": "alignment %",
    "accuracy": "accuracy %",
    "yes_rate": "yes %",
}


def write_report(
    out: Path,
    rows: Sequence[dict[str, Any]],
    models: Sequence[tuple[str, float]],
    settings: dict[str, Any],
) -> None:
    """Writes results.json, results.md and sparsity.png.

    Args:
      out: folder, which exists.
      rows: of results.jsonl.
      models: the parts and shares among them to report, with the top at 0 and 1.
      settings: what the rows depend on.
    """
    found = {(row["part"], row["share"]): row for row in rows}
    order = list(dict.fromkeys(part for part, _ in models))
    table: Rows = {
        model: found[model]
        for model in sorted(models, key=lambda model: (order.index(model[0]), model[1]))
    }
    compared = comparisons(table)
    text = markdown(table, settings) + verdict(compared, settings)
    (out / "results.md").write_text(text)
    numbers = [
        {key: value for key, value in row.items() if not key.endswith("_bits")}
        for row in table.values()
    ]
    report = {"settings": settings, "rows": numbers, "comparisons": compared}
    write_json(out / "results.json", report)
    figure(table).savefig(out / "sparsity.png", dpi=120)
    console.print(text)
    console.print(f"tables and figure in {out}")


def curve(table: Rows, part: str) -> list[dict[str, Any]]:
    """The rows of a part by share; its ends may be models asked as the top's."""
    rows = [row for (name, _), row in table.items() if name == part]
    for share in (0.0, 1.0):
        if (part, share) not in table:
            equal = table["top", 1 - share if part == "top removed" else share]
            rows.append({**equal, "share": share})
    return sorted(rows, key=lambda row: row["share"])


def comparisons(table: Rows) -> list[dict[str, Any]]:
    """For each share between 0 and 1, how far the top is ahead of what it must beat.

    Returns:
      Rows with `share`, `d_prime`, `gain` (d' from the base on, over that of the run;
      None where the run gained nothing) and for each control the difference of d', its
      paired 95 % interval over questions, and whether this is above 0.
    """
    start, end = (table["top", share]["d_prime"] for share in (0.0, 1.0))
    shares = [share for part, share in table if part == "top" and 0 < share < 1]
    compared = []
    for share in shares:
        top = table["top", share]
        row = {"share": share, "d_prime": top["d_prime"], "gain": None}
        known = None not in (start, end, top["d_prime"])
        if known and end > start:
            row["gain"] = (top["d_prime"] - start) / (end - start)
        for name in TO_BEAT:
            row[name] = difference(top, table[name, share])
        compared.append(row)
    return compared


def difference(top: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """d' of two models on the same questions: the difference, and its interval."""
    answers = [
        np.array(list(row[key])) == "1"
        for row in (top, control)
        for key in ("correct_bits", "yes_bits")
    ]

    def ahead(a: Any, b: Any, c: Any, d: Any) -> Any:
        return d_prime(counts(a, b)) - d_prime(counts(c, d))

    low, high = bootstrap(ahead, *answers)
    value = float(ahead(*answers))
    found = {"difference": value, "low": low, "high": high, "beaten": low > 0}
    return finite(found)


def markdown(table: Rows, settings: dict[str, Any]) -> str:
    """All rows: shares in percent, d' with its interval over questions."""
    heads = ["part", "share %", "norm² %", "d' [95 %]", *COLUMNS.values()]
    lines = [
        f"Task `{settings['task']}`, {settings['examples']} held-out questions; "
        "norm² is the share of the squared norm of the run's displacement; d' is "
        "log-linear, its interval is over questions.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for (part, share), row in table.items():
        interval = cell(row, "d_prime_low"), cell(row, "d_prime_high")
        cells = [
            part,
            f"{100 * share:g}",
            f"{100 * row['norm_share']:.1f}",
            f"{cell(row, 'd_prime')} [{interval[0]}, {interval[1]}]",
            *(cell(row, key, 100, ".1f") for key in COLUMNS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(compared: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Whether the top share is better than its two controls, share by share."""
    heads = ["top %", "d'", "of the run's gain %"]
    heads += [f"ahead of {name} [95 %], beats it" for name in TO_BEAT]
    lines = ["", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    sparse = []
    for row in compared:
        cells = [f"{100 * row['share']:g}", cell(row, "d_prime")]
        cells.append(cell(row, "gain", 100, ".0f"))
        for name in TO_BEAT:
            one = row[name]
            numbers = [cell(one, key) for key in ("difference", "low", "high")]
            said = "yes" if one["beaten"] else "no"
            cells.append(f"{numbers[0]} [{numbers[1]}, {numbers[2]}], {said}")
        lines.append(f"| {' | '.join(cells)} |")
        if all(row[name]["beaten"] for name in TO_BEAT):
            sparse.append(f"{100 * row['share']:g} %")
    where = f"at {', '.join(sparse)}" if sparse else "at no share"
    lines += [
        "",
        f"The top entries beat both random entries of equal norm and the shrunk "
        f"displacement {where}, by the paired bootstrap over questions, for the one "
        f"draw with seed {settings['seed']}; no correction for the number of shares.",
    ]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any], key: str, times: float = 1, form: str = ".2f") -> str:
    """A number, or a dash where it is undefined."""
    value = row[key]
    return "-" if value is None else f"{times * value:{form}}"


def figure(table: Rows) -> Figure:
    """d' by share and by norm, alignment, and accuracy (solid) with yes (dashed)."""
    made = Figure(figsize=(13, 9), layout="constrained")
    by_share, by_norm, alignment, rates = made.subplots(2, 2).ravel()
    for number, part in enumerate(dict.fromkeys(part for part, _ in table)):
        rows = curve(table, part)
        style = {"color": f"C{number}", "marker": "o", "markersize": 3}
        line(by_share, rows, "share", "d_prime", label=part, **style)
        if part == "top":
            limits = [numbers(rows, f"d_prime_{end}") for end in ("low", "high")]
            at = numbers(rows, "share")
            by_share.fill_between(at, *limits, color="C0", alpha=0.15, linewidth=0)
        near = sorted(rows, key=lambda row: row["norm_share"])
        line(by_norm, near, "norm_share", "d_prime", **style)
        line(alignment, rows, "share", "alignment", **style)
        line(rates, rows, "share", "accuracy", **style)
        line(rates, rows, "share", "yes_rate", linestyle="--", **style)
    for axes in (by_share, alignment, rates):
        axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel="share of the entries, %", xlim=(0, 110))
    by_norm.set(xlabel="share of the squared norm, %")
    titles = {
        "d' by entries; band: 95 % over questions": by_share,
        "d' by norm": by_norm,
        "alignment, %": alignment,
        "accuracy (solid) and yes (dashed), %": rates,
    }
    for title, axes in titles.items():
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = by_share.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside right upper", frameon=False)
    return made


def line(axes: Axes, rows: Sequence[dict[str, Any]], x: str, y: str, **kw: Any) -> None:
    """One part's course; everything but d' in percent."""
    axes.plot(numbers(rows, x), numbers(rows, y), **kw)


def numbers(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """A column, NaN where it is undefined; in percent but for d'."""
    values = np.array([row[key] for row in rows], float)
    return values if key.startswith("d_prime") else 100 * values
