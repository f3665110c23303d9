"""A run of seconds: a random model of 12,000 weights, and what a run comes to.

Also a config file: `--config=tests/small_run.py:MODEL_FOLDER`.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jes.models
from jes.config import default

EMBEDDED = Path(jes.models.__file__).parent / "tiny"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
}


def write_model(folder: Path, seed: int = 0) -> Path:
    """Writes a model folder with random weights and the embedded model's tokenizer."""
    from random_checkpoint import write_checkpoint

    from jes.models.shapes import QWEN2

    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    shape = QWEN2 | SHAPE | {"vocab_size": vocabulary}
    write_checkpoint(folder, shape, tokenizer=EMBEDDED, dtype="float32", seed=seed)
    return folder


def get_config(model: str) -> ConfigDict:
    """Six generations of partial credit, with enough noise that members differ."""
    config = default()
    config.model = model
    config.task = "tiny/reverse"
    config.data.train_examples = 64
    config.data.test_examples = 16
    config.population = 4
    config.chunk = 2
    config.prompts = 48
    config.sigma = 0.1
    config.alpha = 0.1
    config.generations = 6
    config.eval_every = 3
    config.checkpoint_every = 2
    config.buckets = (16,)
    return config


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What must not depend on how often a run was interrupted."""

    fitness: list[list[float]]
    fingerprint: str
    model: bytes
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]


def outcome(workdir: Path) -> Outcome:
    """Reads a finished run, leaving out what a clock has measured."""
    path = workdir / "ledger.jsonl"
    ledger = rows(path)[1:] if path.exists() else []  # a baseline has none
    clock = ("seconds", "tokens_per_second")

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in clock}

    (fingerprint,) = {r["fingerprint"] for r in ledger if "fingerprint" in r} or {""}
    return Outcome(
        fitness=[row["fitness"] for row in ledger if "fitness" in row],
        fingerprint=fingerprint,
        model=(workdir / "model" / "model.safetensors").read_bytes(),
        metrics=[timeless(row) for row in rows(workdir / "metrics.jsonl")],
        evaluations=rows(workdir / "evaluations.jsonl"),
        summary=timeless(json.loads((workdir / "summary.json").read_text())),
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_jobs(jobs: list[dict[str, Any]], at_once: int = 2) -> list[dict[str, Any]]:
    """Runs jobs of `command_lines.py` in processes of their own."""
    program = str(Path(__file__).with_name("command_lines.py"))
    done = subprocess.run(
        [sys.executable, program, str(at_once)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train_command(model: Path, workdir: Path, *changes: str) -> list[str]:
    """The command line of a small run, with settings such as 'seed=3' changed."""
    return [
        "jes.train",
        f"--config={__file__}:{model}",
        f"--workdir={workdir}",
        *(f"--config.{change}" for change in changes),
    ]
