"""A run of a method that follows a gradient: the loop that the baselines share.

The same experiment, prompts, evaluations, run folder and summary as a run of ES. There
is no ledger: a gradient cannot be replayed from rewards, so a stopped run goes on from
its newest checkpoint, and what came after that is done again.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import optax

from jes.config import freeze
from jes.core.anchor import displacement, keep_anchor
from jes.core.noise import PyTree
from jes.experiment import Experiment, make_experiment
from jes.io import checkpoints, runs
from jes.io.console import bar, console
from jes.io.interrupts import Stopped, stop_request
from jes.record import check_length, evaluate, finish, writing


class Method(NamedTuple):
    """What a method is, beside the loop.

    Attributes:
      make_settings: a dataclass of the run's settings, checked (InputError), of which
        `microbatch` is how many rows the memory holds.
      make_optimizer: of these settings.
      step: one generation; a function of the experiment, the settings, the weights and
        the optimizer's state (donated), the anchor, the generation's number, and a
        function to call wherever it is safe to stop. Gives new weights, new state and
        the row's figures, of which `tokens` is the number of tokens generated.
    """

    make_settings: Callable[[Experiment], Any]
    make_optimizer: Callable[[Any], optax.GradientTransformation]
    step: Callable[..., tuple[PyTree, Any, dict[str, Any]]]


def learn(
    config: ml_collections.ConfigDict,
    workdir: Path,
    method: Method,
) -> dict[str, Any]:
    """The run, from start or resumption to the summary; see `jes.train.run`."""
    experiment = make_experiment(freeze(config))
    settings = method.make_settings(experiment)
    resolved = {"microbatch": settings.microbatch}
    # As it was at the start: in another one sums are of another order.
    resolved |= runs.claim(workdir, config.to_dict(), resolved.copy)
    settings = dataclasses.replace(settings, **resolved)
    folder = workdir / "checkpoints"
    newest = max(checkpoints.saved(folder), default=0)
    check_length(workdir, newest, config.generations)
    checkpoints.tidy(folder, newest)
    params = experiment.pretrained.params
    base = keep_anchor(params, config.anchor, experiment.pretrained.stored_dtype)
    state = method.make_optimizer(settings).init(params)
    restored = checkpoints.restore_latest(folder, (params, state), config.generations)
    done = saved = restored[0] if restored else 0
    with (
        stop_request() as stop,
        bar(done, config.generations) as progress,
        writing(workdir, done) as writer,
    ):
        try:
            evaluate(experiment, 0, params, base, writer, stop)
            if restored:
                console.print(f"going on after {done} iterations")
                params, state = restored[1]
            for iteration in range(done, config.generations):
                if iteration % config.eval_every == 0:
                    evaluate(experiment, iteration, params, base, writer, stop)
                began = time.perf_counter()
                params, state, figures = method.step(
                    experiment, settings, params, state, base, iteration, stop.check
                )
                done = iteration + 1
                row = metrics_row(figures, done, params, base, began)
                writer.write("metrics", iteration, row)
                progress.update(done, row)
                if done % config.checkpoint_every == 0:
                    checkpoints.save(folder, done, (params, state))
                    saved = done
            evaluate(experiment, done, params, base, writer, stop)
        except Stopped:
            if done > saved:
                checkpoints.save(folder, done, (params, state))
            console.print(
                f"stopped after {done} of {config.generations} iterations; the same "
                f"command goes on from {workdir}"
            )
            raise
    return finish(experiment, done, params, workdir)


def metrics_row(
    figures: dict[str, Any], done: int, params: PyTree, base: PyTree, began: float
) -> dict[str, Any]:
    """One row of `metrics.jsonl`, with the names that a run of ES has."""
    moved = None if base is None else float(displacement(params, base))
    seconds = time.perf_counter() - began
    return {
        "generation": done - 1,
        **figures,
        "displacement_norm": moved,
        "displacement_norm_drift": None,  # there is no walk of noise to compare with
        "tokens_per_second": figures["tokens"] / seconds,
        "seconds": seconds,
    }
