"""Peak memory of a generation, over that of answering the same prompts.

    python -m jes.bench.memory [--model=FOLDER] [--mode=likelihood] [--draw=layer]
        [--rank=1] [--quantize=int4] [--prompts=64 --prompt=128 --new=32]

One process loads the model and answers; another loads it and trains it on the same
prompts, a generation at a time, with one member held; a quantised one by seed replay.
Each does so twice. What it takes is the second time's: the arrays that are there, and
by how much the resident set of the process grows beyond what it was before, at its
peak. (The first time programs are compiled, which takes a gigabyte that is never given
back.) Beside it stands what the compiler's analysis says of the largest program. The
prompts are random tokens; no base weights are kept beside (anchor 'none'). Without
`--model`, 80M random weights, most of them in layers. Linux only.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from jes.bench.cases import Case, generation, random_model, unperturbed
from jes.bench.timing import Row, row_of
from jes.config import DTYPES
from jes.core.evolution import Evolution
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.io import command_line, memory
from jes.io.console import console
from jes.models.weights import Pretrained, load
from jes.quantize import load_base
from jes.questions import DRAWS, MODES


def measure(args: argparse.Namespace) -> dict[str, int]:
    """What one process does, and the memory it takes: bytes by name."""
    memory.give_back_freed_blocks()
    base = model(args)
    case = Case("", base, args.prompts, args.prompt, args.new)
    if args.only == "answer":
        run = unperturbed(case, args.mode)
    else:
        evolution = settings(args, is_quantized(base.params))
        run = generation(case, evolution, chunk=1, mode=args.mode, draw=args.draw)
    del base, case  # a copy is trained
    jax.clear_caches()  # the programs that have loaded and copied it
    grown = memory.growth(run)
    if grown is None:
        raise InputError("this system does not say how much memory a program takes")
    arrays = sum(array.nbytes for array in jax.live_arrays())
    found = {"arrays": arrays, "grown": grown, "together": arrays + grown}
    return found | {"compiled": largest_program(arrays)}


def model(args: argparse.Namespace) -> Pretrained:
    """What is measured."""
    if args.model:
        return load_base(args.model, args.quantize, dtype=args.dtype)
    if args.quantize:
        raise InputError("--quantize needs a --model")
    return random_model(
        load("tiny"),
        vocab_size=16384,
        hidden_size=640,
        num_hidden_layers=12,
        num_attention_heads=10,
        intermediate_size=2560,
    )


def settings(args: argparse.Namespace, quantized: bool) -> Evolution:
    """Of a run; by seed replay if the model is quantised."""
    return Evolution(
        population=args.members,
        sigma=args.sigma,
        alpha=2 * args.sigma,
        rank=args.rank,
        rounding="replay" if quantized else "none",
    )


def largest_program(arrays: int) -> int:
    """Bytes while the largest program runs, by the analysis of its compiler.

    Args:
      arrays: bytes that are there all the time, given to the program or not.
    """
    client: Any = jax.local_devices()[0].client
    sizes = []
    for program in client.live_executables():
        found = program.get_compiled_memory_stats()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        given = max(arrays, found.argument_size_in_bytes)
        sizes.append(given + new + found.temp_size_in_bytes)
    return max(sizes)


def in_its_own_process(what: str, *flags: str) -> dict[str, int]:
    """`measure`, where nothing was before."""
    command = [sys.executable, "-m", "jes.bench.memory", *flags, f"--only={what}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"the process that was to {what} failed")
    return json.loads(done.stdout.splitlines()[-1])


WAYS = {
    "drawn for a member": [],
    "drawn in the layers": ["--draw=layer"],
    "of rank 1": ["--rank=1"],
}
"""Of having noise, and what to tell `measure`."""


def rows(repeats: int) -> list[Row]:
    """The rows of `jes.bench`, of scoring and of short answers."""
    out = []
    for mode, asked in (("likelihood", "scoring"), ("generate", "answers")):
        flags = [f"--mode={mode}", "--prompts=16", "--prompt=64", "--new=16"]
        times = min(repeats, 3)
        answer = [in_its_own_process("answer", *flags) for _ in range(times)]
        for way, own in WAYS.items():
            train = [in_its_own_process("train", *flags, *own) for _ in range(times)]
            goal = "<= 1.15" if way == "drawn in the layers" else ""
            for name, field in (("process", "together"), ("compiler", "compiled")):
                sides = np.array([[x[field] for x in side] for side in (train, answer)])
                what = f"memory of a generation / inference, {asked}, noise {way}: "
                ends = np.median(sides, axis=1) / 1e6
                ratios = sides[0] / sides[1]
                out.append(row_of(what + name, goal, ratios, ends, "MB"))
    return out


def report(flags: list[str]) -> None:
    """Measures both and prints the ratios."""
    found = {what: in_its_own_process(what, *flags) for what in ("answer", "train")}
    for what, sizes in found.items():
        console.print(
            f"{what}: arrays {sizes['arrays'] / 1e6:.0f} MB, grown by "
            f"{sizes['grown'] / 1e6:.0f} MB, together {sizes['together'] / 1e6:.0f} "
            f"MB; by the compiler's analysis {sizes['compiled'] / 1e6:.0f} MB"
        )
    ratio, analysed = (
        found["train"][field] / found["answer"][field]
        for field in ("together", "compiled")
    )
    console.print(
        f"training takes {ratio:.3f} times the memory of answering, {analysed:.3f} by "
        "that analysis"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = command_line.at_least(1)
    parser.add_argument("--model", default="", help="folder; random weights without")
    parser.add_argument("--quantize", default="", help="rounds it first, as `config`")
    parser.add_argument("--mode", default="generate", choices=MODES)
    parser.add_argument("--draw", default="member", choices=DRAWS)
    parser.add_argument("--rank", type=command_line.at_least(0), default=0)
    parser.add_argument("--prompts", type=positive, default=64)
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each")
    parser.add_argument("--new", type=positive, default=32, help="of an answer")
    parser.add_argument("--members", type=positive, default=2)
    parser.add_argument(
        "--sigma", type=float, default=0.01, help="in codes, or weights"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--only", choices=("answer", "train"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    def command() -> None:
        if args.only:
            print(json.dumps(measure(args)))
        else:
            report(sys.argv[1:])

    command_line.guarded(command)


if __name__ == "__main__":
    main()
