"""The methods of the study by name, as settings of `jes.train`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jes.errors import InputError
from jes.record import finished


def method_config(
    base: ml_collections.ConfigDict, method: str, seed: int
) -> ml_collections.ConfigDict:
    """The settings of one run of the study.

    Args:
      base: settings of the study.
      method: as in the list of `jes.forgetting.study`, such as 'l2:1'.
      seed: of noise and examples.

    Raises:
      InputError: for a method that is not one of the list.
    """
    config = base.copy_and_resolve_references()
    config.seed = seed
    config.decay, config.decay_coefficient = "none", 0.0
    kind, _, value = method.partition(":")
    try:
        if kind in ("l1", "l2"):
            config.decay, config.decay_coefficient = kind, float(value)
        elif kind == "n":
            config.population = int(value)
        elif kind == "answers":
            total = base.population * base.generations
            config.population = int(value)
            config.generations = max(1, total // config.population)
            # As often as the others, counted in answers.
            every = base.eval_every * base.population // config.population
            config.eval_every = max(1, every)
        elif kind == "grpo":
            config.method = "grpo"
            rate, _, iterations = value.partition(":")
            config.grpo.learning_rate = float(rate)
            config.generations = int(iterations or config.generations)
        elif kind == "shuffled" and not value:
            config.shuffle_fitness = True
        elif kind != "es" or value:
            raise ValueError("unknown")
    except ValueError as error:
        raise InputError(
            f"{method!r} is no method of the study: es, l2:λ, l1:λ, n:N, answers:N, "
            "shuffled, grpo:RATE, grpo:RATE:ITERATIONS"
        ) from error
    return config


def folder_of(workdir: Path, method: str, seed: int) -> Path:
    """Where a run of the study is."""
    return workdir / method.replace(":", "-") / f"seed-{seed}"


def is_finished(config: ml_collections.ConfigDict, folder: Path) -> bool:
    """Whether a run with these settings is complete.

    Raises:
      InputError: if the folder is that of a run with others, or of a longer one.
    """
    return folder.is_dir() and finished(config, folder) is not None


def summary_of(workdir: Path, method: str, seed: int) -> dict[str, Any]:
    """What a finished run came to."""
    return json.loads((folder_of(workdir, method, seed) / "summary.json").read_text())


def matched(methods: Sequence[str]) -> list[str]:
    """The methods that plain ES is shrunk and stopped to match, if it was run too."""
    if "es" not in methods:
        return []
    return [m for m in methods if m.startswith(("l1:", "l2:", "grpo:"))]
