"""A run of GRPO: `jes.train` with `--config.method=grpo`.

The loop is that of `jes.baselines.gradient_run`, and the number of answers a generation
that of a run of ES: `population` answers to each of `prompts` prompts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jes.baselines import gradient_run
from jes.baselines.gradient import largest_divisor
from jes.baselines.gradient_run import Method
from jes.baselines.grpo import Grpo, Rollout, improve, make_optimizer, rollout
from jes.core.noise import PyTree, generation_key
from jes.errors import InputError
from jes.experiment import Experiment, pick
from jes.io import memory


def learn(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """The run, from start or resumption to the summary; see `jes.train.run`."""
    method = Method(make_settings, make_optimizer, step)
    return gradient_run.learn(config, workdir, method)


def step(
    experiment: Experiment,
    settings: Grpo,
    params: PyTree,
    state: Any,
    base: PyTree,
    iteration: int,
    check: Callable[[], None],
) -> tuple[PyTree, Any, dict[str, Any]]:
    """One iteration; see `gradient_run.Method`."""
    key = generation_key(jax.random.key(experiment.settings.seed), iteration)
    answered = rollout(
        experiment.evaluation,
        params,
        pick(experiment, iteration),
        key,
        settings,
        batch_size=experiment.settings.eval_batch,
        before_batch=check,
    )
    earned = figures(answered, iteration)
    params, state, learned = improve(
        settings, experiment.pretrained.model, params, state, base, answered.batch, key
    )
    return params, state, {**earned, **learned}


def make_settings(experiment: Experiment) -> Grpo:
    """The settings of GRPO, checked; a group is as large as a population."""
    config = experiment.settings
    if experiment.evaluation.task.meta is not None:
        raise InputError(f"GRPO asks one question; task {config.task} asks two")
    prompts = config.prompts or len(experiment.train)
    minibatch = config.grpo.minibatch or prompts * config.population
    rows = memory.rows_of_gradient(
        experiment.pretrained.config,
        experiment.parameters,
        experiment.evaluation.buckets[0],
        experiment.evaluation.max_new_tokens,
        budget=int(config.memory_gb * 1e9) or memory.free_bytes(),
    )
    return Grpo(
        prompts=prompts,
        group=config.population,
        learning_rate=config.grpo.learning_rate,
        minibatch=minibatch,
        microbatch=largest_divisor(minibatch, rows),
        temperature=config.temperature or 1.0,
    )


def figures(answered: Rollout, iteration: int) -> dict[str, Any]:
    """What a row of `metrics.jsonl` says of the answers.

    Raises:
      InputError: if no reward is finite.
    """
    rewards = answered.rewards[np.isfinite(answered.rewards)]
    if not rewards.size:
        raise InputError(f"iteration {iteration}: no answer has a finite reward")
    score = answered.score
    return {
        "fitness_mean": float(rewards.mean()),
        "fitness_max": float(rewards.max()),
        "fitness_std": float(rewards.std()),
        "accuracy": float(score.accuracy),
        "strict": float(score.strict),
        "formatted": float(score.formatted),
        "truncated": float(score.truncated),
        "tokens": int(score.tokens),
    }
