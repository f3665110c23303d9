"""The methods of the study by name, as settings of `jes.train`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections

from jes.errors import InputError
from jes.record import finished

Config: TypeAlias = ml_collections.ConfigDict


def method_config(base: Config, method: str, seed: int) -> Config:
    """The settings of one run of the study.

    Args:
      base: settings of the study.
      method: as in the list of `jes.forgetting.study`, such as 'l2:1', or several that
        go together, such as 'replay+l2:1'.
      seed: of noise and examples.

    Raises:
      InputError: for a method that is not one of the list.
    """
    config = base.copy_and_resolve_references()
    config.seed = seed
    config.decay, config.decay_coefficient = "none", 0.0
    try:
        for part in method.split("+"):
            kind, *values = part.split(":")
            SETTINGS[kind](config, base, *values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{method!r} is no method of the study: es, l2:λ, l1:λ, n:N, answers:N, "
            "shuffled, rate:FACTOR, half_alpha:G, half_sigma:G, grpo:RATE, "
            "grpo:RATE:ITERATIONS; of a quantised model replay, "
            "replay:K:DECAY, residual, residual:DECAY, naive, quzo; for "
            "tasks that ask 'do you know' sft:RATE:STEPS, objective:NAME"
        ) from error
    return config


def _decay(kind: str) -> Callable[..., None]:
    def change(config: Config, base: Config, coefficient: str) -> None:
        config.decay, config.decay_coefficient = kind, float(coefficient)

    return change


def _population(config: Config, base: Config, population: str) -> None:
    config.population = int(population)


def _answers(config: Config, base: Config, population: str) -> None:
    total = base.population * base.generations
    config.population = int(population)
    config.generations = max(1, total // config.population)
    # As often as the others, counted in answers.
    every = base.eval_every * base.population // config.population
    config.eval_every = max(1, every)


def _grpo(config: Config, base: Config, rate: str, iterations: str = "") -> None:
    config.method = "grpo"
    config.grpo.learning_rate = float(rate)
    config.generations = int(iterations or config.generations)


def _shuffled(config: Config, base: Config) -> None:
    config.shuffle_fitness = True


def _replay(config: Config, base: Config, window: str = "", decay: str = "") -> None:
    config.rounding = "replay"
    config.window = int(window or config.window)
    config.residual_decay = float(decay or config.residual_decay)


def _residual(config: Config, base: Config, decay: str = "") -> None:
    config.rounding = "residual"
    config.residual_decay = float(decay or config.residual_decay)


def _rounding(name: str) -> Callable[..., None]:
    def change(config: Config, base: Config) -> None:
        config.rounding = name

    return change


def _sft(config: Config, base: Config, rate: str = "", steps: str = "") -> None:
    config.method = "sft"
    # What is of members and of their noise has no part in it.
    config.objective = "reward"
    config.temperature, config.top_k, config.top_p = 0.0, 0, 1.0
    config.sft.learning_rate = float(rate or config.sft.learning_rate)
    config.generations = int(steps or config.generations)
    config.eval_every = min(config.eval_every, config.generations)


def _objective(config: Config, base: Config, name: str) -> None:
    config.objective = name


def _half_life(name: str) -> Callable[..., None]:
    def change(config: Config, base: Config, generations: str) -> None:
        config[f"{name}_half_life"] = int(generations)

    return change


def _rate(config: Config, base: Config, factor: str) -> None:
    config.alpha = float(factor) * base.alpha


SETTINGS: dict[str, Callable[..., None]] = {
    "es": lambda config, base: None,
    "l1": _decay("l1"),
    "l2": _decay("l2"),
    "n": _population,
    "answers": _answers,
    "grpo": _grpo,
    "shuffled": _shuffled,
    "replay": _replay,
    "residual": _residual,
    "naive": _rounding("naive"),
    "quzo": _rounding("quzo"),
    "rate": _rate,
    "half_alpha": _half_life("alpha"),
    "half_sigma": _half_life("sigma"),
    "sft": _sft,
    "objective": _objective,
}
"""What a method changes: (settings, settings of the study, what follows the colons)."""


def folder_of(workdir: Path, method: str, seed: int) -> Path:
    """Where a run of the study is."""
    return workdir / method.replace(":", "-") / f"seed-{seed}"


def is_finished(config: Config, folder: Path) -> bool:
    """Whether a run with these settings is complete.

    Raises:
      InputError: if the folder is that of a run with others, or of a longer one.
    """
    return folder.is_dir() and finished(config, folder) is not None


def summary_of(workdir: Path, method: str, seed: int) -> dict[str, Any]:
    """What a finished run came to."""
    return json.loads((folder_of(workdir, method, seed) / "summary.json").read_text())


def matched(base: Config, methods: Sequence[str]) -> list[str]:
    """The methods that plain ES is shrunk and stopped to match, if it was run too.

    None of a quantised model, which cannot be moved back by a share.
    """
    if "es" not in methods or base.rounding != "none":
        return []
    return [m for m in methods if m.startswith(("l1:", "l2:", "grpo:"))]
