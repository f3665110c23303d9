"""Peak memory of a quantised run, over that of answering the same prompts.

    python -m jes.bench_memory --model=FOLDER [--prompts=64 --prompt=128 --new=32]

One process loads the model and answers; another loads it and trains it on the same
prompts by seed replay, a generation at a time. Each does so twice. What it takes is
the second time's: the arrays that are there, and by how much the resident set of the
process grows beyond what it was before, at its peak. (The first time programs are
compiled, which takes a gigabyte that is never given back.) The prompts are random
tokens; no base weights are kept beside (anchor 'none'). Linux only.
"""

import argparse
import ctypes
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jes.ask import ask, examine
from jes.bench import Case, examination
from jes.config import DTYPES
from jes.core.noise import generation_key
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.io import command_line, memory
from jes.io.progress import console
from jes.quantize import load_base
from jes.tell import Evolution, first_state, tell


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


def measure(what: str, args: argparse.Namespace) -> dict[str, float]:
    """What one process does, and the memory it takes: bytes by name."""
    memory.give_back_freed_blocks()
    pretrained = load_base(args.model, dtype=args.dtype)
    if not is_quantized(pretrained.params):
        raise InputError(f"{args.model} is not quantised")
    case = Case("", pretrained, args.prompts, args.prompt, args.new)
    run = answering(case) if what == "answer" else training(case, args)
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed would be there already
    forget_peak()
    before = resident()
    run()
    grown = resident(peak=True) - before
    return {"arrays": sum(array.nbytes for array in jax.live_arrays()), "grown": grown}


def answering(case: Case) -> Callable[[], None]:
    """A function that answers the prompts by the weights as they are."""
    examiner, questions = examination(case)
    params, rows = case.pretrained.params, case.rows

    def run() -> None:
        examine(examiner, params, questions, batch_size=rows)

    return run


def training(case: Case, args: argparse.Namespace) -> Callable[[], None]:
    """A function that runs one generation on the prompts."""
    evolution = Evolution(
        population=args.members,
        sigma=args.sigma,
        alpha=2 * args.sigma,
        rounding="replay",
    )
    examiner, questions = examination(case)
    params = case.pretrained.params
    state = first_state(evolution, params)
    generations = itertools.count()

    def run() -> None:
        nonlocal params, state
        key = generation_key(jax.random.key(0), next(generations))
        scores = ask(
            examiner,
            params,
            key,
            questions,
            noise=evolution.noise,
            population=args.members,
            chunk=1,
        )
        params, state = tell(evolution, params, state, key, scores.reward)
        jax.block_until_ready(params)

    return run


def in_its_own_process(what: str) -> dict[str, float]:
    """`measure`, where nothing was before."""
    command = [sys.executable, "-m", "jes.bench_memory", *sys.argv[1:]]
    done = subprocess.run(
        [*command, f"--only={what}"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"the process that was to {what} failed")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> None:
    """Measures both and prints the ratio."""
    totals = {}
    for what in ("answer", "train"):
        found = in_its_own_process(what)
        totals[what] = sum(found.values())
        console.print(
            f"{what}: arrays {found['arrays'] / 1e6:.0f} MB, grown by "
            f"{found['grown'] / 1e6:.0f} MB, together {totals[what] / 1e6:.0f} MB"
        )
    ratio = totals["train"] / totals["answer"]
    console.print(f"training takes {ratio:.3f} times the memory of answering")


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
            report(args)

    command_line.guarded(command)


if __name__ == "__main__":
    main()
