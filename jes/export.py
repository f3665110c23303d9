"""Rebuilds the weights of a run from the base model and the ledger alone.

    python -m jes.export --run=FOLDER --out=FOLDER [--generations=N] [--push=OWNER/NAME]

A ledger is a file of kilobytes: with the base model it is the fine-tuned model. The
rebuilt weights are checked against the fingerprint that the run left. The same
versions on the same kind of machine give the same bits.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from jes import quantize
from jes.config import DTYPES
from jes.core import ledger as ledgers
from jes.core.anchor import keep_anchor
from jes.core.evolution import Evolution
from jes.errors import InputError
from jes.io import checkpoints
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.io.versions import changed_since
from jes.models.weights import BESIDE, Pretrained, fingerprint
from jes.update import first_centre, first_state, replay, weights_of


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
    count = len(ledger.fitness) if generations is None else generations
    if not 0 <= count <= len(ledger.fitness):
        raise InputError(
            f"there is no state after {count} generations: {ledger.path} has "
            f"{len(ledger.fitness)}"
        )
    rebuilt = replayed(ledger, load_base(ledger, model), count)
    check_fingerprint(ledger, count, fingerprint(rebuilt.params))
    return rebuilt


def replayed(
    ledger: ledgers.Ledger, base: Pretrained, count: int, folder: Path | None = None
) -> Pretrained:
    """The model after `count` generations of the ledger, not checked.

    The weights of `base` are donated. Of a `folder` of checkpoints the newest one that
    can be read saves time.
    """
    evolution, start = evolution_of(ledger), 0
    state = first_centre(evolution, base.params), first_state(evolution, base.params)
    anchor = None
    if evolution.decay != "none" and not evolution.whole_numbers:
        anchor = keep_anchor(base.params, evolution.anchor, base.stored_dtype)
    found = folder and checkpoints.restore_latest(folder, state, count)
    if found:
        start, state = found
    root, fitness = jax.random.key(ledger.header["seed"]), ledger.fitness[start:count]
    centre, _ = replay(evolution, *state, root, fitness, start, anchor)
    params = weights_of(evolution, centre, base.params)
    return dataclasses.replace(base, params=params)


def load_base(ledger: ledgers.Ledger, model: str = "") -> Pretrained:
    """The model that a run started from; InputError if there is another one now."""
    header = ledger.header
    name = model or header["model"]
    form, size = header.get("quantize", ""), header.get("group_size", 0)
    pretrained = quantize.load_base(name, form, size, header["dtype"])
    if fingerprint(pretrained.params) != header["base"]:
        raise InputError(
            f"{name} is not the model that the run started from (its fingerprint "
            "differs)"
        )
    return pretrained


def evolution_of(ledger: ledgers.Ledger) -> Evolution:
    """The settings of the update, as the run had them."""
    try:
        return Evolution.from_header(ledger.header["evolution"])
    except TypeError as error:  # of another version of jes
        raise InputError(f"{ledger.path}: its settings: {error}") from error


def check_fingerprint(ledger: ledgers.Ledger, count: int, found: str) -> None:
    """Raises InputError if a run noted other weights after `count` generations."""
    expected = ledger.fingerprints.get(count)
    if expected is None:
        console.print(f"the run left no fingerprint after {count} generations to check")
        return
    if found == expected:
        console.print(f"fingerprint after {count} generations is right: {expected}")
        return
    changed = changed_since(ledger.header["versions"])
    raise InputError(
        "the rebuilt weights are not bit for bit those of the run"
        + (f" ({changed})" if changed else "; was the ledger changed?")
    )


def read_ledger(run: Path) -> ledgers.Ledger:
    """The ledger of a run folder, or a ledger file.

    Raises:
      InputError: if there is none, or it is damaged.
    """
    path = run / "ledger.jsonl" if run.is_dir() else run
    try:
        ledger = ledgers.read(path)
    except FileNotFoundError:
        raise InputError(f"there is no ledger at {path}") from None
    except ValueError as error:
        raise InputError(str(error)) from error
    needed = {"model", "base", "seed", "evolution", "dtype", "versions"}
    if missing := needed - ledger.header.keys():
        raise InputError(f"{path}: the header lacks {', '.join(sorted(missing))}")
    return ledger


def read_card(run: Path) -> dict[str, Path]:
    """The card of a finished run, and what it shows, by name."""
    files = {name: run / "model" / name for name in BESIDE}
    return {name: path for name, path in files.items() if path.is_file()}


def push(folder: Path, name: str, beside: Mapping[str, Path]) -> None:
    """Uploads a model folder to the Hugging Face hub, with the files beside it.

    Raises:
      InputError: if the hub refuses it or is out of reach.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
        for there, path in beside.items():
            hub.upload_file(path_or_fileobj=path, path_in_repo=there, repo_id=name)
    except Exception as error:  # one of a dozen kinds
        line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--push={name}: {line}; `hf auth login` or HF_TOKEN says who you are"
        ) from error
    console.print(f"uploaded to {address}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder or ledger")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--push", default="", help="owner/name on the hub to upload to")
    parser.add_argument("--model", default="", help="where the base model is now")
    parser.add_argument("--generations", type=at_least(0), help="by default all")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the written weights; by default the run's"
    )
    args = parser.parse_args()

    def command() -> None:
        ledger = read_ledger(args.run)
        rebuilt = rebuild(ledger, args.model, args.generations)
        rebuilt.save(args.out, dtype=args.dtype or ledger.header["dtype"])
        console.print(f"model in {args.out}")
        if args.push:
            push(args.out, args.push, read_card(args.run))

    guarded(command)


if __name__ == "__main__":
    main()
