"""A run of GRPO: `jes.train` with `--config.method=grpo`.

The same setup, prompts, evaluations, run folder and summary as a run of ES, and the
same number of answers a generation: `population` answers to each of `prompts` prompts.
There is no ledger: a policy gradient cannot be replayed from rewards, so a run that is
stopped goes on from its newest checkpoint, and what came after that is done again.
"""

import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from jes.anchor import displacement, keep_anchor
from jes.baselines.grpo import Grpo, Rollout, improve, make_optimizer, rollout
from jes.core.noise import PyTree, generation_key
from jes.errors import InputError
from jes.io import checkpoints, memory, runs
from jes.io.interrupts import Stopped, stop_request
from jes.io.progress import bar, console
from jes.record import check_length, evaluate, finish, writing
from jes.setup import Setup, make_setup, pick
from jes.tell import Evolution


def learn(
    config: ml_collections.ConfigDict, evolution: Evolution, workdir: Path
) -> dict[str, Any]:
    """The run, from start or resumption to the summary; see `jes.train.run`."""
    setup = make_setup(config, evolution)
    settings = make_settings(setup)
    runs.claim(workdir, config.to_dict(), {})
    folder = workdir / "checkpoints"
    newest = max(checkpoints.saved(folder), default=0)
    check_length(workdir, newest, config.generations)
    checkpoints.tidy(folder, newest)
    model, params = setup.pretrained.model, setup.pretrained.params
    base = keep_anchor(params, config.anchor, setup.pretrained.stored_dtype)
    root = jax.random.key(config.seed)
    state = make_optimizer(settings).init(params)
    restored = checkpoints.restore_latest(folder, (params, state), config.generations)
    done = saved = restored[0] if restored else 0
    with (
        stop_request() as stop,
        bar(done, config.generations) as progress,
        writing(workdir, done) as writer,
    ):
        try:
            evaluate(setup, 0, params, base, writer, stop)
            if restored:
                console.print(f"going on after {done} iterations")
                params, state = restored[1]
            for iteration in range(done, config.generations):
                if iteration % config.eval_every == 0:
                    evaluate(setup, iteration, params, base, writer, stop)
                began = time.perf_counter()
                key = generation_key(root, iteration)
                answered = rollout(
                    setup.examiner,
                    params,
                    pick(setup, iteration),
                    key,
                    settings,
                    batch_size=config.eval_batch,
                    before_batch=stop.check,
                )
                params, state, learned = improve(
                    settings, model, params, state, base, answered.batch, key
                )
                done = iteration + 1
                row = metrics_row(answered, learned, done, params, base, began)
                writer.write("metrics", iteration, row)
                progress.update(done, row)
                if done % config.checkpoint_every == 0:
                    checkpoints.save(folder, done, (params, state))
                    saved = done
            evaluate(setup, done, params, base, writer, stop)
        except Stopped:
            if done > saved:
                checkpoints.save(folder, done, (params, state))
            console.print(
                f"stopped after {done} of {config.generations} iterations; the same "
                f"command goes on from {workdir}"
            )
            raise
    return finish(setup, done, params, workdir)


def make_settings(setup: Setup) -> Grpo:
    """The settings of GRPO, checked; a group is as large as a population."""
    config = setup.config
    if config.anchor == "none":
        raise InputError("GRPO needs the base model, which anchor='none' leaves out")
    if config.rounding != "none":
        raise InputError("GRPO needs gradients, and codes have none: a float model")
    if config.decay != "none":
        raise InputError("decay is of method 'es'; GRPO has config.grpo.kl")
    if config.top_k or config.top_p < 1 or config.shuffle_fitness:
        raise InputError("GRPO has no top_k, top_p or shuffle_fitness")
    if config.mode != "generate":
        raise InputError(f"GRPO samples answers: mode 'generate', not {config.mode!r}")
    if setup.examiner.task.meta is not None:
        raise InputError(f"GRPO asks one question; task {config.task} asks two")
    prompts = config.prompts or len(setup.train)
    minibatch = config.grpo.minibatch or prompts * config.population
    rows = memory.rows_of_gradient(
        setup.pretrained.config,
        setup.parameters,
        setup.examiner.buckets[0],
        setup.examiner.max_new_tokens,
        budget=int(config.memory_gb * 1e9) or memory.free_bytes(),
    )
    # The most that fit, of those that divide the minibatch.
    held = max(n for n in range(1, minibatch + 1) if not minibatch % n and n <= rows)
    return Grpo(
        prompts=prompts,
        group=config.population,
        learning_rate=config.grpo.learning_rate,
        clip=config.grpo.clip,
        kl=config.grpo.kl,
        minibatch=minibatch,
        microbatch=held,
        epochs=config.grpo.epochs,
        temperature=config.temperature or 1.0,
    )


def metrics_row(
    answered: Rollout,
    learned: dict[str, float],
    done: int,
    params: PyTree,
    base: PyTree,
    began: float,
) -> dict[str, Any]:
    """One row of `metrics.jsonl`, with the names that a run of ES has."""
    rewards = answered.rewards[np.isfinite(answered.rewards)]
    if not rewards.size:
        raise InputError(f"iteration {done - 1}: no answer has a finite reward")
    score = answered.score
    moved = float(displacement(params, base))
    seconds = time.perf_counter() - began
    return {
        "generation": done - 1,
        "fitness_mean": float(rewards.mean()),
        "fitness_max": float(rewards.max()),
        "fitness_std": float(rewards.std()),
        "accuracy": float(score.accuracy),
        "strict": float(score.strict),
        "formatted": float(score.formatted),
        "truncated": float(score.truncated),
        "displacement_norm": moved,
        "displacement_norm_drift": None,  # there is no walk of noise to compare with
        **learned,
        "tokens": int(score.tokens),
        "tokens_per_second": float(score.tokens / seconds),
        "seconds": seconds,
    }
