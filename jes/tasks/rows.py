"""Rows of public data sets: from parquet files, or from the Hugging Face hub."""

import json
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jes.errors import InputError, Unavailable

FOLDERS = {
    "TIGER-Lab/MMLU-Pro": "mmlu_pro",
    "Jiayi-Pan/Countdown-Tasks-3to4": "countdown",
}
"""Folders of a `root` that are not named like the repository."""
BUILDERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""How `datasets` reads a file, by the end of its name."""
SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.parquet")


def read_rows(
    repository: str,
    config: str,
    split: str,
    columns: Sequence[str],
    root: str = "",
    order: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one split, as dicts of plain Python values.

    Args:
      repository: name on the hub, such as 'allenai/ai2_arc'.
      config: configuration of the data set; '' where it has only one.
      split: 'train', 'validation' or 'test'.
      columns: the columns to read.
      root: folder with `<name without owner>/<config>/<split>.parquet`, or the files
        `<split>-00000-of-00001.parquet` of the hub; '' for the hub, or its cache.
      order: from the number of rows, which ones to return; by default all.

    Raises:
      InputError: if the split or a column is missing, or the hub is out of reach.
    """
    if root:
        name = FOLDERS.get(repository, repository.split("/")[-1])
        table = _from_folder(Path(root).expanduser() / name / config, split)
    else:
        table = _from_hub(repository, config, split)
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise InputError(
            f"{repository} {config} {split}: no column {', '.join(missing)}; the "
            f"columns are {', '.join(table.column_names)}"
        )
    table = table.select(list(columns))
    return (table.take(order(len(table))) if order else table).to_pylist()


def read_train_and_test(
    repository: str,
    columns: Sequence[str],
    root: str,
    sizes: tuple[int, int],
    order: Callable[[int], Any] = np.arange,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """So many rows to train on and held out: the splits `train` and `test` of a `root`.

    On the hub, both are the first rows of `train` in the order given.
    """
    (train, test), read = sizes, partial(read_rows, repository, "")
    if root:
        return read("train", columns, root)[:train], read("test", columns, root)[:test]
    rows = read("train", columns, order=lambda count: order(count)[: train + test])
    return rows[:train], rows[train:]


def read_data(source: str) -> list[dict[str, Any]]:
    """The rows of a file, a folder, or a data set on the hub, as plain Python values.

    Args:
      source: a file that ends in .jsonl, .json, .csv or .parquet; a folder that
        `datasets` can load; or 'owner/name[:config][:split]' (the split 'train').

    Raises:
      InputError: if it is not there or cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return _json_lines(path)
    if not path.exists() and (path.suffix or source.count("/") != 1):
        raise InputError(f"there is no file {source}")
    if path.is_file() and path.suffix not in BUILDERS:
        known = ", ".join([".jsonl", *BUILDERS])
        raise InputError(f"{source}: its name must end in one of {known}")
    if not path.exists():
        repository, *rest = source.split(":")
        split = rest.pop() if rest else "train"
        return _from_hub(repository, "".join(rest), split).to_pylist()
    if path.is_dir():
        _check_complete(sorted(path.rglob("*.parquet")))
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    kind = {"path": str(path)}
    if path.is_file():
        kind = {"path": BUILDERS[path.suffix], "data_files": str(path)}
    try:
        # A copy in the usual cache would stay there.
        with tempfile.TemporaryDirectory() as cache:
            rows = load_dataset(
                **kind, split="train", cache_dir=cache, keep_in_memory=True
            )
            return rows.to_list()
    except Exception as error:  # one of a dozen kinds, by the form of the file
        cause = error.__cause__ or error
        text = str(cause).strip().splitlines() or [type(cause).__name__]
        raise InputError(f"{source} cannot be read: {text[0]}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    return rows


def _check_complete(files: Sequence[Path]) -> None:
    """Raises InputError if a file of a numbered set is not there."""
    for file in files:
        found = SHARD.fullmatch(file.name)
        if found is None:
            continue
        stem, _, count = found.groups()
        names = [f"{stem}-{i:05d}-of-{count}.parquet" for i in range(int(count))]
        missing = [name for name in names if not (file.parent / name).exists()]
        if missing:
            raise InputError(f"{file.parent}: {missing[0]} is missing")


def one_of(answer: str, answers: Sequence[str], where: str) -> str:
    """The answer of a row; an `InputError` if it is not one of the answers.

    Hidden test splits have no answers, say.
    """
    if answer not in list(answers):  # in a string, `in` would find '' too
        raise InputError(
            f"{where}: the answer {answer!r} is not one of {', '.join(answers)}"
        )
    return answer


def subset(rows: list[Any], size: int = 2048) -> list[Any]:
    """All rows, or of more than `size` a fixed random subset.

    2605.30148 uses as many rows and the same seed, but does not say how it draws them.
    """
    return rows if len(rows) <= size else random.Random(2357).sample(rows, size)


def _from_folder(folder: Path, split: str) -> Any:
    # Not with `datasets`, which would copy the file into its cache first.
    import pyarrow as pa
    from pyarrow import parquet

    files = [*folder.glob(f"{split}.parquet")]
    files = files or sorted(folder.glob(f"{split}-*-of-*.parquet"))
    _check_complete(files)
    if not files:
        there = sorted(path.name for path in folder.glob("*.parquet"))
        raise InputError(
            f"data.root: there is no {folder / split}.parquet"
            + (f"; the folder has {', '.join(there)}" if there else "")
        )
    try:
        return pa.concat_tables([parquet.read_table(file) for file in files])
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"{folder}: {split} cannot be read: {first_line}") from error


def _from_hub(repository: str, config: str, split: str) -> Any:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            # This request has a time limit; `load_dataset` would retry for long.
            HfApi().dataset_info(repository, timeout=5)
    except Exception:  # no network: a cached copy will do
        constants.HF_HUB_OFFLINE = True
    try:
        return load_dataset(repository, config or None, split=split).data.table
    except Exception as error:  # one of a dozen kinds, by the version of the hub
        raise Unavailable(
            f"{repository} {config} {split} could not be read from the Hugging Face "
            f"hub ({str(error).strip().splitlines()[0]}). Give a folder of parquet "
            "files with --config.data.root=FOLDER, or run configs/tiny.py, which needs "
            "none"
        ) from error
