"""Measures speed and memory as ratios of two things, in one run, on an idle machine.

    python -m jes.bench [--rows=generation,noise] [--repeats=7] [--out=FILE.json]

Rows, each with its goal where there is one:

generation  a generation (ask and tell) over N times the answers of the model itself;
pytorch     tokens per second over the published way of 2509.24372: perturb in place,
            `transformers.generate`, restore (`pip install jes[parity]`);
rollouts    answers of long-tailed lengths: the plain loop over continuous batching;
ragged      reading prompts of many lengths padded over packed; likelihoods of letters
            over one generated token;
prefix      reading prompts in full over reading their common prefix once;
low_rank    decoding with noise of low rank: its throughput over the model's own, and a
            generation's time, and the memory, over those with noise of full rank;
rounding    quantised ES: noise drawn entry by entry over drawn sparsely, an update by
            seed replay over one with dense noise;
noise       ten million exact normal numbers over as many from the table;
memory      peak memory of a generation over that of inference, for each way of drawing
            noise: of the process, and below it by the compiler's analysis;
start       from the command to the first generation: cold over with compiled programs;
scaling     log-log slopes of a generation's time over N, prompts, tokens, weights.

No answer ends early but in 'rollouts'. Medians, with the quartiles of the ratio over
the repeats, which take turns. Beside the ratio of times on the clock stands that of
processor time, which other work on the machine disturbs less; it says nothing of
accelerators. All rows together take about 40 minutes on two cores.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from jes.bench import generations, memory, noise, rollouts
from jes.bench.timing import Row, table
from jes.errors import InputError
from jes.io import command_line
from jes.io.console import console
from jes.io.metrics import write_json
from jes.io.versions import versions
from jes.memory import give_back_freed_blocks

ROWS: dict[str, Callable[[int], Iterable[Row]]] = {
    "generation": generations.over_inference,
    "pytorch": generations.over_pytorch,
    "rollouts": rollouts.long_tails,
    "ragged": rollouts.ragged,
    "prefix": rollouts.shared_prefix,
    "low_rank": noise.low_rank,
    "rounding": noise.rounding,
    "noise": noise.distributions,
    "memory": memory.rows,
    "start": generations.start,
    "scaling": generations.scaling,
}
"""Functions of the number of repeats."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = command_line.at_least(1)
    parser.add_argument("--rows", default=",".join(ROWS), help="by name; all")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write too")
    args = parser.parse_args()

    def command() -> None:
        names = args.rows.split(",")
        unknown = ", ".join(name for name in names if name not in ROWS)
        if unknown:
            raise InputError(f"no such rows: {unknown}; there are {', '.join(ROWS)}")
        give_back_freed_blocks()  # as a run does
        measured: list[Row] = []
        for name in names:
            console.print(f"measuring {name} ...")
            for row in ROWS[name](args.repeats):
                measured.append(row)
                if args.out:  # as it goes: a long run may be stopped
                    rows = [row._asdict() for row in measured]
                    write_json(args.out, {"rows": rows, "versions": versions()})
        console.print(table(measured))

    command_line.guarded(command)


if __name__ == "__main__":
    main()
