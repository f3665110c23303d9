r"""Methods x seeds -> run folders -> rows in CSV or JSON -> a table and figures.

A study trains every method with every seed in `WORKDIR/METHOD/seed-S` (finished runs
are not repeated), collects what they came to in CSV and JSON files in `OUT`, and draws
its table and figures from these files alone: `--redraw` draws them again without runs.

A method is a name with numbers; several are joined by `+`, such as `n:10+l2:1`:

    es            plain evolution strategies, without decay
    l2:λ  l1:λ    the same with anchored weight decay
    n:N           a population of N for as many generations
    answers:N     a population of N for as many answers in all
    shuffled      rewards permuted at random: pure drift, of the same length
    rate:FACTOR   the learning rate α times FACTOR
    sigma:σ       another σ, or 'auto', and the α that follows it, see `jes.sigma`
    half_alpha:G  α halved every G generations; half_sigma:G the same for σ
    objective:F   another fitness, see `jes.metacognition.objectives`
    replay[:K:γ]  quantized: the residual is replayed over K generations, decay γ
    residual[:γ]  quantized: the residual is kept, decay γ
    naive  quzo   quantized: rounding without a residual; QuZO
    grpo:RATE[:ITERATIONS]  policy gradient; as many answers per generation
    sft[:RATE[:STEPS]]      supervised fine-tuning
"""

import csv
import dataclasses
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from ml_collections import ConfigDict, config_flags
from scipy.special import stdtrit

from jes import train
from jes.config import freeze
from jes.errors import InputError
from jes.io import command_line
from jes.io.console import console
from jes.memory import give_back_freed_blocks
from jes.run_folder import finished
from jes.sigma import alpha_for

Row = dict[str, Any]


def _answers(config: ConfigDict, population: str) -> Row:
    """Another population for as many answers, evaluated after as many."""
    size, keys = int(population), ("generations", "eval_every")
    same = {key: max(1, config.population * config[key] // size) for key in keys}
    return {"population": size, **same}


def _sigma(config: ConfigDict, sigma: str) -> Row:
    """Another σ with its α; 0 chooses both."""
    if sigma == "auto":
        return {"sigma": 0.0}
    value = float(sigma)
    return {"sigma": value, "alpha": alpha_for(value, config.population)}


METHODS: dict[str, Callable[..., Row]] = {
    "es": lambda config: {},
    "l1": lambda config, x: {"decay": "l1", "decay_coefficient": float(x)},
    "l2": lambda config, x: {"decay": "l2", "decay_coefficient": float(x)},
    "n": lambda config, n: {"population": int(n)},
    "answers": _answers,
    "shuffled": lambda config: {"shuffle_fitness": True},
    "rate": lambda config, factor: {"alpha": float(factor) * config.alpha},
    "sigma": _sigma,
    "half_alpha": lambda config, g: {"alpha_half_life": int(g)},
    "half_sigma": lambda config, g: {"sigma_half_life": int(g)},
    "objective": lambda config, name: {"objective": name},
    "replay": lambda config, window="", decay="": {
        "rounding": "replay",
        "window": int(window or config.window),
        "residual_decay": float(decay or config.residual_decay),
    },
    "residual": lambda config, decay="": {
        "rounding": "residual",
        "residual_decay": float(decay or config.residual_decay),
    },
    "naive": lambda config: {"rounding": "naive"},
    "quzo": lambda config: {"rounding": "quzo"},
    "grpo": lambda config, rate, iterations="": {
        "method": "grpo",
        "grpo.learning_rate": float(rate),
        "generations": int(iterations or config.generations),
    },
    "sft": lambda config, rate="", steps="": {
        "method": "sft",
        "objective": "reward",  # settings of members are not those of SFT
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "sft.learning_rate": float(rate or config.sft.learning_rate),
        "generations": int(steps or config.generations),
        "eval_every": min(config.eval_every, int(steps or config.generations)),
    },
}
"""Name -> the settings it changes, given the config and the numbers after colons."""


def method_config(base: ConfigDict, method: str, seed: int) -> ConfigDict:
    """The config of one run; `base` is not changed.

    Raises:
      InputError: if there is no such method, or its numbers are wrong.
    """
    config = base.copy_and_resolve_references()
    config.update({"seed": seed, "decay": "none", "decay_coefficient": 0.0})
    try:
        for part in method.split("+"):
            name, *numbers = part.split(":")
            changes = METHODS[name](config, *numbers)
            config.update_from_flattened_dict(changes)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{method!r} is no method of a study: {', '.join(METHODS)}, with numbers "
            "after colons, such as l2:1; several are joined by +"
        ) from error
    return config


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of a study: one in `workdir` for each pair of method and seed.

    Attributes:
      config: settings that the methods change.
      methods, seeds: what to run.
      workdir: of the run folders.
      out: of data, tables and figures.
    """

    config: ConfigDict
    methods: Sequence[str]
    seeds: Sequence[int]
    workdir: Path
    out: Path

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """All pairs of method and seed, method by method."""
        return itertools.product(self.methods, self.seeds)

    def folder(self, method: str, seed: int) -> Path:
        """Of one run."""
        return self.workdir / method.replace(":", "-") / f"seed-{seed}"

    def summary(self, method: str, seed: int) -> Row:
        """`summary.json` of a finished run."""
        return json.loads((self.folder(method, seed) / "summary.json").read_text())

    def run(self) -> None:
        """Trains what is not finished, seed by seed: a part is a smaller study."""
        runs = {
            (method, seed): method_config(self.config, method, seed)
            for seed in self.seeds
            for method in self.methods
        }
        for config in runs.values():  # a wrong setting fails before the first long run
            freeze(config)
        for number, ((method, seed), config) in enumerate(runs.items(), 1):
            name = f"run {number} of {len(runs)}: {method}, seed {seed}"
            train_once(config, self.folder(method, seed), name)


def train_once(config: ConfigDict, folder: Path, name: str) -> None:
    """Trains, or continues, a run that is not finished.

    Raises:
      InputError: if the folder holds a run with other settings, or a longer one.
    """
    if not (folder.is_dir() and finished(freeze(config), folder)):
        console.print(name)
        train.run(config, folder)


def run_study(
    collect: Callable[[Grid], None],
    draw: Callable[[Path], str],
    *,
    methods: str = "es",
    kind: str = "study",
) -> None:
    """The command line of a study.

    Args:
      collect: trains, and writes CSV or JSON files into `grid.out`.
      draw: writes tables and figures from these files; returns the text to print.
      methods: default of `--methods`.
      kind: names the default folder, `runs/<config>_<kind>`.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings of a run: a file in configs/.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", f"Of runs; default runs/<config>_{kind}.")
    flags.DEFINE_string("out", "", "Of data, tables and figures; default the workdir.")
    flags.DEFINE_string("methods", methods, "Comma-separated.")
    flags.DEFINE_string("seeds", "0", "Comma-separated.")
    flags.DEFINE_bool("redraw", False, "Draw again from the data in --out; no runs.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        give_back_freed_blocks()
        values = flags.FLAGS
        methods = split(values.methods, "methods")
        seeds = split(values.seeds, "seeds")
        for seed in seeds:
            if not seed.isdecimal():
                raise InputError(f"--seeds: {seed!r} is not a whole number")
        workdir = Path(values.workdir or f"runs/{command_line.config_name()}_{kind}")
        out = Path(values.out or workdir)
        if not values.redraw:
            out.mkdir(parents=True, exist_ok=True)
            collect(Grid(config_flag.value, methods, [*map(int, seeds)], workdir, out))
        console.print(draw(out))
        console.print(f"data, tables and figures in {out}")

    command_line.start(command)


def split(text: str, flag: str) -> list[str]:
    """The entries of a comma-separated flag; none may be empty or repeated."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise InputError(f"--{flag}={text}: an entry is empty or repeated")
    return parts


# Rows: CSV files with six significant digits; an empty cell is None.


def write_csv(path: Path, rows: Sequence[Row], columns: Iterable[str] = ()) -> None:
    """Writes rows; by default the columns are all keys in order of appearance."""
    names = list(columns) or list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return f"{value:.6g}"

    with path.open("w", newline="") as file:
        cells = ([cell(row.get(name)) for name in names] for row in rows)
        csv.writer(file).writerows([names, *cells])


def read_csv(path: Path) -> list[Row]:
    """Reads rows: numbers where a cell is one, None where it is empty.

    Raises:
      InputError: if there is no such file.
    """

    def value(text: str) -> Any:
        try:
            return int(text) if text.isdecimal() else float(text)
        except ValueError:
            return text or None

    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no data to draw from") from error
    return [{key: value(cell) for key, cell in row.items()} for row in rows]


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows by the value of a key, or by the tuple of values of several."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(operator.itemgetter(*keys)(row), []).append(row)
    return groups


# Statistics over seeds.


def spread(values: Sequence[Any]) -> tuple[Any, Any]:
    """Mean over the first axis, and its standard error (0 for one value)."""
    found = np.array(values, float)
    count = len(found)
    error = found.std(0, ddof=1) / count**0.5 if count > 1 else 0 * found[0]
    return found.mean(0), error


def t_factor(count: int, level: float = 0.95) -> float:
    """Half a confidence interval of the mean of `count` values, in standard errors."""
    return float(stdtrit(count - 1, (1 + level) / 2))


def mean_error(values: Sequence[float], form: str = ".1f") -> str:
    """'mean ± standard error'; the mean alone for one value, '' for none."""
    if not values:
        return ""
    mean, error = spread(values)
    return f"{mean:{form}}" + (f" ± {error:{form}}" if len(values) > 1 else "")


def precision(seeds: int, questions: int | None = None) -> str:
    """What ± means in a table, and what is not in it; a line of Markdown."""
    text = ""
    if seeds > 1:
        text = (
            f"± is one standard error over {seeds} seeds; a 95 % interval (t, "
            f"{seeds - 1} degrees of freedom) is ± {t_factor(seeds):.1f} of these. "
        )
    if questions:
        text += (
            f"With {questions} questions a share of 50 % has a binomial standard error "
            f"of {50 / questions**0.5:.1f} points."
        )
    return text.strip()


# Tables and figures.


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]]) + "\n"


def band(axes: Axes, at: Sequence[float], curves: Sequence[Any], **style: Any) -> None:
    """Mean over seeds of curves [seeds, T], in a band of one standard error.

    Args:
      axes: the panel.
      at: x values [T].
      curves: y values, [seeds, T].
      style: of `axes.plot`; the color is required.
    """
    mean, error = spread(curves)
    axes.plot(at, mean, **style)
    if len(curves) > 1:
        edges = mean - error, mean + error
        axes.fill_between(at, *edges, color=style["color"], alpha=0.2, linewidth=0)


def tidy(
    axes: Axes,
    title: str,
    x: str = "",
    y: str = "",
    *,
    legend: bool = True,
    **options: Any,
) -> None:
    """Title and labels, no box, and a legend of what is labelled, with `options`."""
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(**{"frameon": False, "fontsize": "small"} | options)
