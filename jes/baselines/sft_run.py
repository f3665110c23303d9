"""A run of SFT on META: `jes.train` with `--config.method=sft`.

What is learned, and from what: `jes.baselines.sft`. The loop is that of
`jes.baselines.gradient_run`. A generation is one optimizer step on `prompts` training
questions, each of which is answered once, greedily: `population` and what else there is
of ES play no part.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from jes.baselines import gradient_run
from jes.baselines.gradient import largest_divisor
from jes.baselines.gradient_run import Method
from jes.baselines.sft import (
    Sft,
    answer_directly,
    claims_of,
    improve,
    learning_rate,
    make_batch,
    make_optimizer,
)
from jes.core.noise import PyTree
from jes.errors import InputError
from jes.experiment import Experiment, pick
from jes.io import memory, runs


def learn(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """The run, from start or resumption to the summary; see `jes.train.run`.

    Raises:
      InputError: beside what `jes.train.run` says, for a run that was of another
        length: the learning rate is a function of the length.
    """
    record = runs.check(workdir, config.to_dict())
    steps = config.generations if record is None else record["config"]["generations"]
    if steps != config.generations:
        raise InputError(
            f"{workdir} is a run of SFT over generations={steps}, which its learning "
            f"rates follow: it cannot become one over {config.generations}"
        )
    method = Method(make_settings, make_optimizer, step)
    return gradient_run.learn(config, workdir, method)


def step(
    experiment: Experiment,
    settings: Sft,
    params: PyTree,
    state: Any,
    base: PyTree,
    iteration: int,
    check: Callable[[], None],
) -> tuple[PyTree, Any, dict[str, Any]]:
    """One optimizer step; see `gradient_run.Method`.

    A row's `accuracy` is the share of right direct answers, and so of the labels yes.
    META is not answered while training, so that there is no reward and no fitness;
    `agreement` says how often the answer would have been the label.
    """
    del base
    questions = pick(experiment, iteration)
    direct = answer_directly(
        experiment.evaluation,
        params,
        questions,
        batch_size=experiment.settings.eval_batch,
        before_batch=check,
    )
    metas = [q.meta for q in questions]
    claims = claims_of(experiment.evaluation)
    batch = make_batch(settings, metas, direct.correct, claims, _width(experiment))
    check()
    params, state, learned = improve(
        settings, experiment.pretrained.model, params, state, batch
    )
    figures = {
        "accuracy": float(direct.correct.mean()),
        "strict": float(direct.strict.mean()),
        "truncated": float(direct.truncated.mean()),
        **learned,
        "learning_rate": float(learning_rate(settings, iteration)),
        "tokens": direct.tokens,
    }
    return params, state, figures


def make_settings(experiment: Experiment) -> Sft:
    """The settings of SFT, checked."""
    config = experiment.settings
    claims = claims_of(experiment.evaluation)
    width = _width(experiment)
    last = width - 1 if config.sft.loss == "all" else max(map(len, claims))
    rows = memory.rows_of_gradient(
        experiment.pretrained.config,
        experiment.parameters,
        width - last,
        last,
        budget=int(config.memory_gb * 1e9) or memory.free_bytes(),
    )
    return Sft(
        steps=config.generations,
        learning_rate=config.sft.learning_rate,
        loss=config.sft.loss,
        microbatch=largest_divisor(config.prompts or len(experiment.train), rows),
    )


def _width(experiment: Experiment) -> int:
    """Tokens of the longest META with its answer, over all of training: one shape."""
    claims = claims_of(experiment.evaluation)
    return max(len(q.meta) for q in experiment.train) + max(map(len, claims))
