"""The files of a model folder: finding it, reading and writing its tensors.

A folder holds `model.safetensors`, or several shards and an index of them. Large
models do not fit twice into host memory, so one tensor at most is held here: reading
maps the files, and writing asks for each tensor in turn.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from re import fullmatch
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jes.errors import InputError, Unavailable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of unquantised weights, by their names in safetensors files."""

DTYPES = FLOATS | {"I32": np.dtype(np.int32), "I8": np.dtype(np.int8)}
"""Dtypes that are written."""

EMBEDDED = {
    name: Path(__file__).parent / name.replace("-", "_")
    for name in ("tiny", "tiny-knowing")
}
"""The models that come with the package."""

_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")
_SECONDS = 5.0
"""Time limit for the first answer of the hub."""


class WeightsError(InputError):
    """A model folder that cannot be found, read or written; the message says why."""


class UnreachableError(WeightsError, Unavailable):
    """The hub did not answer."""


class Tensor(NamedTuple):
    """A tensor; `read` returns its values, C-contiguous.

    The dtype is named as in safetensors files ('BF16').
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Expected(NamedTuple):
    """Requirements on a tensor of a folder: `zero` if all its values must be 0."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(FLOATS)
    needed: bool = True
    zero: bool = False


def dtype_name(dtype: np.dtype) -> str:
    """The safetensors name of a dtype of `DTYPES`."""
    return {stored: name for name, stored in DTYPES.items()}[np.dtype(dtype)]


# Finding a folder.


def locate(name: str | os.PathLike[str], wanted: Sequence[str] | None = None) -> Path:
    """The folder of a model.

    Args:
      name: a folder; 'tiny' or 'tiny-knowing', the embedded models (write './tiny' for
        a folder of that name); or a hub id, 'owner/model'. A complete copy in the
        hub's cache is used without asking the network.
      wanted: patterns of the files to download; by default all that `load` reads.

    Raises:
      WeightsError: if there is no such folder, or the hub does not provide the model.
    """
    embedded = EMBEDDED.get(name) if isinstance(name, str) else None
    folder = embedded or Path(name).expanduser()
    if folder.is_dir():
        return folder
    if embedded:
        raise WeightsError(f"this installation of jes lacks {folder}")
    if folder.exists():
        raise WeightsError(f"{folder} is a file; a model is a folder")
    if not fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise WeightsError(
            f"there is no folder {str(name)!r} (and a model on the Hugging Face hub "
            f"has a name like 'Qwen/Qwen2.5-0.5B-Instruct')"
        )
    return _cached(str(name)) or _downloaded(str(name), wanted or _DOWNLOADED)


def _cached(name: str) -> Path | None:
    """The copy in the hub's cache, if complete (it may hold the tokenizer only)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, WeightsError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _downloaded(name: str, wanted: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        # This request has a time limit: behind a firewall that drops packets, the
        # download alone would retry for minutes.
        HfApi().model_info(name, timeout=_SECONDS)
        return Path(snapshot_download(name, allow_patterns=list(wanted)))
    # Any exception: which HTTP library raises depends on the version of the hub's.
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        # Of a gated model, too.
        unknown = isinstance(error, errors.RepositoryNotFoundError)
        kind = WeightsError if unknown else UnreachableError
        reason = f"no network, or the hub does not answer ({first_line})"
        if isinstance(error, errors.GatedRepoError):
            reason = (
                f"it is gated (accept its terms on https://huggingface.co/{name}, then "
                "log in with `hf auth login`)"
            )
        elif unknown:
            reason = "there is no such model, or it is private (`hf auth login`)"
        raise kind(
            f"there is no folder {name!r}, and it could not be downloaded from the "
            f"Hugging Face hub: {reason}. Either give the path of a folder that holds "
            "config.json, model.safetensors and the tokenizer, or run configs/tiny.py, "
            "whose model is part of the package and needs no download"
        ) from error


# Reading.


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      WeightsError: if the file cannot be read or is not a JSON object.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return contents


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
      WeightsError: if there are none, or some that the index names are missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        torch_files = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        hint = (
            f"; it holds {', '.join(torch_files)}, pickles of PyTorch: load them with "
            "transformers, whose save_pretrained writes safetensors"
        )
        raise WeightsError(
            f"{folder} holds no weights: neither {SINGLE} nor {INDEX}"
            f"{hint if torch_files else ''}"
        )
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{folder / INDEX} has no 'weight_map'")
    files = [folder / name for name in sorted(set(names.values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise WeightsError(
            f"{folder} is incomplete: {INDEX} names {len(files)} shards, of which "
            f"{len(absent)} are not there: {', '.join(absent)}"
        )
    return files


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder by name; values are read on demand.

    Raises:
      WeightsError: if files are missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="numpy")
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                stored = file.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                tensors[name] = Tensor(shape, dtype, partial(file.get_tensor, name))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is truncated or not a safetensors file ({error})"
            ) from error
    return tensors


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` on a 64-byte boundary: JAX on a CPU uses its memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def copy_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source.T` in blocks that suit the cache: 2 to 7 times faster."""
    for start in range(0, source.shape[0], 16):
        target[:, start : start + 16] = source[start : start + 16].T


def transposed(source: np.ndarray, dtype: np.dtype | None = None) -> Any:
    """A transposed matrix, C-contiguous, in `dtype` if given."""
    target = np.empty(source.shape[::-1], dtype or source.dtype)
    copy_transposed(source, target)
    return target


# Writing.


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and an index.

    A tensor larger than that gets a shard of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for filename, names in split.filename_to_tensors.items():
        _write_file(folder / filename, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file: length of the header, header, then the values in turn.

    Not with `safetensors.numpy.save_file`, which needs the whole file in memory.
    """
    # transformers refuses a file that does not say which framework wrote it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(tensor.read().reshape(-1).view(np.uint8).data)
        # A network file system may report only here that it is full.
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replaced(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A new, empty folder, which takes the place of `folder` if the block succeeds.

    Until then its name is `.<name>.partial`, so that neither a full disk nor a kill
    leaves half a model under the name of a whole one.

    Raises:
      WeightsError: if `folder` holds more than a model (weights and the files `names`),
        or if writing fails.
    """
    folder = folder.expanduser().resolve()
    _check_replaceable(folder, names)
    new = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    try:
        _clean_up(folder, new, old)  # after a save that was killed
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        raise WeightsError(f"could not save the model to {folder}: {error}") from error
    finally:
        _clean_up(folder, new, old)


def _clean_up(folder: Path, new: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(folder: Path, names: Collection[str]) -> None:
    """Refuses to delete anything but a model (a run folder has a config.json too)."""
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"cannot save a model as {folder}, which is a file")
    foreign = [
        path.name
        for path in sorted(folder.glob("*"))
        if path.name not in (INDEX, *names) and path.suffix != ".safetensors"
    ]
    if foreign:
        raise WeightsError(
            f"will not replace {folder}: it holds more than a model "
            f"({', '.join(foreign[:5])}); save to a folder of its own"
        )
