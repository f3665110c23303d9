"""The ledger: exact, small, and readable whatever the last write came to."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jes.core import ledger as ledgers

HEADER = {"model": "tiny", "base": "ab" * 32, "seed": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of three generations of four members."""
    path = tmp_path / "ledger.jsonl"
    ledgers.create(path, HEADER)
    for generation in range(3):
        ledgers.append_generation(path, generation, np.float32([0.1, 0.2, 0.3, 0.4]))
    return path


def test_fitness_reads_back_to_the_same_bits(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (100, 64), np.uint32)
    path = tmp_path / "ledger.jsonl"
    ledgers.create(path, HEADER)
    written = bits.view(np.float32)  # of all magnitudes, subnormal and not finite
    for generation, fitness in enumerate(written):
        ledgers.append_generation(path, generation, fitness)
    read = np.stack(ledgers.read(path).fitness)
    finite = np.isfinite(written)
    assert finite.mean() > 0.9
    np.testing.assert_array_equal(read[finite], written[finite])
    assert np.isnan(read[~finite]).all()
    assert "NaN" not in path.read_text()


def test_a_run_of_the_size_of_tiny_is_kilobytes(tmp_path: Path) -> None:
    """120 generations of 32 members: shares of 64 prompts, and any number at all."""
    path = tmp_path / "ledger.jsonl"
    rng = np.random.default_rng(0)
    for rewards, limit in (
        (rng.integers(0, 65, (120, 32)) / 64, 50_000),
        (rng.normal(size=(120, 32)), 60_000),
    ):
        ledgers.create(path, HEADER)
        for generation, fitness in enumerate(rewards.astype(np.float32)):
            ledgers.append_generation(path, generation, fitness)
        ledgers.append_fingerprint(path, 120, "ab" * 32)
        assert path.stat().st_size < limit


def test_says_what_it_was_told(path: Path) -> None:
    ledgers.append_fingerprint(path, 3, "cd" * 32)
    ledgers.append_generation(path, 3, np.float32([1, 2, 3, 4]))
    ledger = ledgers.read(path)
    assert ledger.header == {"format": ledgers.FORMAT, **HEADER}
    assert [len(fitness) for fitness in ledger.fitness] == [4] * 4
    assert ledger.fingerprints == {3: "cd" * 32}
    assert ledger.size == path.stat().st_size


def test_a_last_line_cut_anywhere_is_left_out(path: Path) -> None:
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert len(ledgers.read(path).fitness) == 2
        assert path.read_bytes() == whole[:end]
        assert len(ledgers.repair(path).fitness) == 2
        assert path.read_bytes() == whole[:start]
    ledgers.append_generation(path, 2, np.float32([0.1, 0.2, 0.3, 0.4]))
    assert path.read_bytes() == whole


def test_what_a_killed_creation_left_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.with_suffix(".part").write_text('{"format": "jes-led')
    ledgers.create(path, HEADER)
    assert ledgers.read(path).header["model"] == "tiny"
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (0, {"format": "other"}, "not a ledger of this version"),
        (1, "{", "line 2 is damaged"),
        (1, "3", "line 2 is damaged"),
        (1, {"generation": 0}, "line 2 is damaged"),
        (1, {"generation": 1, "fitness": [1] * 4}, "generation 1 where 0 is due"),
        (2, {"generation": 1, "fitness": [1] * 3}, "3 members, 4 before"),
        (2, {"generation": 1, "fitness": ["x"] * 4}, "line 3 is damaged"),
    ],
)
def test_damage_is_named(
    path: Path, line: int, replacement: str | dict, message: str
) -> None:
    lines = path.read_text().splitlines()
    text = replacement if isinstance(replacement, str) else json.dumps(replacement)
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        ledgers.read(path)


def test_a_full_disk_names_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*ledger\.jsonl"):
        ledgers.append_generation(path, 3, np.float32([1, 2, 3, 4]))
