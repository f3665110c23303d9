"""Fine-tunes a language model with evolution strategies (or a baseline, to compare).

    python -m jes.train [--config=configs/tiny.py] [--workdir=FOLDER] [--config.x=value]
    python -m jes.train --config.task=mytask.py --config.data.train=mydata.jsonl

A generation of ES: `ask` perturbs the weights, lets every member answer the prompts and
scores the answers; `tell` moves the weights along the members' noise, weighted with
their fitness; the ledger records the fitness, and with that the generation counts.
GRPO and SFT are other steps of the same loop.

Stopped at any moment, the same command goes on where the run was: from the newest
checkpoint that can be read, or else from the base model. Generations that the ledger
has beyond it are replayed from their fitness, without asking again. A baseline has no
ledger, and does again what came after its checkpoint.

Started several times, on one host or many (`--coordinator` or `--distributed`), it is
one run, of which the first process alone writes.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from jes.baselines import grpo, sft
from jes.config import GrpoSettings, Settings, SftSettings, freeze
from jes.core.anchor import displacement, keep_anchor
from jes.core.drift import predicted_drift
from jes.core.mesh import mesh_of
from jes.core.noise import PyTree, generation_key
from jes.core.tree import checksum
from jes.core.whole_numbers import norm
from jes.errors import InputError
from jes.experiment import Experiment, State, make_experiment, pick, settled
from jes.guide import Guide
from jes.io import command_line, hosts
from jes.io.compiled import keep_compiled
from jes.io.console import Bar, console, doing
from jes.io.interrupts import Before, Stopped, stop_request
from jes.memory import choose, give_back_freed_blocks
from jes.metacognition.objectives import objective_fitness
from jes.models.weights import fingerprint
from jes.questions import batch_of, texts_in
from jes.rollout import ask, dtype_of_centre, tokens_read
from jes.run_folder import RunFolder, alone, finished, report
from jes.sampling.packing import text_tokens
from jes.scoring import Score, fitness_of
from jes.sigma import choose_rates
from jes.tasks import Data, Given
from jes.tasks.rewards import RewardError
from jes.update import (
    first_centre,
    first_state,
    moves_of,
    replay,
    tell,
    weights_of,
)


class Method(NamedTuple):
    """What differs between methods of training.

    Attributes:
      resolve: chooses what the settings leave open: from the experiment, and what was
        chosen before, to a dict that `config.json` keeps.
      init: from the experiment to the optimizer's state before the first generation.
      step: one generation: from the experiment, the state (donated), the anchor, what
        `resolve` chose, and a function to call wherever it is safe to stop, to the next
        state, the figures of its row in `metrics.jsonl` (of which `tokens` is the
        number of tokens generated), and the fitness that replays it, or None.
    """

    resolve: Callable[[Experiment, Mapping[str, Any]], dict[str, Any]]
    init: Callable[[Experiment], Any]
    step: Callable[..., tuple[State, dict[str, Any], np.ndarray | None]]


def run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    given: Given | None = None,
    on_generation: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Trains to the end, from wherever the run in `workdir` is.

    Args:
      config: settings, see `jes.config`.
      workdir: the run folder; see the README for what is in it.
      given: the task in Python, in place of what `config.task` stands for.
      on_generation: called with each row of `metrics.jsonl`; the run ends there if it
        returns True.

    Returns:
      The contents of `summary.json`; nothing in other processes than the first.

    Raises:
      InputError: if a setting, the model, the data or the folder cannot work.
      Stopped: after SIGINT or SIGTERM, with everything saved.
      OSError: if the disk is full or the like; what happened before is saved.
    """
    settings = freeze(config)
    check_disk(workdir)
    if jax.process_count() > 1 and settings.method != "es":
        raise InputError(f"method {settings.method!r} runs in one process")
    keep_compiled()
    with hosts.together():
        if not hosts.first():
            return train(settings, RunFolder(workdir), given, on_generation)
        with alone(workdir):
            summary = finished(settings, workdir)
            if summary is None:
                return train(settings, RunFolder(workdir), given, on_generation)
            console.print("this run finished before; give another --workdir")
            report(workdir, summary)
            return summary
    return {}  # the first process had nothing left to do


def check_disk(workdir: Path) -> None:
    """Raises InputError for an address, such as that of a bucket."""
    if re.match("[a-z0-9]+:/", str(workdir)):
        raise InputError(
            f"{workdir} is no folder on a disk, where runs are written: copy it to a "
            "bucket while it grows, as tpu_scripts do, or mount that"
        )


def train(
    settings: Settings,
    folder: RunFolder,
    given: Given | None = None,
    on_generation: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The run itself, from start or resumption to the summary."""
    method, warn = METHODS[settings.method], Guide(settings)
    experiment, resolved, fitness = opened(settings, folder, method, given)
    start, base = experiment.pretrained.params, None
    whole = experiment.evolution.whole_numbers
    if hosts.first() or whole or settings.decay != "none":
        base = keep_anchor(start, settings.anchor, experiment.pretrained.stored_dtype)
    centre = first_centre(experiment.evolution, start)
    state = State(settings.root, 0, centre, method.init(experiment))
    state = folder.restore(state, len(fitness) if fitness else settings.generations)
    done = max(state.generation, len(fitness))
    with (
        stop_request() as stop,
        Bar(done, settings.generations, shown=hosts.first()) as progress,
        folder.writing(experiment.settings, done),
    ):

        def before(what: str) -> None:
            progress.now(what)
            stop.check()

        evaluate = partial(folder.evaluate, experiment, base, before)

        def look(state: State) -> bool:
            """Evaluates and keeps the centre; whether patience has come to its end."""
            state = with_weights(experiment, state, base)
            evaluate(state.generation, state.params)
            warn.of_evaluations(folder.path)
            return folder.keep(experiment, state)

        try:
            evaluate(0, start)
            if whole:  # the base and the displacement are what is kept
                jax.tree.map(lambda leaf: leaf.delete(), start)
            state = replayed(experiment, state, fitness, base)
            if done:
                console.print(f"going on after {done} generations")
            enough = False
            while state.generation < settings.generations and not enough:
                if state.generation % settings.eval_every == 0:
                    folder.ended = look(state)
                    if folder.ended:
                        break
                began = time.perf_counter()
                state, figures, earned = method.step(
                    experiment, state, base, resolved, before
                )
                row = metrics_row(experiment, figures, state, base, began)
                folder.record(row, earned)
                progress.show(state.generation, row)
                warn.of_generation(row)
                if state.generation % settings.checkpoint_every == 0:
                    check_alike(state)
                    folder.save(state)
                enough = on_generation is not None and on_generation(row) is True
            look(state)
        except (Stopped, RewardError):
            folder.stopped(state, max(done, state.generation), settings.generations)
            raise
    state = with_weights(experiment, state, base)
    hosts.check_same("other weights", lambda: fingerprint(state.params))
    return folder.finish(experiment, state)


def opened(
    settings: Settings, folder: RunFolder, method: Method, given: Given | None = None
) -> tuple[Experiment, dict[str, Any], list[np.ndarray]]:
    """The experiment, what `method.resolve` chose, and the fitness in the ledger."""
    with doing(f"loading {settings.model} and {settings.task}"):
        experiment = make_experiment(settings, given)
    for what, make in {
        "other settings": lambda: repr(settings),
        "another base model": lambda: fingerprint(experiment.pretrained.params),
        "other questions or rewards": lambda: repr(experiment.identity),
    }.items():
        hosts.check_same(what, make)
    with doing("compiling, to choose what the settings leave open"):
        resolved, fitness = folder.open(experiment, method.resolve)
    return settled(experiment, resolved), resolved, fitness


def resolve_es(
    experiment: Experiment, before: Mapping[str, Any]
) -> dict[str, int | float]:
    """The members held at once, by the memory; σ and α, unless they were chosen before.

    The first process chooses, by itself.
    """
    held = choose(experiment)._asdict()
    if said := devices_line(experiment, **held):
        console.print(said)
    if experiment.settings.sigma:
        return held
    if "sigma" in before:
        return held | {name: before[name] for name in ("sigma", "alpha")}
    rates = choose_rates(settled(experiment, held), held["chunk"])
    settings = experiment.settings
    share = rates.asked / (settings.generations * settings.population)
    console.print(
        f"sigma {rates.sigma:g}, alpha {rates.alpha:g}: chosen by {rates.asked} "
        f"members ({100 * share:.1f} % of the run's)"
    )
    return held | {"sigma": rates.sigma, "alpha": rates.alpha}


def devices_line(experiment: Experiment, chunk: int, slots: int) -> str:
    """Where members answer, and how many at once; '' for one CPU device."""
    mesh, processes = mesh_of(experiment.pretrained.params), jax.process_count()
    backend, count = jax.default_backend(), processes * (mesh.size if mesh else 1)
    if backend == "cpu" and count == 1:
        return ""
    part = experiment.settings.model_parallel
    population, places = experiment.settings.population, count // part
    turns = -(-population // (places * chunk))
    prompts = f", {slots} prompts at a time" if slots else ""
    idle = turns * places * chunk - population
    said = (
        f"{count} {backend} device(s) in {processes} process(es): {chunk} member(s) at "
        f"once on each{f' {part}' if part > 1 else ''}{prompts}, {turns} time(s)"
    )
    if idle:
        said += f"; {idle} more members a generation would take no longer"
    return said


def check_alike(state: State) -> None:
    """That all processes have come to the same weights, without reading them out.

    Raises:
      InputError: in all, if one has not; the ledger is kept.
    """
    what = f"other weights after {state.generation} generations"
    hosts.check_same(what, lambda: str(np.asarray(checksum(state.params)).tolist()))


def replayed(
    experiment: Experiment, state: State, fitness: list[np.ndarray], base: PyTree
) -> State:
    """The state after the generations of `fitness`, of which it may have some."""
    if state.generation >= len(fitness):
        return state
    after = replay(
        experiment.evolution,
        state.params,
        state.opt_state,
        state.root,
        fitness[state.generation :],
        state.generation,
        decay_anchor(experiment, base),
        share=experiment.settings.share_update,
    )
    return State(state.root, len(fitness), *after)


def with_weights(
    experiment: Experiment, state: State, base: PyTree, dtype: Any = jnp.float32
) -> State:
    """The state with θ in place of what is kept of the centre; see `weights_of`."""
    params = weights_of(experiment.evolution, state.params, base, dtype)
    return state._replace(params=params)


def decay_anchor(experiment: Experiment, base: PyTree) -> PyTree:
    """What weights decay to; None where they do not."""
    return None if experiment.settings.decay == "none" else base


def es_step(
    experiment: Experiment,
    state: State,
    base: PyTree,
    resolved: dict[str, Any],
    check_stop: Before,
) -> tuple[State, dict[str, Any], np.ndarray]:
    """One generation of ES: ask, then tell; see `Method`."""
    settings, generation = experiment.settings, state.generation
    evolution = settings.evolution.at(generation)
    key = generation_key(state.root, generation)
    questions = pick(experiment, generation)
    dtype = dtype_of_centre(experiment.evaluation, evolution)
    scores = ask(
        experiment.evaluation,
        with_weights(experiment, state, base, dtype).params,
        key,
        questions,
        noise=evolution.noise,
        population=evolution.population,
        chunk=resolved["chunk"],
        before_chunk=check_stop,
    )
    fitness = fitness_of(
        scores,
        settings.objective,
        generation=generation,
        shuffle_seed=settings.seed if settings.shuffle_fitness else None,
    )
    after = tell(
        evolution,
        state.params,
        state.opt_state,
        key,
        fitness,
        decay_anchor(experiment, base),
        share=settings.share_update,
    )
    earned = objective_fitness(settings.objective, scores)
    figures = score_figures(scores, earned, experiment.evaluation.task.parts)
    batch, members = batch_of(experiment.evaluation, questions), len(fitness)
    figures["prompt_tokens"] = members * text_tokens(texts_in(batch))
    figures["computed_tokens"] = members * tokens_read(experiment.evaluation, batch)
    if (moves := moves_of(after[1])) is not None:  # a quantised model
        changed, blocked = (count / experiment.parameters for count in moves)
        figures |= {"codes_changed": changed, "blocked": blocked}
    return State(state.root, generation + 1, *after), figures, fitness


METHODS: dict[str, Method] = {
    "es": Method(
        resolve=resolve_es,
        init=lambda experiment: first_state(
            experiment.evolution, experiment.pretrained.params
        ),
        step=es_step,
    ),
    "grpo": Method(lambda run, _: grpo.resolve(run), grpo.init, grpo.step),
    "sft": Method(lambda run, _: sft.resolve(run), sft.init, sft.step),
}
"""How `config.method` trains."""


def score_figures(
    scores: Score, fitness: np.ndarray, parts: Sequence[str] = ()
) -> dict[str, Any]:
    """What a row of `metrics.jsonl` says of the members: arrays [N], before shuffling.

    Members whose fitness is not finite are counted, and left out of the means.
    """
    counted = np.isfinite(fitness)
    earned = fitness[counted]
    names = ["accuracy", "strict", "formatted", "truncated", "hits", "false_alarms"]
    asked = [n for n in names if not np.isnan(getattr(scores, n)[counted]).all()]
    return {
        "fitness_mean": float(earned.mean()),
        "fitness_max": float(earned.max()),
        "fitness_std": float(earned.std()),
        "members_dropped": int((~counted).sum()),
        **{name: float(np.mean(getattr(scores, name)[counted])) for name in asked},
        **{
            f"reward/{name}": float(np.mean(values[counted]))
            for name, values in zip(parts, scores.parts, strict=True)
        },
        "tokens": int(np.sum(scores.tokens)),
    }


def metrics_row(
    experiment: Experiment,
    figures: dict[str, Any],
    state: State,
    base: PyTree,
    began: float,
) -> dict[str, Any]:
    """One row of `metrics.jsonl`; `generation` counts from 0."""
    moved = None
    if base is not None and hosts.first():
        evolution = experiment.evolution
        if evolution.whole_numbers:
            moved = float(norm(state.params, evolution.whole_unit))
        else:
            moved = float(displacement(state.params, base))
    walked = None  # a gradient has no random walk to compare with
    if experiment.settings.method == "es":
        walked = predicted_drift(
            experiment.evolution, experiment.parameters, state.generation
        )
    seconds = time.perf_counter() - began
    return {
        "generation": state.generation - 1,
        **figures,
        "displacement_norm": moved,
        "displacement_norm_drift": walked,
        "tokens_per_second": figures["tokens"] / seconds,
        "seconds": seconds,
    }


def numbers(texts: Sequence[str]) -> list[int]:
    """`--local_devices` as numbers; an `InputError` for anything else."""
    if not all(text.isdecimal() for text in texts):
        raise InputError(f"--local_devices: numbers as 0,1, not {','.join(texts)}")
    return [*map(int, texts)]


def main() -> None:
    """The command line."""
    config_flag = command_line.config_flag()
    workdir_flag = flags.DEFINE_string(
        "workdir", None, "Run folder; by default runs/<name of config or task>."
    )
    flags.DEFINE_bool("distributed", False, "Join processes that JAX can find.")
    flags.DEFINE_string("coordinator", "", "host:port of the first of many processes.")
    flags.DEFINE_integer("processes", None, "How many there are.")
    flags.DEFINE_integer("process", None, "The number of this one, from 0.")
    flags.DEFINE_list(
        "local_devices", None, "Of the host's devices those of this process, as 0,1."
    )
    flags.DEFINE_integer(
        "process_timeout", 300, "Seconds without a heartbeat until one is given up."
    )

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        given = flags.FLAGS
        address = (given.coordinator or None, given.processes, given.process)
        if given.distributed or address != (None, None, None):
            own = None if given.local_devices is None else numbers(given.local_devices)
            hosts.join(*address, timeout=given.process_timeout, devices=own)
        give_back_freed_blocks()
        name = command_line.config_name() or Path(config_flag.value.task).stem
        workdir = Path(workdir_flag.value or f"runs/{name}")
        if given.distributed:
            check_disk(workdir)
            hosts.mark(workdir)
        run(config_flag.value, workdir)

    groups = (Settings, Data, GrpoSettings, SftSettings)
    command_line.start(command, groups)


if __name__ == "__main__":
    main()
