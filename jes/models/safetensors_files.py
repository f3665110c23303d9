"""The files of a model folder: tensors one at a time, the folder as a whole.

A folder holds `model.safetensors`, or several shards and an index that names them. A
7B model does not fit twice into a small host, so nothing here ever holds more than
one tensor: reading maps the files, writing takes each tensor when its turn comes.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jes.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Name in safetensors of a dtype that unquantised weights have, and the dtype."""

DTYPES = FLOATS | {"I32": np.dtype(np.int32), "I8": np.dtype(np.int8)}
"""The same for every tensor that is written."""


class WeightsError(InputError):
    """A model folder that cannot be found, read or written; the message says why."""


class Tensor(NamedTuple):
    """A tensor that is in memory only between `read()` and the end of its use.

    Attributes:
      shape: its shape.
      dtype: its dtype as safetensors names it, such as 'BF16'.
      read: gives the values, a C-contiguous array.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Expected(NamedTuple):
    """What a tensor of a folder is to be.

    Attributes:
      shape: its shape.
      dtypes: those that it may have.
      needed: whether it has to be there.
      zero: whether it may hold nothing but zeros.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(FLOATS)
    needed: bool = True
    zero: bool = False


def dtype_name(dtype: np.dtype) -> str:
    """The name in safetensors of a dtype of `DTYPES`."""
    (name,) = (name for name, stored in DTYPES.items() if stored == dtype)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      WeightsError: if the file cannot be read or holds anything else.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return contents


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
      WeightsError: if there are none, or not all that the index names.
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
            + (hint if torch_files else "")
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
                tensors[name] = Tensor(
                    tuple(stored.get_shape()),
                    stored.get_dtype(),
                    partial(file.get_tensor, name),
                )
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is truncated or not a safetensors file ({error})"
            ) from error
    return tensors


def room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled, for `jax.device_put` to take over without a copy."""
    # On a 64-byte boundary the CPU backend takes the buffer over as it is.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def copy_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source.T` in blocks that suit the cache: 2 to 7 times faster."""
    for start in range(0, source.shape[0], 16):
        target[:, start : start + 16] = source[start : start + 16].T


def read_finite(name: str, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The values of a tensor.

    Raises:
      WeightsError: if there is a NaN or an infinity among them.
    """
    values = tensors[name].read()
    if not np.isfinite(values).all():
        raise WeightsError(f"{name} holds values that are not finite")
    return values


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and an index.

    A tensor larger than that gets a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file: length of the header, header, then the values in turn.

    `safetensors.numpy.save_file` needs all tensors of the file in memory.
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
        # A network file system may find out only now that it is full.
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replaced(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A new, empty folder, which takes the place of `folder` if the block succeeds.

    Until then it lies beside it as `.<name>.partial`: neither a full disk nor a kill
    leaves half a model under the name of a whole one.

    Args:
      folder: the place, with or without a model there.
      names: the files, beside the weights, that may be deleted there.

    Raises:
      WeightsError: if something else than a model is there, or if writing fails.
    """
    folder = folder.expanduser().resolve()
    _check_replaceable(folder, names)
    new = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    try:
        _settle(folder, new, old)  # what a killed run left
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        raise WeightsError(f"could not save the model to {folder}: {error}") from error
    finally:
        _settle(folder, new, old)


def _settle(folder: Path, new: Path, old: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(folder: Path, names: Collection[str]) -> None:
    """Refuses to delete anything but a model (a run folder has a config.json too)."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise WeightsError(f"cannot save a model as {folder}, which is a file")
    foreign = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in (INDEX, *names) and path.suffix != ".safetensors"
    ]
    if foreign:
        raise WeightsError(
            f"will not replace {folder}: it holds more than a model "
            f"({', '.join(foreign[:5])}); save to a folder of its own"
        )
