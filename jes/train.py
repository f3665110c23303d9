"""Fine-tunes a language model with evolution strategies (or a baseline, to compare).

    python -m jes.train --config=configs/tiny.py [--workdir=FOLDER] [--config.x=value]

One generation: `ask` perturbs the weights, lets every member answer the prompts and
scores the answers; `tell` moves the weights by the members' noise, weighted with their
fitness; the ledger records the fitness, and with that the generation has happened.

Stopped at any moment, the same command goes on where the run was. What counts, first
to last: the ledger (each complete row is a generation that happened), the newest
checkpoint that can be read (the state after some of them), and the base model (the
state after none). The rows after the checkpoint are told again, not asked again.

Started several times, on one host or many (`--coordinator` or `--distributed`), it is
one run, of which the first process alone writes.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from jes.baselines import grpo_run, sft_run
from jes.chunk import choose, with_slots
from jes.config import Settings, freeze
from jes.core import ledger as ledgers
from jes.core.anchor import displacement, keep_anchor
from jes.core.drift import predicted_drift
from jes.core.evolution import Evolution
from jes.core.noise import PyTree, generation_key
from jes.errors import InputError
from jes.experiment import (
    Experiment,
    make_experiment,
    pick,
)
from jes.io import checkpoints, command_line, hosts, memory, runs
from jes.io.compiled import keep_compiled
from jes.io.console import bar, console
from jes.io.interrupts import Stopped, StopRequest, stop_request
from jes.metacognition.objectives import objective_fitness
from jes.models.weights import fingerprint
from jes.record import check_length, evaluate, finish, finished, report, writing
from jes.rollout import ask
from jes.scoring import Score, fitness_of
from jes.update import first_state, moves_of, replay, tell


class State(NamedTuple):
    """Where a run is.

    Attributes:
      generation: how many generations have happened.
      saved: the newest checkpoint's number of generations.
      params: the centre θ, float32.
      optimizer: state of the optimizer.
    """

    generation: int
    saved: int
    params: PyTree
    optimizer: Any


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains to the end, from wherever the run in `workdir` is.

    Args:
      config: settings, see `jes.config`.
      workdir: the run folder; see the README for what is in it.

    Returns:
      The contents of `summary.json`; nothing in other processes than the first.

    Raises:
      InputError: if a setting, the model, the data or the folder cannot work.
      Stopped: after SIGINT or SIGTERM, with everything saved.
      OSError: if the disk is full or the like; what happened before is saved.
    """
    settings = freeze(config)
    if jax.process_count() > 1 and config.method != "es":
        raise InputError(f"method {config.method!r} runs in one process")
    keep_compiled()
    with hosts.together():
        if not hosts.first():
            follow(settings)
            return {}
        with runs.alone(workdir):
            summary = finished(config, workdir)
            if summary is None:
                return METHODS[config.method](config, workdir)
            console.print(
                "this run finished before; give another --workdir for a new one"
            )
            report(workdir, summary)
            return summary
    return {}  # over before it began


def evolve(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """The run itself, from start or resumption to the summary."""
    experiment = make_experiment(freeze(config))
    evolution = experiment.evolution
    check_same_start(experiment)
    resolved = runs.claim(
        workdir, config.to_dict(), lambda: choose(experiment)._asdict()
    )
    # A folder from before there were slots has none.
    resolved = {"slots": 0} | resolved
    chunk, experiment = resolved["chunk"], with_slots(experiment, resolved["slots"])
    ledger = open_ledger(experiment, workdir / "ledger.jsonl")
    base = keep_anchor(
        experiment.pretrained.params,
        evolution.anchor,
        experiment.pretrained.stored_dtype,
    )
    anchor = None if evolution.decay == "none" else base
    folder = workdir / "checkpoints"
    done = len(ledger.fitness)
    told = resolved | {"fitness": [row.tolist() for row in ledger.fitness]}
    hosts.from_first(lambda: json.dumps(told).encode())
    checkpoints.tidy(folder, done)
    with (
        stop_request() as stop,
        bar(done, config.generations) as progress,
        writing(workdir, done) as writer,
    ):
        state = State(done, done, None, None)  # nothing yet that a stop would lose
        try:
            params = experiment.pretrained.params
            evaluate(experiment, 0, params, base, writer, stop)
            share = config.share_update
            state = resume(evolution, params, anchor, ledger, folder, share=share)
            if state.generation:
                console.print(f"going on after {state.generation} generations")
            for generation in range(state.generation, config.generations):
                if generation % config.eval_every == 0:
                    evaluate(experiment, generation, state.params, base, writer, stop)
                began = time.perf_counter()
                state, scores, fitness = advance(experiment, state, chunk, anchor, stop)
                row = metrics_row(experiment, scores, state, base, began)
                writer.write("metrics", generation, row)
                ledgers.append_generation(ledger.path, generation, fitness)
                progress.update(generation + 1, row)
                if state.generation % config.checkpoint_every == 0:
                    state = save(folder, state)
            evaluate(experiment, state.generation, state.params, base, writer, stop)
        except Stopped:
            if state.generation > state.saved:
                state = save(folder, state)
            console.print(
                f"stopped after {state.generation} of {config.generations} "
                f"generations; the same command goes on from {workdir}"
            )
            raise
    seal(ledger, state)
    hosts.check_same("come to other weights", lambda: fingerprint(state.params))
    return finish(experiment, state.generation, state.params, workdir)


def follow(config: Settings) -> None:
    """The run in any process but the first: the same updates, written nowhere."""
    experiment = make_experiment(config)
    evolution = experiment.evolution
    check_same_start(experiment)
    params = experiment.pretrained.params
    start = json.loads(hosts.from_first(bytes))
    experiment = with_slots(experiment, start["slots"])
    anchor = None
    if evolution.decay != "none":
        stored = experiment.pretrained.stored_dtype
        anchor = keep_anchor(params, evolution.anchor, stored)
    fitness = [np.array(row, np.float32) for row in start["fitness"]]
    root = jax.random.key(config.seed)
    params, optimizer = replay(
        evolution,
        params,
        first_state(evolution, params),
        root,
        fitness,
        anchor=anchor,
        share=config.share_update,
    )
    state = State(len(fitness), len(fitness), params, optimizer)
    with stop_request() as stop:
        while state.generation < config.generations:
            state, _, _ = advance(experiment, state, start["chunk"], anchor, stop)
    reached = fingerprint(state.params)
    hosts.check_same("come to other weights", lambda: reached)
    console.print(f"process {jax.process_index()} has come to the weights {reached}")


def check_same_start(experiment: Experiment) -> None:
    """Raises InputError if processes have not the same settings and base model."""

    def start() -> str:
        return repr(experiment.settings) + fingerprint(experiment.pretrained.params)

    hosts.check_same("other settings, or another base model,", start)


def advance(
    experiment: Experiment, state: State, chunk: int, anchor: PyTree, stop: StopRequest
) -> tuple[State, Score, np.ndarray]:
    """One generation: ask, then tell.

    Args:
      experiment: of the run.
      state: before it; its weights are given away.
      chunk: members held in memory at once, on each device.
      anchor: the base weights, where there is a decay.
      stop: asked before every chunk.

    Returns:
      The state after it, the members' scores, and their fitness float32 [N].
    """
    generation = state.generation
    evolution = experiment.evolution.at(generation)
    key = generation_key(jax.random.key(experiment.settings.seed), generation)
    scores = ask(
        experiment.evaluation,
        state.params,
        key,
        pick(experiment, generation),
        noise=evolution.noise,
        population=evolution.population,
        chunk=chunk,
        before_chunk=stop.check,
    )
    config = experiment.settings
    fitness = fitness_of(
        scores,
        config.objective,
        generation=generation,
        shuffle_seed=config.seed if config.shuffle_fitness else None,
    )
    scores = scores._replace(reward=objective_fitness(config.objective, scores))
    params, optimizer = tell(
        evolution,
        state.params,
        state.optimizer,
        key,
        fitness,
        anchor,
        share=experiment.settings.share_update,
    )
    return State(generation + 1, state.saved, params, optimizer), scores, fitness


METHODS = {"es": evolve, "grpo": grpo_run.learn, "sft": sft_run.learn}
"""How `config.method` is run: function of (config, evolution, workdir)."""


def ledger_header(experiment: Experiment, base: str) -> dict[str, Any]:
    """What a replay needs to know."""
    return {
        "model": experiment.settings.model,
        "quantize": experiment.settings.quantize,
        "group_size": experiment.settings.group_size,
        "base": base,
        "seed": experiment.settings.seed,
        "evolution": dataclasses.asdict(experiment.evolution),
        "dtype": experiment.settings.dtype,
        "parameters": experiment.parameters,
        "versions": runs.versions(),
    }


def open_ledger(experiment: Experiment, path: Path) -> ledgers.Ledger:
    """The run's ledger, started if there is none, of this base model."""
    base = fingerprint(experiment.pretrained.params)
    if not path.exists():
        ledgers.create(path, ledger_header(experiment, base))
    try:
        ledger = ledgers.repair(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if ledger.header["base"] != base:
        raise InputError(
            f"{path} starts from other weights than those of "
            f"{experiment.settings.model}"
        )
    check_length(path.parent, len(ledger.fitness), experiment.settings.generations)
    return ledger


def resume(
    evolution: Evolution,
    params: PyTree,
    anchor: PyTree,
    ledger: ledgers.Ledger,
    folder: Path,
    *,
    share: bool = False,
) -> State:
    """The state that the ledger says the run has reached.

    Args:
      evolution: settings of the update.
      params: the base weights; given away.
      anchor: a copy of them, where there is a decay.
      ledger: what happened.
      folder: of the run's checkpoints, to start from the newest that can be read.
      share: as for `tell`.
    """
    optimizer = first_state(evolution, params)
    saved, done = 0, len(ledger.fitness)
    restored = None
    if jax.process_count() == 1:
        restored = checkpoints.restore_latest(folder, (params, optimizer), done)
    if restored is not None:
        saved, (params, optimizer) = restored
    root = jax.random.key(ledger.header["seed"])
    params, optimizer = replay(
        evolution,
        params,
        optimizer,
        root,
        ledger.fitness[saved:],
        saved,
        anchor,
        share=share,
    )
    return State(done, saved, params, optimizer)


def seal(ledger: ledgers.Ledger, state: State) -> None:
    """Notes what the weights are in the end, unless a run before this did."""
    sealed = fingerprint(state.params)
    if ledger.fingerprints.get(state.generation) != sealed:
        ledgers.append_fingerprint(ledger.path, state.generation, sealed)


def metrics_row(
    experiment: Experiment, scores: Score, state: State, base: PyTree, began: float
) -> dict[str, Any]:
    """One row of `metrics.jsonl`; `generation` counts from 0."""
    counted = np.isfinite(scores.reward)
    fitness = scores.reward[counted]
    moved = None if base is None else float(displacement(state.params, base))
    seconds = time.perf_counter() - began
    return {
        "generation": state.generation - 1,
        "fitness_mean": float(fitness.mean()),
        "fitness_max": float(fitness.max()),
        "fitness_std": float(fitness.std()),
        "members_dropped": int((~counted).sum()),
        "accuracy": float(np.mean(scores.accuracy[counted])),
        "strict": float(np.mean(scores.strict[counted])),
        "formatted": float(np.mean(scores.formatted[counted])),
        **said_to_know(scores, counted),
        "truncated": float(np.mean(scores.truncated[counted])),
        "displacement_norm": moved,
        "displacement_norm_drift": predicted_drift(
            experiment.evolution, experiment.parameters, state.generation
        ),
        **flips(state.optimizer, experiment.parameters),
        "tokens": int(np.sum(scores.tokens)),
        "tokens_per_second": float(np.sum(scores.tokens) / seconds),
        "seconds": seconds,
    }


def said_to_know(scores: Score, counted: np.ndarray) -> dict[str, float]:
    """Of tasks that ask for it, how often yes is said of right and of wrong answers."""
    if np.isnan(scores.hits).any():
        return {}
    return {
        "hits": float(np.mean(scores.hits[counted])),
        "false_alarms": float(np.mean(scores.false_alarms[counted])),
    }


def flips(optimizer: Any, parameters: int) -> dict[str, float]:
    """Of a quantised model: shares of its codes that moved, or were not let out."""
    moves = moves_of(optimizer)
    if moves is None:
        return {}
    changed, blocked = moves
    return {"codes_changed": changed / parameters, "blocked": blocked / parameters}


def save(folder: Path, state: State) -> State:
    """Writes a checkpoint; the ledger alone would do, so that a full disk is no end.

    Several processes have none: orbax waits for all of them, which have no folder.
    """
    if jax.process_count() > 1:
        return state
    try:
        checkpoints.save(folder, state.generation, (state.params, state.optimizer))
    except OSError as error:
        console.print(f"no checkpoint written ({error}); the ledger has everything")
        return state
    return state._replace(saved=state.generation)


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings: a file in configs/.", lock_config=True
    )
    workdir_flag = flags.DEFINE_string(
        "workdir", None, "Run folder; by default runs/<name of the config file>."
    )
    flags.DEFINE_bool("distributed", False, "Join processes that JAX can find.")
    flags.DEFINE_string("coordinator", "", "host:port of the first of many processes.")
    flags.DEFINE_integer("processes", None, "How many there are.")
    flags.DEFINE_integer("process", None, "The number of this one, from 0.")
    flags.DEFINE_integer(
        "process_timeout", 300, "Seconds to wait for a sign of life of the others."
    )
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        given = flags.FLAGS
        cluster = hosts.Cluster(
            coordinator=given.coordinator,
            processes=given.processes,
            process=given.process,
            timeout=given.process_timeout,
        )
        if given.distributed or cluster.named:
            cluster.join()
        memory.give_back_freed_blocks()
        workdir = workdir_flag.value or f"runs/{command_line.config_name()}"
        run(config_flag.value, Path(workdir))

    command_line.start(command)


if __name__ == "__main__":
    main()
