"""Rows of public data sets, through Hugging Face `datasets`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jes.errors import InputError


def read_rows(
    repository: str, config: str, split: str, columns: Sequence[str], root: str = ""
) -> list[dict[str, Any]]:
    """The rows of one split, as dicts of plain Python values.

    Args:
      repository: name on the hub, such as 'allenai/ai2_arc'.
      config: configuration of the data set; '' where it has only one.
      split: 'train', 'validation' or 'test'.
      columns: the columns that must be there.
      root: folder that holds `<name without owner>/<config>/<split>.parquet`; without
        it the rows come from the hub, or from its cache.

    Raises:
      InputError: if the split or a column is missing, or there is no way to the hub.
    """
    data = _from_folder(repository, config, split, root) if root else None
    if data is None:
        data = _from_hub(repository, config, split)
    missing = [c for c in columns if c not in data.column_names]
    if missing:
        raise InputError(
            f"{repository} {config} {split}: no column {', '.join(missing)}; the "
            f"columns are {', '.join(data.column_names)}"
        )
    return data.select_columns(list(columns)).to_list()


def _from_folder(repository: str, config: str, split: str, root: str) -> Any:
    from datasets import Dataset  # here: the import takes seconds

    folder = Path(root).expanduser() / repository.split("/")[-1] / config
    file = folder / f"{split}.parquet"
    if not file.is_file():
        there = sorted(p.name for p in folder.glob("*.parquet"))
        raise InputError(
            f"data.root: there is no {file}"
            + (f"; the folder has {', '.join(there)}" if there else "")
        )
    try:
        return Dataset.from_parquet(str(file), keep_in_memory=True)
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise InputError(f"{file} cannot be read: {error}") from error


def _from_hub(repository: str, config: str, split: str) -> Any:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            # Asked first because it takes a time limit; `load_dataset` retries long.
            HfApi().dataset_info(repository, timeout=5)
    except Exception:  # no network: a cached copy will do
        constants.HF_HUB_OFFLINE = True
    try:
        return load_dataset(repository, config or None, split=split)
    except Exception as error:  # one of a dozen kinds, by the version of the hub
        raise InputError(
            f"{repository} {config} {split} could not be had from the Hugging Face hub "
            f"({str(error).strip().splitlines()[0]}). Give a folder of parquet files "
            "with --config.data.root=FOLDER, or run configs/tiny.py, which needs none"
        ) from error
