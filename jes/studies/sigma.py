"""Is σ chosen well? `sigma=auto` beside a grid of σ: `notebooks/sigma.md`.

    python -m jes.studies.sigma --config=tiny --config.task=tiny/min \\
        --config.eval_tasks="()" --seeds=0,1,2 --out=notebooks/results/sigma_min

α follows σ everywhere as it does where σ is chosen, see `jes.sigma`.
"""

import json
from pathlib import Path

from jes.studies.grid import (
    Grid,
    grouped,
    mean_error,
    precision,
    read_csv,
    run_study,
    spread,
    table,
    write_csv,
)

AUTO = "sigma:auto"
LADDER = ",".join(f"sigma:{value}" for value in (0.005, 0.01, 0.02, 0.04, 0.08))


def collect(grid: Grid) -> None:
    """Trains, and writes what each run came to into `sigma.csv`."""
    grid.run()
    rows = []
    for method, seed in grid:
        config = json.loads((grid.folder(method, seed) / "config.json").read_text())
        rates = config["config"] | config["resolved"]
        held_out = grid.summary(method, seed)["evaluations"][rates["task"]]
        row = {"method": method, "seed": seed, "task": rates["task"]}
        row |= {name: rates[name] for name in ("sigma", "alpha")}
        rows.append(row | held_out["reward"] | {"examples": held_out["examples"]})
    write_csv(grid.out / "sigma.csv", rows)


def draw(out: Path) -> str:
    """The table of held-out rewards, as text and in `sigma.md`."""
    rows = read_csv(out / "sigma.csv")
    runs = grouped(rows, "method")
    means = {name: spread([row["after"] for row in runs[name]])[0] for name in runs}
    best = max(means[name] for name in runs if name != AUTO)
    lines = []
    for name, found in runs.items():
        sigmas = dict.fromkeys(f"{row['sigma']:g}" for row in found)
        share = f"{100 * means[name] / best:.0f}" if best > 0 else ""
        after = mean_error([row["after"] for row in found], ".3f")
        which = f"chosen: {', '.join(sigmas)}" if name == AUTO else "".join(sigmas)
        lines.append([which, after, share])
    before = mean_error([row["before"] for row in runs[AUTO]], ".3f")
    text = (
        f"Held-out reward of `{rows[0]['task']}`, {before} at the start, "
        f"{rows[0]['examples']} examples. {precision(len(runs[AUTO]))}\n\n"
        + table(["σ", "reward at the end", "% of the best σ"], lines)  # noqa: RUF001
    )
    (out / "sigma.md").write_text(text)
    return text


if __name__ == "__main__":
    run_study(collect, draw, methods=f"{LADDER},{AUTO}", kind="sigma")
