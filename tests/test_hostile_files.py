"""Files that were damaged or made to harm: one line, in bounded time and memory."""

import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jes
from jes.errors import InputError
from jes.export import read_ledger
from jes.models.safetensors_files import open_tensors
from jes.tasks.rows import read_data

SECONDS = 5.0
"""The longest that a file of kilobytes may take."""
MEGABYTES = 500
"""By how much the process may grow over all."""

NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, 1e-300]
ODD: list[Any] = [None, True, "", "x", [], {}, [[]], {"a": 1}, "\ud800", "9" * 99]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, repeated or put in."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(found) + 1)
        what = rng.randrange(5)
        if what == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del found[at : at + rng.choice([1, 7, 100])]
        elif what == 2:
            found[at:at] = found[: rng.choice([1, 8, 64])]
        elif what == 3:
            found[at:at] = rng.choice([b"\0", b"[" * 2000, b"\xff\xfe", b'"', b"}"])
        else:
            found = found[:at] or found
    return bytes(found)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A number, a text or a field changed somewhere inside."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        what = rng.randrange(6)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return value | {key: rng.choice(NUMBERS + ODD)}
        if what == 2:
            return value | {rng.choice(["", "x", key * 2]): value[key]}
        return value | {key: mutated_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutated_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(NUMBERS + ODD)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@pytest.fixture
def files(small_model: Path, finished_run: Path, tmp_path: Path) -> dict[str, Any]:
    """By kind: a file's bytes or JSON, where it goes, and what reads it."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "model"
    folder.mkdir()
    for file in small_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    table = pa.table({"question": ["a", "b"], "answer": [1, 2]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes((finished_run / "ledger.jsonl").read_bytes())

    def read_weights() -> None:
        for tensor in open_tensors(folder).values():
            tensor.read()

    return {
        "safetensors": (weights, weights.read_bytes(), read_weights),
        "config": (folder / "config.json", None, lambda: jes.load(folder)),
        "tokenizer": (folder / "tokenizer.json", None, lambda: jes.load(folder)),
        "ledger": (ledger, ledger.read_bytes(), lambda: read_ledger(ledger)),
        "parquet": (
            tmp_path / "rows.parquet",
            (tmp_path / "rows.parquet").read_bytes(),
            lambda: read_data(str(tmp_path / "rows.parquet")),
        ),
    }


def attempt(read: Callable[[], Any], what: str) -> bool:
    """Whether the file was refused; fails for any other exception, or if it is slow."""
    began, said = time.monotonic(), None
    try:
        read()
    except InputError as error:
        said = str(error).strip()
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert said is None or said, what
    assert time.monotonic() - began < SECONDS, what
    return said is not None


COUNTS = {
    "safetensors": 400,
    "config": 100,
    "tokenizer": 40,
    "ledger": 600,
    "parquet": 40,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_mutations(kind: str, files: dict[str, Any]) -> None:
    mutate(kind, files, COUNTS[kind], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_many_mutations(kind: str, files: dict[str, Any]) -> None:
    """Some 10,000 with those above."""
    more = {"safetensors": 2600, "config": 900, "tokenizer": 160, "ledger": 5000}
    mutate(kind, files, more.get(kind, 160), 1)


def mutate(kind: str, files: dict[str, Any], count: int, seed: int) -> None:
    path, data, read = files[kind]
    original = path.read_bytes() if data is None else data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, refused = random.Random(f"{kind} {seed}"), 0
    for number in range(count):
        if kind in ("config", "tokenizer") and rng.random() < 0.7:
            changed = dumped(mutated_json(json.loads(original), rng))
        elif kind == "safetensors" and rng.random() < 0.7:
            changed = with_header(original, rng)
        else:
            changed = mutated_bytes(original, rng)
        path.write_bytes(changed)
        refused += attempt(read, f"{kind} {seed} {number}")
    path.write_bytes(original)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024
    assert refused > 0
    assert not attempt(read, kind)


def with_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: offsets, shapes, dtypes, lengths."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = dumped(mutated_json(header, rng))
    said = rng.choice([len(text)] * 6 + [0, len(text) - 1, 2**40, 2**63])
    return struct.pack("<Q", said) + text + data[8 + length :]


@pytest.mark.parametrize("kind", ["config", "tokenizer", "ledger"])
def test_a_million_brackets(kind: str, files: dict[str, Any]) -> None:
    path, _, read = files[kind]
    for text in ("[" * 1_000_000, '{"a":' * 1_000_000):
        path.write_text(text)
        assert attempt(read, kind)


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "head_dim",
    ],
)
def test_shapes_beyond_the_file_are_refused_at_once(
    field: str, files: dict[str, Any]
) -> None:
    path, _, _ = files["config"]
    config = json.loads(path.read_text())
    for value in (10**6, 10**9, 10**18):
        path.write_text(json.dumps(config | {field: value}))
        assert attempt(lambda: jes.load(path.parent), f"{field}={value}")


def test_rows_are_bounded_too(tmp_path: Path) -> None:
    for name, text in {
        "a.jsonl": "[" * 1_000_000,
        "b.json": "[" * 1_000_000,
        "c.csv": '"' * 1_000_000,
    }.items():
        (tmp_path / name).write_text(text)
        assert attempt(lambda name=name: read_data(str(tmp_path / name)), name)
