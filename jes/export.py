"""Rebuilds the weights of a run from the base model and the ledger alone.

    python -m jes.export --run=FOLDER --out=FOLDER [--generations=N]

A ledger is a file of kilobytes: with the base model it is the fine-tuned model. The
rebuilt weights are checked against the fingerprint that the run left. The same
versions on the same kind of machine give the same bits.
"""

import argparse
import dataclasses
from pathlib import Path

import jax

from jes.core import ledger as ledgers
from jes.errors import InputError
from jes.io import command_line, runs
from jes.io.progress import console
from jes.models.weights import Pretrained, fingerprint, load
from jes.tell import Evolution, make_optimizer, replay


def rebuild(
    ledger: ledgers.Ledger, model: str = "", generations: int | None = None
) -> Pretrained:
    """The model after so many generations, by default all, replayed from its base.

    Args:
      ledger: of the run.
      model: where the base model is now, if not where the run found it.
      generations: how many to replay.

    Raises:
      InputError: if the base is another one, the ledger is shorter than that, or the
        result is not what the run had (its fingerprint differs).
    """
    header = ledger.header
    count = len(ledger.fitness) if generations is None else generations
    if not 0 <= count <= len(ledger.fitness):
        raise InputError(f"the ledger has {len(ledger.fitness)} generations")
    pretrained = load(model or header["model"])
    if fingerprint(pretrained.params) != header["base"]:
        raise InputError(
            f"{model or header['model']} is not the model that the run started from "
            "(its fingerprint differs)"
        )
    evolution = Evolution(**header["evolution"])
    optimizer = make_optimizer(evolution).init(pretrained.params)
    root = jax.random.key(header["seed"])
    params, _ = replay(
        evolution, pretrained.params, optimizer, root, ledger.fitness[:count]
    )
    expected = ledger.fingerprints.get(count)
    if expected is None:
        console.print(f"the run left no fingerprint after {count} generations to check")
    elif fingerprint(params) != expected:
        now = runs.versions()
        others = {k: (v, now.get(k)) for k, v in header["versions"].items()}
        changed = [f"{k} {a} then, {b} now" for k, (a, b) in others.items() if a != b]
        raise InputError(
            "the rebuilt weights are not bit for bit those of the run"
            + (f" ({'; '.join(changed)})" if changed else "")
        )
    else:
        console.print(f"fingerprint after {count} generations is right: {expected}")
    return dataclasses.replace(pretrained, params=params)


def read_ledger(run: Path) -> ledgers.Ledger:
    """The ledger of a run folder, or a ledger file.

    Raises:
      InputError: if there is none, or it is damaged.
    """
    path = run / "ledger.jsonl" if run.is_dir() else run
    try:
        return ledgers.read(path)
    except FileNotFoundError:
        raise InputError(f"there is no ledger at {path}") from None
    except ValueError as error:
        raise InputError(str(error)) from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder or ledger")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--model", default="", help="where the base model is now")
    parser.add_argument("--generations", type=int, help="how many; by default all")
    parser.add_argument("--dtype", help="of the written weights; by default the run's")
    args = parser.parse_args()

    def command() -> None:
        ledger = read_ledger(args.run)
        rebuilt = rebuild(ledger, args.model, args.generations)
        rebuilt.save(args.out, dtype=args.dtype or ledger.header["dtype"])
        console.print(f"model in {args.out}")

    command_line.guarded(command)


if __name__ == "__main__":
    main()
