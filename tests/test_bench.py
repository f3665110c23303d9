"""The benchmark: rows by name, each of which measures what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jes
from jes.bench import __main__ as bench
from jes.bench import memory, prefix, scaling, start
from jes.bench.cases import Case, generation, random_model, unperturbed
from jes.bench.timing import compare, row_of, table
from jes.core.evolution import Evolution

EVOLUTION = Evolution(population=4, sigma=0.3, alpha=0.01)


def test_a_ratio_is_of_the_two_that_were_timed() -> None:
    calls: list[str] = []

    def work(name: str, size: int) -> None:
        calls.append(name)
        np.linalg.eigvalsh(np.ones((size, size)))

    row = compare("a", "", lambda: work("one", 500), lambda: work("two", 50), 5, 2.0)
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


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_generations_ask_and_tell(mode: str) -> None:
    case = Case("", jes.load("tiny"), 8, 24, 2)
    run = generation(case, EVOLUTION, mode=mode, draw="layer")
    before = [np.array(leaf) for leaf in jax.tree.leaves(case.pretrained.params)]
    moved = jax.tree.leaves(run())
    assert any((old != new).any() for old, new in zip(before, moved, strict=True))
    score = unperturbed(case, mode)()
    assert np.isfinite(score.reward)
    tokens = 8 * 2 if mode == "generate" else 0
    assert score.tokens == tokens


def test_prompts_share_a_beginning() -> None:
    first, second, *_ = prefix.texts(50)
    assert first[: prefix.COMMON] == second[: prefix.COMMON]
    assert len(first) == prefix.COMMON + prefix.OWN


def test_slopes_are_of_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost that is a power of the number has this power for its slope."""
    seconds = iter([4.0**0.5, 16.0**0.5, 64.0**0.5] * 3)
    made = [(lambda: None, 0)] * 3
    monkeypatch.setattr(scaling, "made", lambda **settings: made[0])
    monkeypatch.setattr(scaling, "timed", lambda run: (next(seconds), 0.0))
    row = scaling.slope("members", (4, 16, 64), 3)
    assert row.ratio == pytest.approx(0.5)
    assert row.numerator == pytest.approx(8000)


def test_a_generation_to_scale() -> None:
    run, weights = scaling.made(members=2, prompts=2, new=2, hidden=64)
    model = scaling.model_of(64)
    assert weights == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert jax.tree.structure(run()) == jax.tree.structure(model.params)


def test_rows_by_name(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def run(*flags: str) -> None:
        sys_argv = ["jes.bench", *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", sys_argv)
            row = row_of("stands in", "", np.ones(3), (1, 1))
            patch.setitem(bench.ROWS, "prefix", lambda repeats: [row] * repeats)
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


def test_the_time_to_a_generation_is_that_of_a_run(
    tmp_path: Path, compiled: Path
) -> None:
    config = tmp_path / "short.py"
    config.write_text(start.CONFIG)
    assert start.to_first_generation(config, tmp_path / "run", compiled) > 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(metrics.splitlines()[0])["generation"] == 0


@pytest.mark.parametrize("backend", ["tpu", "cpu"])
def test_compiled_programs_are_kept_for_accelerators(
    backend: str, tmp_path: Path
) -> None:
    program = f"""
import jax
jax.default_backend = lambda: {backend!r}
from jes.io.compiled import keep_compiled
keep_compiled()
print(jax.config.jax_compilation_cache_dir)
"""

    def folder(**environment: str) -> str:
        given = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMP")}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=given | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert folder(JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
    kept = str(tmp_path / "jes" / "compiled") if backend == "tpu" else "None"
    assert folder(XDG_CACHE_HOME=str(tmp_path)) == kept
    # A file is where the folder would be: nothing is kept, and nothing fails.
    (tmp_path / "file").touch()
    assert folder(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"
