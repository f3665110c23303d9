"""Whether few weights hold what a run learned: its displacement, masked, asked again.

    python -m jes.metacognition.sparsity --run=FOLDER --out=FOLDER [--task=tiny/knows] \
        [--other=FOLDER] [--walk=FOLDER] [--shares=0,1,2,5,10,20,30,50,70,100]

The base model is moved by parts of the run's displacement, and asked the held-out
questions of the task (2602.02605). The parts are the top r % of the entries by
magnitude, what is left without these, and for each r the controls:

    random                as many entries, drawn evenly
    random of equal norm  these, scaled to the norm of the top r %
    random by tensor      as many entries of each tensor and layer as the top r % has
    shrunk                all entries, scaled to the norm of the top r %
    other run's mask      the entries that are the top r % of the run --other, which
                          is to have the same base and another seed
    top of a Gaussian     the top r % of a Gaussian of the norm of the displacement
    top of a shuffled run the top r % of the run --walk, which is to have the same base
                          and `shuffle_fitness`, scaled to that norm

A claim of sparsity needs the top r % to be better than random entries of equal norm and
than the shrunk displacement. Each control is one draw: another --seed, in another
folder, shows what that leaves open.

FOLDER has settings.json, results.jsonl (a row a model, with its answers), results.json,
results.md and sparsity.png. Killed, the same command goes on; it may be given again
with more shares or runs.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.config import DTYPES
from jes.core.ledger import append_row
from jes.core.noise import PyTree
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.evaluate import load_model, make_evaluation
from jes.export import load_base, read_ledger
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.metrics import finite, keep_rows, read_rows
from jes.io.runs import alone, claim_results, recorded
from jes.metacognition.masks import (
    exclude,
    keep_largest,
    keep_like,
    keep_random,
    keep_random_by_tensor,
    keep_smallest,
    norm_of,
    norm_share,
    random_walk,
    rescale,
    shrink,
)
from jes.metacognition.sparsity_report import write_report
from jes.models.weights import Pretrained, fingerprint, load
from jes.questions import Evaluation, prepare
from jes.studies.knowing import Answers, collect
from jes.tasks import load_task

Part = Callable[[float], PyTree]
"""From a share to what the base model is moved by."""

SHARES = "0,1,2,5,10,20,30,50,70,100"
WALKS = ("top of a Gaussian", "top of a shuffled run")
"""Parts that are not of the run's displacement."""


def parts_of(
    delta: PyTree, seed: int, other: PyTree | None = None, walk: PyTree | None = None
) -> dict[str, Part]:
    """What is compared, by name.

    Args:
      delta: displacement of the run.
      seed: of random masks and of the Gaussian.
      other, walk: displacements of two more runs, see above.
    """
    norm = norm_of(delta)
    gauss = random_walk(delta, seed)

    def equal_norm(share: float) -> PyTree:
        goal = norm_of(keep_largest(delta, share))
        return rescale(keep_random(delta, share, seed), goal)

    def shrunk(share: float) -> PyTree:
        return shrink(delta, norm_share(keep_largest(delta, share), delta))

    parts: dict[str, Part] = {
        "top": lambda share: keep_largest(delta, share),
        "top removed": lambda share: keep_smallest(delta, share),
        "random": lambda share: keep_random(delta, share, seed),
        "random of equal norm": equal_norm,
        "random by tensor": lambda share: keep_random_by_tensor(delta, share, seed),
        "shrunk": shrunk,
        "top of a Gaussian": lambda share: keep_largest(gauss, share),
    }
    if other is not None:
        parts["other run's mask"] = lambda share: keep_like(delta, other, share)
    if walk is not None:
        scaled = rescale(walk, norm)
        parts["top of a shuffled run"] = lambda share: keep_largest(scaled, share)
    return parts


def plan(parts: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float]]:
    """The models to ask: share 0 is the base in every part, share 1 mostly the run."""
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
        delta = exclude(delta, prefixes)
    except ValueError as error:
        raise InputError(f"--exclude: {error}") from error
    norm = norm_of(delta)
    if not np.isfinite(norm):
        raise InputError("the run's weights are not finite")
    if not norm:
        raise InputError("the run's weights are those of its base model")
    return delta


def load_run(folder: Path) -> tuple[Pretrained, Pretrained, dict[str, Any], str]:
    """A run's base model, the model it has come to, its settings, and its dtype.

    Raises:
      InputError: for a folder that is no run, or a quantised one; or if the model was
        saved in less precision than its base, when the displacement would be rounding.
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
    """Displacement and fingerprint of a run to compare with.

    Args:
      folder: of the run.
      base: the base model, which is to be that of this run too.
      prefixes: of excluded tensors.
      shuffled: whether the run is to be one of shuffled fitness.
    """
    start, tuned, config, _ = load_run(folder)
    if fingerprint(start.params) != fingerprint(base):
        raise InputError(f"{folder} starts from another base model")
    if shuffled and not config.get("shuffle_fitness"):
        raise InputError(f"--walk: {folder} is not a run with shuffle_fitness")
    return displacement(tuned.params, base, prefixes), fingerprint(tuned.params)


def ask_all(
    evaluation: Evaluation,
    base: PyTree,
    delta: PyTree,
    parts: dict[str, Part],
    shares: Sequence[float],
    path: Path,
    batch_size: int,
) -> None:
    """Asks every model of the plan that has no row yet, and appends its row.

    Args:
      evaluation: the model and the task.
      base: weights of the base model.
      delta: displacement that `norm_share` is relative to.
      parts: from `parts_of`.
      shares: from 0 to 1.
      path: of the rows, a JSONL file.
      batch_size: prompts answered at once.
    """
    questions = prepare(evaluation, evaluation.task.test)
    if not questions:
        raise InputError(f"task {evaluation.task.name} has no held-out examples")
    keep_rows(path, lambda row: True)  # but for half a row, which a kill may leave
    done = {(row["part"], row["share"]) for row in read_rows(path)}
    models = plan(list(parts), shares)
    for number, (name, share) in enumerate(models, 1):
        if (name, share) in done:
            continue
        part = parts[name](share)
        weights = moved(base, part)
        answers = collect(evaluation, weights, questions, batch_size=batch_size)
        row = {"part": name, "share": share, "norm_share": norm_share(part, delta)}
        metrics = row_of(answers)
        append_row(path, finite(row | metrics))
        console.print(
            f"{number} of {len(models)}: {name} {100 * share:g} %, d' "
            f"{metrics['d_prime']:.2f}, accuracy {100 * metrics['accuracy']:.1f} %"
        )


def row_of(answers: Answers) -> dict[str, Any]:
    """Metrics with a 95 % interval of d' over questions, and the answers as 0 and 1."""
    low, high = answers.d_prime_interval()
    metrics = {**answers.report(), "d_prime_low": low, "d_prime_high": high}
    bits = {"correct_bits": answers.correct, "yes_bits": answers.yes}
    return metrics | {k: "".join(map(str, v.astype(int))) for k, v in bits.items()}


def examiner_of(
    args: argparse.Namespace, base: Pretrained, config: dict[str, Any], dtype: str
) -> Evaluation:
    """How the models are asked: as the command says, or else as the run did it."""
    # Held out is what this run did not see: its seed draws the examples.
    task = load_task(
        args.task or config["task"],
        root=args.root or config["data"]["root"],
        seed=config["seed"],
        test=args.examples,
    )
    return make_evaluation(base, task, dtype=args.dtype or dtype)


def study(args: argparse.Namespace) -> None:
    """Loads, asks what has not been asked, and writes the report."""
    for name in ("other", "walk"):
        folder = getattr(args, name)
        if folder is not None and folder.resolve() == args.run.resolve():
            raise InputError(f"--{name} is the run itself: give another")
    base, tuned, config, dtype = load_run(args.run)
    evaluation = examiner_of(args, base, config, dtype)
    delta = displacement(tuned.params, base.params, args.exclude)
    settings = {
        "run": fingerprint(tuned.params),
        "task": evaluation.task.name,
        "examples": len(evaluation.task.test),
        "dtype": str(evaluation.dtype),
        "seed": args.seed,
        "exclude": args.exclude,
    }
    del tuned  # its memory is needed
    more = {}
    for name in ("other", "walk"):
        folder = getattr(args, name)
        if folder is not None:
            more[name], settings[name] = load_more(
                folder, base.params, args.exclude, shuffled=name == "walk"
            )
    claim_results(args.out, settings)
    parts = parts_of(delta, args.seed, **more)
    path = args.out / "results.jsonl"
    size = args.batch_size
    ask_all(evaluation, base.params, delta, parts, args.shares, path, size)
    write_report(args.out, read_rows(path), plan(list(parts), args.shares), settings)


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
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--other", type=Path, help="run of another seed")
    parser.add_argument("--walk", type=Path, help="run of shuffled fitness")
    parser.add_argument("--task", default="", help="by default that of the run")
    parser.add_argument(
        "--shares", type=percentages, default=SHARES, help="in percent of the entries"
    )
    parser.add_argument(
        "--exclude",
        type=lambda text: text.split(","),
        default=[],
        help="prefixes of tensors that stay as they are, such as embed,layers/mlp",
    )
    parser.add_argument("--examples", type=at_least(0), default=0, help="0 for all")
    parser.add_argument("--root", default="", help="folder of parquet files")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights that answer; by default a run's"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=256)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of random masks")
    args = parser.parse_args()

    def command() -> None:
        with alone(args.out):
            study(args)

    guarded(command, "the same command goes on from what was saved")


if __name__ == "__main__":
    main()
