"""Peak memory of a quantised run, over that of answering the same prompts.

    python -m jes.bench_memory --model=FOLDER [--prompts=64 --prompt=128 --new=32]

One process loads the model and answers; another loads it and trains it on the same
prompts by seed replay, a generation at a time. Each does so twice. What it takes is
the second time's: the arrays that are there, and by how much the resident set of the
process grows beyond what it was before, at its peak. (The first time programs are
compiled, which takes a gigabyte that is never given back.) Beside it stands what the
compiler's analysis says of the largest program. The prompts are random tokens; no base
weights are kept beside (anchor 'none'). Linux only.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jes.bench import Case, generation, unperturbed
from jes.config import DTYPES
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.io import command_line, memory
from jes.io.progress import console
from jes.quantize import load_base
from jes.tell import Evolution


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since `forget_peak`."""
    field = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Lets the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(what: str, args: argparse.Namespace) -> dict[str, int]:
    """What one process does, and the memory it takes: bytes by name."""
    memory.give_back_freed_blocks()
    base = load_base(args.model, dtype=args.dtype)
    if not is_quantized(base.params):
        raise InputError(f"{args.model} is not quantised")
    case = Case("", base, args.prompts, args.prompt, args.new)
    if what == "answer":
        run = unperturbed(case)
    else:
        run = generation(case, settings(args), chunk=1)
    del base, case  # a copy is trained
    jax.clear_caches()  # the programs that have loaded and copied it
    jax.block_until_ready(run())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed would be there already
    forget_peak()
    before = resident()
    jax.block_until_ready(run())
    grown = resident(peak=True) - before
    arrays = sum(array.nbytes for array in jax.live_arrays())
    return {"arrays": arrays, "grown": grown, "compiled": largest_program(arrays)}


def settings(args: argparse.Namespace) -> Evolution:
    """Of a run by seed replay."""
    return Evolution(
        population=args.members,
        sigma=args.sigma,
        alpha=2 * args.sigma,
        rounding="replay",
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


def in_its_own_process(what: str) -> dict[str, int]:
    """`measure`, where nothing was before."""
    command = [sys.executable, "-m", "jes.bench_memory", *sys.argv[1:]]
    done = subprocess.run(
        [*command, f"--only={what}"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"the process that was to {what} failed")
    return json.loads(done.stdout.splitlines()[-1])


def report() -> None:
    """Measures both and prints the ratios."""
    totals, compiled = {}, {}
    for what in ("answer", "train"):
        found = in_its_own_process(what)
        totals[what] = found["arrays"] + found["grown"]
        compiled[what] = found["compiled"]
        console.print(
            f"{what}: arrays {found['arrays'] / 1e6:.0f} MB, grown by "
            f"{found['grown'] / 1e6:.0f} MB, together {totals[what] / 1e6:.0f} MB; "
            f"by the compiler's analysis {compiled[what] / 1e6:.0f} MB"
        )
    console.print(
        f"training takes {totals['train'] / totals['answer']:.3f} times the memory of "
        f"answering, {compiled['train'] / compiled['answer']:.3f} by that analysis"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = command_line.at_least(1)
    parser.add_argument("--model", required=True, help="folder of a quantised model")
    parser.add_argument("--prompts", type=positive, default=64)
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each")
    parser.add_argument("--new", type=positive, default=32, help="tokens of an answer")
    parser.add_argument("--members", type=positive, default=2)
    parser.add_argument("--sigma", type=float, default=0.01, help="in codes")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--only", choices=("answer", "train"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    def command() -> None:
        if args.only:
            print(json.dumps(measure(args.only, args)))
        else:
            report()

    command_line.guarded(command)


if __name__ == "__main__":
    main()
