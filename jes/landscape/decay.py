r"""Rise-then-decay: how training reward rises under fixed settings, and falls.

    python -m jes.landscape.decay --config=configs/rise_then_decay.py:quick
    python -m jes.landscape.decay --config=configs/rise_then_decay.py:tiny \
        --methods=n:10,n:30,n:100,grpo:1e-4,half_alpha:30,l2:1 --seeds=0,1,2

Every method and seed is a run of `jes.train` in `WORKDIR/METHOD/seed-S`, with the
methods of `jes.forgetting`; stopped at any moment, the same command goes on. The reward
of the centre on the training questions is looked at every `eval_every` generations
(2602.00170, Fig. 1), and on held-out ones.

Early stopping costs nothing: a run is stopped where its training reward has had no new
best for `PATIENCE` looks, and gives the weights of the best. What these answer on
held-out questions has had no part in the choice.

Writes rise.json, rise.md and rise.png.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import config_flags

from jes.errors import InputError
from jes.experiment import ON_TRAIN
from jes.forgetting.methods import folder_of, summary_of
from jes.forgetting.study import folders, run_all, split, whole
from jes.io import command_line, memory
from jes.io.console import console
from jes.io.metrics import read_rows, write_json

METHODS = "n:10,n:30"
"""Of the quick form."""
PATIENCE = 6
SMOOTH = 3
"""Looks that a peak is the mean of: the highest of many looks is high by chance."""
COLUMNS = {
    "start": "start %",
    "peak": "peak %",
    "at": "at generation",
    "end": "end %",
    "decay": "decay",
    "held_out_start": "held-out start %",
    "held_out": "held-out end %",
    "held_out_stopped": "held-out, stopped early %",
    "stopped_at": "stopped at generation",
    "norm": "‖θ-θ₀‖ end",
    "answers": "answers, thousands",
}
"""Key of a result -> heading in the table."""

Results = dict[str, dict[int, dict[str, Any]]]
"""method -> seed -> what a run came to."""


def curves_of(folder: Path, task: str) -> dict[str, list[float]]:
    """Accuracies in percent of a run: `generation`, `train`, `held_out`."""
    rows = read_rows(folder / "evaluations.jsonl")
    on = {
        name: {row["generation"]: row["accuracy"] for row in rows if row["task"] == of}
        for name, of in (("train", task + ON_TRAIN), ("held_out", task))
    }
    at = sorted(on["train"])
    return {
        "generation": at,
        **{name: [100 * (of[g] or 0.0) for g in at] for name, of in on.items()},
    }


def smoothed(values: Sequence[float], width: int = SMOOTH) -> np.ndarray:
    """Means of `width` neighbours, an odd number; of fewer at the ends."""
    beside = width // 2
    around = [values[max(0, i - beside) : i + beside + 1] for i in range(len(values))]
    return np.array([np.mean(each) for each in around])


def stop_early(values: Sequence[float], patience: int = PATIENCE) -> tuple[int, int]:
    """Where a run stops that has had no new best for `patience` looks.

    Returns:
      Numbers of the best look and of the last.
    """
    best = 0
    for look, value in enumerate(values):
        if value > values[best]:
            best = look
        if look - best >= patience:
            return best, look
    return best, len(values) - 1


def outcome(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Peak and decay of a curve, and what early stopping makes of it; in percent."""
    train, at = smoothed(curves["train"]), curves["generation"]
    top = int(train.argmax())
    best, last = stop_early(curves["train"])
    return {
        "start": curves["train"][0],
        "peak": float(train[top]),
        "at": at[top],
        "end": float(train[-1]),
        "decay": float(train[top] - train[-1]),
        "held_out_start": curves["held_out"][0],
        "held_out": curves["held_out"][-1],
        "held_out_stopped": curves["held_out"][best],
        "stopped_at": at[last],
    }


def report(
    config: ml_collections.ConfigDict,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: Path,
    out: Path,
) -> None:
    """Writes rise.json, rise.md and rise.png into `out`, of finished runs."""
    results: Results = {}
    for method in methods:
        for seed in seeds:
            summary = summary_of(workdir, method, seed)
            curves = curves_of(folder_of(workdir, method, seed), config.task)
            results.setdefault(method, {})[seed] = {
                **outcome(curves),
                "norm": summary["displacement_norm"],
                "answers": summary["answers"] / 1000,
                "curves": curves,
            }
    write_json(out / "rise.json", results)
    text = markdown(results, config.task)
    (out / "rise.md").write_text(text)
    figure(results, config.task).savefig(out / "rise.png", dpi=120)
    console.print(text)
    console.print(f"table and figure in {out}")


def mean_error(values: Sequence[float]) -> str:
    """Mean and standard error over seeds."""
    text = f"{np.mean(values):.1f}"
    if len(values) < 2:
        return text
    return f"{text} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def markdown(results: Results, task: str) -> str:
    """A row a method."""
    seeds = len(next(iter(results.values())))
    lines = [
        f"Task `{task}`: accuracy on the training questions, peak and end as means of "
        f"{SMOOTH} looks; ± one standard error over {seeds} seed(s).",
        "",
        f"| method | {' | '.join(COLUMNS.values())} |",
        f"|{'---|' * (1 + len(COLUMNS))}",
    ]
    for method, of_seed in results.items():
        cells = [mean_error([one[key] for one in of_seed.values()]) for key in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(results: Results, task: str) -> Figure:
    """Training and held-out accuracy of every method, bands of a standard error."""
    made = Figure(figsize=(11, 4), layout="constrained")
    for axes, key, title in zip(
        made.subplots(1, 2, sharey=True),
        ("train", "held_out"),
        ("training questions", "held-out questions"),
        strict=True,
    ):
        for number, (method, of_seed) in enumerate(results.items()):
            curves = [one["curves"] for one in of_seed.values()]
            band(axes, curves, key, color=f"C{number}", label=method)
        axes.set_title(f"{task}, {title}", fontsize="medium")
        axes.set(xlabel="generation", ylabel="accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return made


def band(axes: Axes, curves: Sequence[Mapping[str, Any]], key: str, **kw: Any) -> None:
    """Mean over seeds and one standard error."""
    at = curves[0]["generation"]
    values = np.array([curve[key] for curve in curves])
    middle = values.mean(0)
    axes.plot(at, middle, **kw)
    if len(values) > 1:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        axes.fill_between(
            at,
            middle - error,
            middle + error,
            alpha=0.2,
            color=kw["color"],
            linewidth=0,
        )


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings of a run: a file in configs/.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", "Of all runs; by default runs/<config>_decay.")
    flags.DEFINE_string("out", "", "Of table and figure; by default the workdir.")
    flags.DEFINE_string("methods", METHODS, "Comma-separated.")
    flags.DEFINE_string("seeds", "0", "Comma-separated.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        memory.give_back_freed_blocks()
        values, config = flags.FLAGS, config_flag.value
        if not config.eval_train:
            raise InputError("the study looks at training questions: eval_train=True")
        if config.anchor == "none":
            raise InputError("the study measures distances: anchor='none' cannot be")
        methods = split(values.methods, "methods")
        seeds = [whole(seed) for seed in split(values.seeds, "seeds")]
        workdir, out = folders(values, "decay")
        run_all(config, methods, seeds, workdir)
        report(config, methods, seeds, workdir, out)

    command_line.start(command)


if __name__ == "__main__":
    main()
