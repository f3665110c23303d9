"""Peak memory of a generation, over that of answering the same prompts.

    python -m jes.bench.memory [--model=FOLDER] [--mode=likelihood] [--draw=layer]
        [--rank=1] [--quantize=int4] [--prompts=64 --prompt=128 --new=32]

One process loads the model and answers; another loads it and trains it on the same
prompts, a generation at a time, with one member held; a quantised one by seed replay.
Each does so twice. What it takes is the second time's: the arrays that are there, and
by how much the resident set of the process grows at its peak. (The first time programs
are compiled, which takes a gigabyte that is never given back.) Beside it stands what
the compiler's analysis says of the largest program. The prompts are random tokens; no
base weights are kept beside (anchor 'none'). Without `--model`, 80M random weights,
most of them in layers. Linux only.
"""

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jes.bench.cases import Case, generation, inference, model_of
from jes.bench.timing import Row, Run, row_of
from jes.config import DTYPES
from jes.core.evolution import Evolution
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.io import command_line
from jes.io.console import console
from jes.memory import give_back_freed_blocks
from jes.quantize import load_base
from jes.questions import DRAWS, MODES

WAYS = {
    "drawn for a member": [],
    "drawn in the layers": ["--draw=layer"],
    "of rank 1": ["--rank=1"],
}
"""To have noise, and the flags for it."""


def rows(repeats: int) -> Iterator[Row]:
    """The rows of `jes.bench`, of scoring and of short answers."""
    for mode, asked in (("likelihood", "scoring"), ("generate", "answers")):
        flags = [f"--mode={mode}", "--prompts=16", "--prompt=64", "--new=16"]
        times = range(min(repeats, 3))
        answer = [in_its_own_process("answer", *flags) for _ in times]
        for way, own in WAYS.items():
            train = [in_its_own_process("train", *flags, *own) for _ in times]
            goal = "<= 1.15" if way == "drawn in the layers" else ""
            for name, field in (("process", "together"), ("compiler", "compiled")):
                sides = np.array([[x[field] for x in side] for side in (train, answer)])
                what = f"memory of a generation / inference, {asked}, noise {way}: "
                ends = np.median(sides, axis=1) / 1e6
                yield row_of(what + name, goal, sides[0] / sides[1], ends, "MB")


def in_its_own_process(what: str, *flags: str) -> dict[str, int]:
    """`measure`, where nothing was before."""
    command = [sys.executable, "-m", "jes.bench.memory", *flags, f"--only={what}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"the process that was to {what} failed")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, int]:
    """What one process does, and the memory it takes: bytes by name."""
    give_back_freed_blocks()
    if args.quantize and not args.model:
        raise InputError("--quantize needs a --model")
    model, quantize = args.model, args.quantize
    base = load_base(model, quantize, dtype=args.dtype) if model else model_of("80M")
    case = Case(base, args.prompts, args.prompt, args.new)
    if args.only == "answer":
        run = inference(case, args.mode)
    else:
        evolution = Evolution(
            population=args.members,
            sigma=args.sigma,
            alpha=2 * args.sigma,
            rank=args.rank,
            rounding="replay" if is_quantized(base.params) else "none",
        )
        run = generation(case, evolution, chunk=1, mode=args.mode, draw=args.draw)
    del base, case  # a copy is trained
    jax.clear_caches()  # the programs that have loaded and copied it
    grown = growth(run)
    arrays = sum(array.nbytes for array in jax.live_arrays())
    found = {"arrays": arrays, "grown": grown, "together": arrays + grown}
    return found | {"compiled": largest_program(arrays)}


def growth(run: Run) -> int:
    """By how many bytes this process grows in memory at the peak of a second run."""
    jax.block_until_ready(run())  # compiles
    gc.collect()
    time.sleep(0.1)  # a thread of the runtime may be about to free a result
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed would be there already
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        raise InputError("only Linux says how much memory a process takes") from None
    start = resident("VmRSS")
    jax.block_until_ready(run())
    return resident("VmHWM") - start


def resident(field: str) -> int:
    """Bytes of this process in memory: 'VmRSS' now, 'VmHWM' at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def largest_program(arrays: int) -> int:
    """Bytes while the largest program runs, by the compiler, of which so many stay."""
    client: Any = jax.local_devices()[0].client
    sizes = []
    for program in client.live_executables():
        found = program.get_compiled_memory_stats()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        given = max(arrays, found.argument_size_in_bytes)
        sizes.append(given + new + found.temp_size_in_bytes)
    return max(sizes)


def report(flags: list[str]) -> None:
    """Measures both and prints the ratios."""
    answer, train = (in_its_own_process(what, *flags) for what in ("answer", "train"))
    for what, sizes in (("answer", answer), ("train", train)):
        figures = (f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
        console.print(f"{what}: {', '.join(figures)}")
    ratios = (train[field] / answer[field] for field in ("together", "compiled"))
    console.print(
        "training takes {:.3f} times the memory of answering, {:.3f} by the "
        "compiler's analysis".format(*ratios)
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, positive = parser.add_argument, command_line.at_least(1)
    flag("--model", default="", help="folder; random weights without")
    flag("--quantize", default="", help="rounds it first, as `config`")
    flag("--mode", default="generate", choices=MODES)
    flag("--draw", default="member", choices=DRAWS)
    flag("--rank", type=command_line.at_least(0), default=0)
    flag("--prompts", type=positive, default=64)
    flag("--prompt", type=positive, default=128, help="tokens of each")
    flag("--new", type=positive, default=32, help="tokens of an answer")
    flag("--members", type=positive, default=2)
    flag("--sigma", type=float, default=0.01, help="in codes, or weights")
    flag("--dtype", default="float32", choices=DTYPES)
    flag("--only", choices=("answer", "train"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    def command() -> None:
        if args.only:
            print(json.dumps(measure(args)))
        else:
            report(sys.argv[1:])

    command_line.guarded(command)


if __name__ == "__main__":
    main()
