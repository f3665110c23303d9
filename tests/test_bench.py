"""The benchmark: every row at a small size, and what it says of given numbers."""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except

import jes
from jes.bench import __main__ as bench
from jes.bench import cases, generations, memory, noise, rollouts
from jes.bench.cases import Case, generation, inference, random_model
from jes.bench.timing import Row, compare, row_of, table
from jes.core.evolution import Evolution
from jes.core.noise import DISTRIBUTIONS
from jes.io.compiled import keep_compiled

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
SMALL: dict[Any, dict[str, Any]] = {
    cases: {"SHAPES": dict.fromkeys(cases.SHAPES, (102, 32, 1, 4, 2, 64))},
    generations: {
        "MEMBERS": 2,
        "OVER_INFERENCE": [(n, (3, 8, 2), "") for n in ("4.5M", "0.5B shape")],
        "USUAL": {"members": 2, "prompts": 2, "new tokens": 2, "width": 64},
        "RANGES": {"members": (2, 4), "width": (32, 64)},
    },
    rollouts: {"PROMPTS": 8, "MEDIAN": 2, "LONGEST": 3, "COMMON": 40, "OWN": 3},
    noise: {
        "SHAPE": (77, 13),
        **{"MEMBERS": 3, "PROMPTS": 2, "PROMPT": 4, "NEW": 3, "POPULATION": 4},
        "CODES": (64, 128),
        **{"CODES_POPULATION": 4, "WINDOW": 3, "SIGMAS": {0.01: ""}},
    },
}
"""Sizes of the rows in a test."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, sizes in SMALL.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    tiny = random_model(jes.load("tiny"), **SHAPE)
    for module in (cases, generations):
        monkeypatch.setattr(module, "load", lambda name: tiny)


def check(row: Row) -> None:
    figures = [row.ratio, row.low, row.high, row.numerator, row.denominator]
    assert np.isfinite(figures).all()
    assert row.low <= row.ratio <= row.high
    assert min(row.numerator, row.denominator) > 0
    assert row.processor is None or row.processor > 0


@pytest.mark.parametrize(
    ("name", "count"),
    slow_except(
        {("noise", 9)},
        [
            ("generation", 5),
            ("rollouts", 2),
            ("prefix", 1),
            ("low_rank", 8),
            ("rounding", 3),
            ("scaling", 2),
            ("noise", 9),
        ],
    ),
)
def test_rows(name: str, count: int) -> None:
    rows = list(bench.ROWS[name](1))
    assert len({row.what for row in rows}) == count
    for row in rows:
        check(row)


def test_a_ratio_is_of_the_two_that_were_timed() -> None:
    calls: list[str] = []

    def work(name: str, size: int) -> None:
        calls.append(name)
        np.linalg.eigvalsh(np.ones((size, size)))

    runs = lambda: work("one", 500), lambda: work("two", 50)
    row = compare("a", "", runs, 5, 2.0)
    assert calls == ["one", "two"] * 6  # in turn; the first of each compiles
    assert row.numerator > row.denominator > 0
    assert row.low <= row.ratio <= row.high
    assert row.ratio > 2
    assert row.processor is not None


def test_quartiles_are_of_the_repeats() -> None:
    row = row_of("memory", "<= 2", np.array([1.0, 2, 3, 4, 5]), (30, 10), "MB")
    assert (row.low, row.ratio, row.high) == (2, 3, 4)
    assert (row.numerator, row.denominator, row.unit) == (30, 10, "MB")
    assert table([row]).row_count == 1


def test_a_generation_asks_and_tells() -> None:
    case = Case(cases.model_of("tiny"), 8, 24, 2)
    run = generation(case, Evolution(population=4, sigma=0.3, alpha=0.01))
    before = [np.array(leaf) for leaf in jax.tree.leaves(case.model.params)]
    moved = jax.tree.leaves(run())
    assert any((old != new).any() for old, new in zip(before, moved, strict=True))
    score = inference(case)()
    assert np.isfinite(score.reward)
    assert score.tokens == 8 * 2


def test_slopes_are_of_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost that is a power of the number has this power for its slope."""
    cost = iter([4.0**0.5, 16.0**0.5, 64.0**0.5] * 3)
    monkeypatch.setattr(generations, "RANGES", {"members": (4, 16, 64)})
    monkeypatch.setattr(generations, "sized", lambda sizes: (lambda: None, 0))
    monkeypatch.setattr(generations, "timed", lambda run: (next(cost), 0.0))
    (row,) = generations.scaling(3)
    assert row.ratio == pytest.approx(0.5)
    assert row.numerator == pytest.approx(8000)


def test_noise_that_is_drawn_and_summed() -> None:
    key = jax.random.key(0)
    for name in DISTRIBUTIONS:
        drawn = DISTRIBUTIONS[name](key, (77, 13))
        np.testing.assert_array_equal(noise.drawing("drawn", name)(), drawn)
        own = [
            DISTRIBUTIONS[name](jax.random.fold_in(key, m), (77, 13)) for m in (0, 1)
        ]
        total = noise.drawing("summed over 2 members", name)()
        np.testing.assert_allclose(total, -0.5 * own[0] - 1.5 * own[1], atol=1e-5)


@pytest.mark.slow
def test_both_ways_of_decoding_answer_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With so little noise, members answer as the model does, in slots or not."""
    monkeypatch.setattr(noise, "SIGMA", 1e-7)
    case = Case(cases.model_of("tiny"), 2, 4, 3)
    itself, low = noise.without_noise(case)(), noise.with_noise(case, 1)()
    assert itself.shape == (1, 6, 3)
    np.testing.assert_array_equal(low.reshape(itself.shape), itself)
    full, low = (noise.decoding_bytes(case, rank) for rank in (0, 1))
    # Whole members differ from shared ones by their weights, but for thin factors.
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(case.model.params))
    assert full - low == pytest.approx((noise.POPULATION - 1) * weights, rel=0.5)
    plain, in_slots = rollouts.both_ways(case.model, slots=3, slice_tokens=2)
    for one, other in zip(plain(), in_slots(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_by_name(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of("stands in", "", np.ones(3), (1, 1))
    monkeypatch.setitem(bench.ROWS, "prefix", lambda repeats: [row] * repeats)

    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["jes.bench", *flags])
        bench.main()

    out = tmp_path / "found.json"
    run("--rows=prefix", "--repeats=2", f"--out={out}")
    assert "stands in" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["what"] for row in found["rows"]] == ["stands in"] * 2
    assert found["versions"]["jax"] == jax.__version__
    with pytest.raises(SystemExit) as stopped:
        run("--rows=prefix,sped")
    assert stopped.value.code == 2
    assert "no such rows: sped; there are generation," in capsys.readouterr().err


def growth_of_a_sum() -> int:
    """Of ten million floats, 40 MB, beside what stays from the first time."""
    x, kept = jnp.ones(10_000_000), []

    def work() -> jax.Array:
        if not kept:
            kept.append(jnp.ones(10_000_000))
        return kept[0] + x

    return memory.growth(work)


@pytest.mark.slow
def test_growth_is_what_a_program_takes() -> None:
    """In a process where nothing else gives memory back, as in the rows."""
    if not Path("/proc/self/clear_refs").exists() or jax.devices()[0].memory_stats():
        pytest.skip("for a CPU, on Linux")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        grown = pool.submit(growth_of_a_sum).result()
    assert grown == pytest.approx(40_000_000, rel=0.05)


@pytest.mark.slow
def test_memory_of_one_process(tmp_path: Path) -> None:
    """Of a small model, but one process each, as in the rows."""
    small = random_model(jes.load("tiny"), hidden_size=256, num_hidden_layers=8)
    small.save(tmp_path / "model")
    asked = ["--prompts=2", "--prompt=16", "--new=2", "--mode=likelihood"]
    flags = [f"--model={tmp_path / 'model'}", *asked]
    answer = memory.in_its_own_process("answer", *flags)
    layer = memory.in_its_own_process("train", *flags, "--draw=layer")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    for found in (answer, layer):
        assert weights <= found["arrays"] < 1.01 * weights
        assert found["together"] == found["arrays"] + found["grown"]
        assert found["compiled"] >= found["arrays"]
    member = memory.in_its_own_process("train", *flags)
    assert member["compiled"] > 1.9 * weights  # all of it beside the centre
    assert layer["together"] < member["together"]


@pytest.mark.slow
def test_the_time_to_a_generation_is_that_of_a_run(tmp_path: Path) -> None:
    kept = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", tmp_path))
    assert generations.to_first_generation(tmp_path / "run", kept) > 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(metrics.splitlines()[0])["generation"] == 0


@pytest.mark.parametrize("backend", ["tpu", "cpu"])
def test_compiled_programs_are_kept_for_accelerators(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    name = "jax_compilation_cache_dir"

    def folder(cache: Path, given: str | None = None) -> str | None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        known = jax.config.values[name]
        jax.config.update(name, given)  # as JAX does with its variable, on import
        try:
            keep_compiled()
            return jax.config.values[name]
        finally:
            jax.config.update(name, known)

    monkeypatch.setenv(name.upper(), "/elsewhere")
    assert folder(tmp_path, "/elsewhere") == "/elsewhere"
    monkeypatch.delenv(name.upper())
    kept = str(tmp_path / "jes" / "compiled") if backend == "tpu" else None
    assert folder(tmp_path) == kept
    # A file is where the folder would be: nothing is kept, and nothing fails.
    (tmp_path / "file").touch()
    assert folder(tmp_path / "file") is None
