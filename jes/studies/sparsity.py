"""Whether few weights hold what a run learned: parts of its displacement, evaluated.

    python -m jes.studies.sparsity --run=FOLDER --out=FOLDER [--task=tiny/knows] \
        [--other=FOLDER] [--walk=FOLDER] [--shares=0,1,2,5,10,20,30,50,70,100]

The base model plus a part of the run's displacement answers the held-out questions of
the task (2602.02605). The parts are the top r % of the entries by magnitude, what is
left without these, and for each r the controls:

    random                as many entries, drawn uniformly
    random of equal norm  these, scaled to the norm of the top r %
    random by tensor      as many entries of each tensor and layer as the top r % has
    shrunk                all entries, scaled to the norm of the top r %
    other run's mask      the entries that are the top r % of the run --other, which
                          has the same base and another seed
    top of a Gaussian     the top r % of a Gaussian of the norm of the displacement
    top of a shuffled run the top r % of the run --walk, which has the same base and
                          `shuffle_fitness`, scaled to that norm

A claim of sparsity needs the top r % to beat random entries of equal norm and the
shrunk displacement. Each control is one draw: another --seed, in another folder, shows
the spread over draws.

FOLDER has settings.json, results.jsonl (a row a model, with its answers), results.json,
and results.md and sparsity.png drawn from it. Interrupted, the same command continues;
it may be repeated with more shares or runs.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jes.config import DTYPES
from jes.core.ledger import append_row
from jes.core.noise import PyTree
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.evaluate import load_model
from jes.experiment import make_evaluation
from jes.export import load_base, read_ledger
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.metrics import finite, keep_rows, read_rows, write_json
from jes.metacognition import masks
from jes.metacognition.masks import keep_largest, norm_of, norm_share
from jes.metacognition.signal_detection import bootstrap, counts, d_prime
from jes.models.weights import Pretrained, fingerprint, load
from jes.questions import prepare
from jes.run_folder import alone, claim_results, recorded
from jes.studies import grid
from jes.studies.knowing import Answers, collect
from jes.tasks import load_task

Part = Callable[[float], PyTree]
"""From a share to what is added to the base model."""
Row = dict[str, Any]
Table = dict[tuple[str, float], Row]
"""(part, share) -> a row of results."""

SHARES = "0,1,2,5,10,20,30,50,70,100"
WALKS = ("top of a Gaussian", "top of a shuffled run")
"""Parts of other displacements than the run's."""
TO_BEAT = ("random of equal norm", "shrunk")
"""Controls of a claim of sparsity."""


def parts_of(
    delta: PyTree, seed: int, other: PyTree | None = None, walk: PyTree | None = None
) -> dict[str, Part]:
    """The parts by name.

    Args:
      delta: displacement of the run.
      seed: of random masks and of the Gaussian.
      other, walk: displacements of the two other runs.
    """
    gauss = masks.random_walk(delta, seed)

    def equal_norm(share: float) -> PyTree:
        goal = norm_of(keep_largest(delta, share))
        return masks.rescale(masks.keep_random(delta, share, seed), goal)

    def shrunk(share: float) -> PyTree:
        return masks.shrink(delta, norm_share(keep_largest(delta, share), delta))

    parts: dict[str, Part] = {
        "top": partial(keep_largest, delta),
        "top removed": partial(masks.keep_smallest, delta),
        "random": partial(masks.keep_random, delta, seed=seed),
        "random of equal norm": equal_norm,
        "random by tensor": partial(masks.keep_random_by_tensor, delta, seed=seed),
        "shrunk": shrunk,
        "top of a Gaussian": partial(keep_largest, gauss),
    }
    if other is not None:
        parts["other run's mask"] = partial(masks.keep_like, delta, other)
    if walk is not None:
        scaled = masks.rescale(walk, norm_of(delta))
        parts["top of a shuffled run"] = partial(keep_largest, scaled)
    return parts


def plan(parts: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float]]:
    """The models: share 0 is the base in every part, share 1 mostly the run."""
    inner = [share for share in shares if 0 < share < 1]
    models = [("top", 0.0), ("top", 1.0)]
    models += [(part, share) for share in inner for part in parts]
    return models + [(part, 1.0) for part in parts if part in WALKS]


def moved(base: PyTree, part: PyTree) -> PyTree:
    """θ_0 + part, float32; where the part is None, θ_0."""

    def add(step: Any, start: jax.Array) -> jax.Array:
        return start if step is None else start + jnp.asarray(step)

    return jax.tree.map(add, part, base, is_leaf=lambda node: node is None)


def displacement(tuned: PyTree, base: PyTree, prefixes: Sequence[str]) -> PyTree:
    """θ - θ_0, float32 on the host, None where it is excluded.

    Raises:
      InputError: if it is 0 or not finite, or a prefix excludes nothing.
    """
    delta = jax.tree.map(lambda end, start: np.asarray(end - start), tuned, base)
    try:
        delta = masks.exclude(delta, prefixes)
    except ValueError as error:
        raise InputError(f"--exclude: {error}") from error
    norm = norm_of(delta)
    if not np.isfinite(norm):
        raise InputError("the run's weights are not finite")
    if not norm:
        raise InputError("the run's weights are those of its base model")
    return delta


def load_run(folder: Path) -> tuple[Pretrained, Pretrained, Row, str]:
    """A run's base model, its newest model, its settings, and its dtype.

    Raises:
      InputError: for a folder that is no run, or a quantised one; or if the model was
        saved in less precision than its base: the displacement would be rounding.
    """
    evolved = (folder / "ledger.jsonl").is_file()
    ran = evolved or (folder / "metrics.jsonl").is_file()
    record = recorded(folder) if ran else None
    if record is None:
        raise InputError(f"{folder} is not a run folder: give that of a run of jes")
    config = record["config"]
    base = load_base(read_ledger(folder)) if evolved else load(config["model"])
    if config.get("quantize") or is_quantized(base.params):
        raise InputError(
            f"{folder} is a run of a quantised model: its displacement is in whole "
            "codes, most of them one step, and has no largest share"
        )
    tuned, dtype = load_model(str(folder))
    if not evolved and dtype not in ("float32", base.stored_dtype):
        raise InputError(
            f"{folder} saved its model as {dtype} and its base is "
            f"{base.stored_dtype}: much of the difference would be rounding"
        )
    return base, tuned, config, dtype


def load_more(
    folder: Path, base: PyTree, prefixes: Sequence[str], *, shuffled: bool
) -> tuple[PyTree, str]:
    """Displacement and fingerprint of another run from the same base model.

    Raises:
      InputError: for another base; or if it is to have `shuffle_fitness`, and has not.
    """
    start, tuned, config, _ = load_run(folder)
    if fingerprint(start.params) != fingerprint(base):
        raise InputError(f"{folder} starts from another base model")
    if shuffled and not config.get("shuffle_fitness"):
        raise InputError(f"--walk: {folder} is not a run with shuffle_fitness")
    return displacement(tuned.params, base, prefixes), fingerprint(tuned.params)


def row_of(answers: Answers) -> Row:
    """Metrics with a 95 % interval of d' over questions, and the answers as bits."""
    low, high = answers.d_prime_interval()
    metrics = {**answers.report(), "d_prime_low": low, "d_prime_high": high}
    bits = {"correct_bits": answers.correct, "yes_bits": answers.yes}
    return metrics | {k: "".join(map(str, v.astype(int))) for k, v in bits.items()}


def study(args: argparse.Namespace) -> None:
    """Evaluates the models without a row, and writes the report."""
    others = {name: getattr(args, name) for name in ("other", "walk")}
    others = {name: folder for name, folder in others.items() if folder is not None}
    for name, folder in others.items():
        if folder.resolve() == args.run.resolve():
            raise InputError(f"--{name} is the run itself: give another")
    base, tuned, config, dtype = load_run(args.run)
    # The run's seed draws the examples, so that held-out ones are new to it.
    task = load_task(
        args.task or config["task"],
        root=args.root or config["data"]["root"],
        seed=config["seed"],
        test_examples=args.examples,
    )
    evaluation = make_evaluation(base, task, dtype=args.dtype or dtype)
    delta = displacement(tuned.params, base.params, args.exclude)
    settings: Row = {"run": fingerprint(tuned.params), "task": task.name}
    settings |= {"examples": len(task.test), "dtype": str(evaluation.dtype)}
    settings |= {"seed": args.seed, "exclude": args.exclude}
    del tuned  # frees its memory
    more = {}
    for name, folder in others.items():
        more[name], settings[name] = load_more(
            folder, base.params, args.exclude, shuffled=name == "walk"
        )
    claim_results(args.out, settings)
    questions = prepare(evaluation, task.test)
    if not questions:
        raise InputError(f"task {task.name} has no held-out examples")
    parts = parts_of(delta, args.seed, **more)
    models = plan(list(parts), args.shares)

    def measure(part: PyTree) -> Row:
        weights = moved(base.params, part)
        answers = collect(evaluation, weights, questions, batch_size=args.batch_size)
        return {"norm_share": norm_share(part, delta)} | row_of(answers)

    path = args.out / "results.jsonl"
    measure_models(path, models, lambda name, share: measure(parts[name](share)))
    write_report(args.out, read_rows(path), models, settings)


def measure_models(
    path: Path,
    models: Sequence[tuple[str, float]],
    measure: Callable[[str, float], Row],
) -> None:
    """Appends the rows of the models that have none."""
    keep_rows(path, lambda row: True)  # drops a row that a kill cut short
    done = {(row["part"], row["share"]) for row in read_rows(path)}
    for number, (name, share) in enumerate(models, 1):
        if (name, share) not in done:
            row: Row = {"part": name, "share": share} | measure(name, share)
            append_row(path, finite(row))
            console.print(
                f"{number} of {len(models)}: {name} {100 * share:g} %, d' "
                f"{row['d_prime']:.2f}, accuracy {100 * row['accuracy']:.1f} %"
            )


def write_report(
    out: Path, rows: Sequence[Row], models: Sequence[tuple[str, float]], settings: Row
) -> None:
    """Writes results.json from rows of results.jsonl, and draws it."""
    found = {(row["part"], row["share"]): row for row in rows}
    order = list(dict.fromkeys(part for part, _ in models))
    models = sorted(models, key=lambda model: (order.index(model[0]), model[1]))
    table = {model: found[model] for model in models}
    shown = [
        {key: value for key, value in row.items() if not key.endswith("_bits")}
        for row in table.values()
    ]
    report = {"settings": settings, "rows": shown, "comparisons": comparisons(table)}
    write_json(out / "results.json", report)
    console.print(draw(out))
    console.print(f"tables and figure in {out}")


def comparisons(table: Table) -> list[Row]:
    """For each share between 0 and 1, how far the top is ahead of its controls.

    Returns:
      Rows with `share`, `d_prime`, `gain` (d' from the base on, over that of the run;
      None where the run gained nothing) and the `difference` to each control.
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
        compared.append(row | {n: difference(top, table[n, share]) for n in TO_BEAT})
    return compared


def difference(top: Row, control: Row) -> Row:
    """d' of two models on the same questions: the difference, its paired 95 % interval,
    and whether that is above 0."""
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


# Tables and figure.


def draw(out: Path) -> str:
    """Writes results.md and sparsity.png from results.json; returns the text."""
    data = json.loads((out / "results.json").read_text())
    text = markdown(data["rows"], data["settings"]) + verdict(data)
    (out / "results.md").write_text(text)
    figure(data["rows"]).savefig(out / "sparsity.png", dpi=120)
    return text


TABLE = """\
Task `{task}`, {examples} held-out questions; norm² is the share of the squared norm of
the run's displacement; d' is log-linear, its interval is over questions."""
VERDICT = """\
The top entries beat both random entries of equal norm and the shrunk displacement
{where}, by the paired bootstrap over questions, for the one draw with seed {seed}; no
correction for the number of shares. Shares of the gain are relative to the d' of the
base model, {base} from {yes} yes in {examples} answers."""


def markdown(rows: Sequence[Row], settings: Row) -> str:
    """All rows: shares in percent, d' with its interval over questions."""
    lines = []
    for row in rows:
        value, low, high = (cell(row, f"d_prime{end}") for end in ("", "_low", "_high"))
        line = [row["part"], f"{100 * row['share']:g}"]
        line += [f"{100 * row['norm_share']:.1f}", f"{value} [{low}, {high}]"]
        rates = ("alignment", "accuracy", "yes_rate")
        lines.append(line + [cell(row, key, 100, ".1f") for key in rates])
    heads = ["part", "share %", "norm² %", "d' [95 %]", "alignment %", "accuracy %"]
    caption = TABLE.replace("\n", " ").format(**settings)
    return f"{caption}\n\n{grid.table([*heads, 'yes %'], lines)}"


def verdict(data: Row) -> str:
    """Whether the top share is better than its two controls, share by share."""
    heads = ["top %", "d'", "of the run's gain %"]
    heads += [f"ahead of {name} [95 %], beats it" for name in TO_BEAT]
    lines, sparse = [], []
    for row in data["comparisons"]:
        cells = [f"{100 * row['share']:g}", cell(row, "d_prime")]
        cells.append(cell(row, "gain", 100, ".0f"))
        for one in (row[name] for name in TO_BEAT):
            value, low, high = (cell(one, key) for key in ("difference", "low", "high"))
            cells.append(f"{value} [{low}, {high}], {'yes' if one['beaten'] else 'no'}")
        lines.append(cells)
        if all(row[name]["beaten"] for name in TO_BEAT):
            sparse.append(f"{100 * row['share']:g} %")
    base, settings = data["rows"][0], data["settings"]
    text = VERDICT.replace("\n", " ").format(
        **settings,
        where=f"at {', '.join(sparse)}" if sparse else "at no share",
        base=cell(base, "d_prime"),
        yes=round(base["yes_rate"] * settings["examples"]),
    )
    return f"\n{grid.table(heads, lines)}\n{text}\n"


def cell(row: Row, key: str, times: float = 1, form: str = ".2f") -> str:
    """A number, or a dash where it is undefined."""
    value = row[key]
    return "-" if value is None else f"{times * value:{form}}"


def figure(rows: Sequence[Row]) -> Figure:
    """d' by share and by norm, alignment, and accuracy (solid) with yes (dashed)."""
    made = Figure(figsize=(13, 9), layout="constrained")
    by_share, by_norm, alignment, rates = made.subplots(2, 2).ravel()
    for number, (part, own) in enumerate(grid.grouped(rows, "part").items()):
        curve = with_ends(own, rows)
        style = {"color": f"C{number}", "marker": "o", "markersize": 3}
        at = numbers(curve, "share")
        by_share.plot(at, numbers(curve, "d_prime"), label=part, **style)
        if part == "top":
            limits = [numbers(curve, f"d_prime_{end}") for end in ("low", "high")]
            by_share.fill_between(at, *limits, color="C0", alpha=0.15, linewidth=0)
        near = sorted(curve, key=lambda row: row["norm_share"])
        by_norm.plot(numbers(near, "norm_share"), numbers(near, "d_prime"), **style)
        alignment.plot(at, numbers(curve, "alignment"), **style)
        rates.plot(at, numbers(curve, "accuracy"), **style)
        rates.plot(at, numbers(curve, "yes_rate"), linestyle="--", **style)
    legend = by_share.get_legend_handles_labels()
    made.legend(*legend, loc="outside right upper", frameon=False)
    panels = {
        "d' by entries; band: 95 % over questions": by_share,
        "alignment, %": alignment,
        "accuracy (solid) and yes (dashed), %": rates,
    }
    for title, axes in panels.items():
        axes.set_xscale("symlog", linthresh=1)
        axes.set(xlim=(0, 110), xlabel="share of the entries, %")
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    grid.tidy(by_norm, "d' by norm", "share of the squared norm, %")
    return made


def with_ends(own: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Rows of a part by share; missing ends are the base and the run (rows of top)."""
    part = own[0]["part"]
    ends = {row["share"]: row for row in rows if row["part"] == "top"}
    curve = list(own)
    for share in {0.0, 1.0} - {row["share"] for row in own}:
        equal = ends[1 - share if part == "top removed" else share]
        curve.append({**equal, "share": share})
    return sorted(curve, key=lambda row: row["share"])


def numbers(rows: Sequence[Row], key: str) -> np.ndarray:
    """A column, NaN where it is undefined; in percent but for d'."""
    values = np.array([row[key] for row in rows], float)
    return values if key.startswith("d_prime") else 100 * values


def percentages(text: str) -> list[float]:
    """An argparse `type`: comma-separated percentages, as sorted shares."""
    try:
        shares = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"not percentages from 0 to 100: {text!r}")
    return shares


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder")
    add("--out", type=Path, required=True, help="folder of results")
    add("--other", type=Path, help="run of another seed")
    add("--walk", type=Path, help="run of shuffled fitness")
    add("--task", default="", help="by default that of the run")
    add("--shares", type=percentages, default=SHARES, help="percent of the entries")
    excluded = "prefixes of tensors that stay as they are, such as embed,layers/mlp"
    add("--exclude", type=lambda text: text.split(","), default=[], help=excluded)
    add("--examples", type=at_least(0), default=0, help="0 for all")
    add("--root", default="", help="folder of parquet files")
    add("--dtype", choices=DTYPES, help="of the weights; by default the run's")
    add("--batch-size", type=at_least(1), default=256)
    add("--seed", type=at_least(0), default=0, help="of random masks")
    args = parser.parse_args()

    def command() -> None:
        with alone(args.out):
            study(args)

    guarded(command, "the same command goes on from what was saved")


if __name__ == "__main__":
    main()
