"""Measures speed and memory as ratios of two things, in one run, on an idle machine.

    python -m jes.bench [--rows=generation,noise] [--repeats=7] [--out=FILE.json]

Rows, each with its goal where there is one:

generation  a generation (ask and tell) over N times the answers of the model itself;
pytorch     tokens per second over the published way of 2509.24372: perturb in place,
            `transformers.generate`, restore (`pip install jes[parity]`);
rollouts    answers of long-tailed lengths: the plain loop over slots;
prefix      reading prompts in full over reading what they share once;
low_rank    decoding with noise of low rank: its throughput over the model's own, and a
            generation's time over that with noise of full rank;
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
accelerators. All rows together take about half an hour on two cores.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from jes.bench import laws, low_rank, memory, prefix, rollouts, rounding, scaling, start
from jes.bench.cases import (
    Case,
    generation,
    larger_model,
    qwen_shape,
    unperturbed,
)
from jes.bench.published import published
from jes.bench.timing import Row, compare, table
from jes.errors import InputError
from jes.io import command_line
from jes.io.metrics import write_json
from jes.io.progress import console
from jes.io.runs import versions
from jes.models.weights import load
from jes.tell import Evolution

MEMBERS = 16


def settings(members: int, law: str) -> Evolution:
    """Of the generations that are timed, which leave the weights as they are."""
    return Evolution(population=members, sigma=1e-3, alpha=0.0, law=law)


def generation_rows(repeats: int) -> list[Row]:
    """What evolution costs over inference."""
    tiny, larger = load("tiny"), larger_model()
    cases = [
        (Case(f"{name}, {count} prompts x {text} tokens", model, count, *lengths), goal)
        for name, model, text, lengths in (
            ("tiny", tiny, "24 + 5", (24, 5)),
            ("4.5M", larger, "64 + 32", (64, 32)),
        )
        for count, goal in ((64, "<= 1.3"), (256, "<= 1.15"))
    ]
    rows = []
    for case, goal in cases:
        for law in ("normal", "table"):
            name = f"generation / (N x inference), {law} noise: {case.name}"
            run = generation(case, settings(MEMBERS, law))
            rows.append(compare(name, goal, run, unperturbed(case), repeats, MEMBERS))
    case = Case("0.5B shape, 32 prompts x 64 + 5 tokens", qwen_shape(), 32, 64, 5)
    name = f"generation / (N x inference), table noise: {case.name}"
    run = generation(case, settings(2, "table"), chunk=1)
    rows.append(compare(name, "<= 1.25", run, unperturbed(case), min(repeats, 3), 2))
    return rows


def pytorch_rows(repeats: int) -> list[Row]:
    """Against the published way."""
    if find_spec("torch") is None:
        console.print("'pytorch' is left out: it is not installed")
        return []
    large = larger_model()
    cases = [
        (Case("tiny, 64 prompts x 24 + 5 tokens", load("tiny"), 64, 24, 5), ">= 2.5"),
        (Case("4.5M, 64 prompts x 64 + 32 tokens", large, 64, 64, 32), ">= 1.5"),
    ]
    rows = []
    for case, goal in cases:
        for law in ("normal", "table"):
            name = f"tokens/s, jes with {law} noise / PyTorch: {case.name}"
            run = generation(case, settings(MEMBERS, law), update=False)
            other = published(case)
            rows.append(compare(name, goal, other, run, repeats, 1 / MEMBERS))
    case = Case("0.5B shape, 8 prompts x 64 + 16 tokens", qwen_shape(), 8, 64, 16)
    name = f"tokens/s, jes with table noise / PyTorch: {case.name}"
    run = generation(case, settings(1, "table"), update=False, chunk=1)
    rows.append(compare(name, "", published(case), run, min(repeats, 3)))
    return rows


def rollout_rows(repeats: int) -> list[Row]:
    """What slots save where a few answers are far longer than most."""
    return [
        compare(
            f"plain loop / slots: {name}, {rollouts.DESCRIPTION}",
            ">= 2",
            *rollouts.rollouts(model),
            repeats,
        )
        for name, model in (("tiny", load("tiny")), ("4.5M", larger_model()))
    ]


def prefix_rows(repeats: int) -> list[Row]:
    """What a shared beginning saves."""
    tiny = load("tiny")
    prompts = prefix.texts(tiny.config.vocab_size)
    lengths = f"{prefix.PROMPTS} prompts x ({prefix.COMMON} + {prefix.OWN}) tokens"
    return [
        compare(
            f"prompts read in full / what they share once: tiny, {lengths}",
            ">= 5",
            prefix.reading(tiny, prompts, parts=()),
            prefix.reading(tiny, prompts),
            repeats,
        )
    ]


def rounding_rows(repeats: int) -> list[Row]:
    """What sparse noise saves, of 50 members."""
    dense, sparse, rows = 2, 100, []
    for sigma, goal in rounding.SIGMAS.items():
        name = f"dense / sparse noise of codes, sigma = {sigma}"
        first = rounding.dense_estimate(sigma, dense)
        second = rounding.sparse_estimate(sigma, sparse)
        rows.append(compare(name, goal, first, second, repeats, dense / sparse))
    for sigma in (0.001, 0.01):
        name = f"seed-replay update / dense-noise update, sigma = {sigma}"
        first, second = rounding.replayed_update(sigma), rounding.dense_update(sigma)
        rows.append(compare(name, "<= 0.5", first, second, repeats))
    return rows


def noise_rows(repeats: int) -> list[Row]:
    """What the table saves, over jax's normal numbers and over the fused ones."""
    return [
        compare(
            f"{law} / table noise, {use}",
            goal,
            laws.used(use, law),
            laws.used(use, "table"),
            repeats,
        )
        for law, goal in (("jax.random.normal", ">= 1.8"), ("normal", ""))
        for use in laws.USES
    ]


ROWS: dict[str, Callable[[int], list[Row]]] = {
    "generation": generation_rows,
    "pytorch": pytorch_rows,
    "rollouts": rollout_rows,
    "prefix": prefix_rows,
    "low_rank": low_rank.rows,
    "rounding": rounding_rows,
    "noise": noise_rows,
    "memory": memory.rows,
    "start": start.rows,
    "scaling": scaling.rows,
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
        measured: list[Row] = []
        for name in names:
            console.print(f"measuring {name} ...")
            measured += ROWS[name](args.repeats)
            if args.out:  # as it goes: a long run may be stopped
                done = [row._asdict() for row in measured]
                write_json(args.out, {"rows": done, "versions": versions()})
        console.print(table(measured))

    command_line.guarded(command)


if __name__ == "__main__":
    main()
