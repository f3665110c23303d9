"""The row of `jes.bench` on the time from a command to its first generation."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jes.bench.timing import Row, row_of
from jes.errors import InputError

CONFIG = '''"""A short run of the embedded model."""

from jes.config import default


def get_config():
    """As configs/tiny.py, with few examples to evaluate on."""
    config = default()
    config.update({"population": 32, "prompts": 64, "sigma": 0.02, "alpha": 0.02})
    config.data.update({"train": 64, "test": 64})
    return config
'''
PATIENCE = 600
"""Seconds after which a run that has no generation is given up."""


def rows(repeats: int) -> list[Row]:
    """Cold, with an empty folder for compiled programs, over the same once more."""
    times = np.array([cold_and_warm() for _ in range(min(repeats, 3))])
    what = "start to first generation, cold / with compiled programs: tiny"
    sides = 1e3 * np.median(times, axis=0)
    return [row_of(what, "", times[:, 0] / times[:, 1], sides)]


def cold_and_warm() -> tuple[float, float]:
    """Seconds to the first generation, of a first run and of a second."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "short.py"
        config.write_text(CONFIG)
        first, second = (
            to_first_generation(config, Path(folder) / name, Path(folder) / "compiled")
            for name in ("first", "second")
        )
    return first, second


def to_first_generation(config: Path, workdir: Path, compiled: Path) -> float:
    """Seconds until a new run has its first generation; it is stopped then."""
    command = [sys.executable, "-m", "jes.train", f"--config={config}"]
    began = time.perf_counter()
    run = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)},
        stdout=subprocess.DEVNULL,
    )
    metrics = workdir / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            if run.poll() is not None:
                raise InputError("the run that was to be timed failed")
            if time.perf_counter() - began > PATIENCE:
                raise InputError(f"no generation within {PATIENCE} seconds")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        run.terminate()
        run.wait()
