"""Fine-tunes a language model with evolution strategies.

    python -m jes.train --config=configs/tiny.py [--workdir=FOLDER] [--config.x=value]

One generation: `ask` perturbs the weights, lets every member answer the prompts and
scores the answers; `tell` moves the weights by the members' noise, weighted with their
fitness; the ledger records the fitness, and with that the generation has happened.

Stopped at any moment, the same command goes on where the run was. What counts, first
to last: the ledger (each complete row is a generation that happened), the newest
checkpoint that can be read (the state after some of them), and the base model (the
state after none). The rows after the checkpoint are told again, not asked again.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from jes.ask import Examiner, Question, Score, ask, examine, longest, prepare
from jes.core import ledger as ledgers
from jes.core.noise import PyTree, generation_key
from jes.core.population import chunk_size
from jes.errors import InputError
from jes.io import checkpoints, command_line, memory, runs
from jes.io.interrupts import Stopped, StopRequest, stop_request
from jes.io.metrics import Writer, keep_rows, read_rows, write_json
from jes.io.plots import training_curves
from jes.io.progress import bar, console
from jes.models.weights import Pretrained, fingerprint, load
from jes.sampling.generate import GREEDY, Sampling
from jes.tasks import load_task
from jes.tell import Evolution, displacement, drift, make_optimizer, replay, tell

DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights that answer. The master, which is trained, is float32."""


class Setup(NamedTuple):
    """What stays the same over a run."""

    config: ml_collections.ConfigDict
    evolution: Evolution
    pretrained: Pretrained
    parameters: int
    examiner: Examiner
    train: list[Question]
    evaluations: dict[str, tuple[Examiner, list[Question]]]


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
      The contents of `summary.json`.

    Raises:
      InputError: if a setting, the model, the data or the folder cannot work.
      Stopped: after SIGINT or SIGTERM, with everything saved.
      OSError: if the disk is full or the like; what happened before is saved.
    """
    check_settings(config)
    evolution = make_evolution(config)
    with runs.alone(workdir):
        return finished(config, workdir) or evolve(config, evolution, workdir)


def evolve(
    config: ml_collections.ConfigDict, evolution: Evolution, workdir: Path
) -> dict[str, Any]:
    """The run itself, from start or resumption to the summary."""
    setup = make_setup(config, evolution)
    resolved = {"chunk": choose_chunk(setup)}
    chunk = runs.claim(workdir, config.to_dict(), resolved)["chunk"]
    ledger = open_ledger(setup, workdir / "ledger.jsonl")
    base = stored_copy(setup.pretrained)
    root = jax.random.key(config.seed)
    folder = workdir / "checkpoints"
    checkpoints.tidy(folder, len(ledger.fitness))
    with (
        stop_request() as stop,
        bar(len(ledger.fitness), config.generations) as progress,
        writing(workdir, len(ledger.fitness)) as writer,
    ):
        state = resume(evolution, setup.pretrained.params, ledger, folder)
        if state.generation:
            console.print(f"going on after {state.generation} generations")
        try:
            if state.generation:  # nothing to do, unless somebody deleted the rows
                evaluate(setup, 0, base, writer, stop)
            for generation in range(state.generation, config.generations):
                if generation % config.eval_every == 0:
                    evaluate(setup, generation, state.params, writer, stop)
                began = time.perf_counter()
                key = generation_key(root, generation)
                scores = ask(
                    setup.examiner,
                    state.params,
                    key,
                    pick(setup, generation),
                    noise=evolution.noise,
                    population=evolution.population,
                    chunk=chunk,
                    before_chunk=stop.check,
                )
                fitness = checked_fitness(scores, generation)
                params, optimizer = tell(
                    evolution, state.params, state.optimizer, key, fitness
                )
                state = State(generation + 1, state.saved, params, optimizer)
                row = metrics_row(setup, scores, state, base, began)
                writer.write("metrics", generation, row)
                ledgers.append_generation(ledger.path, generation, fitness)
                progress.update(generation + 1, row)
                if state.generation % config.checkpoint_every == 0:
                    state = save(folder, state)
            evaluate(setup, state.generation, state.params, writer, stop)
        except Stopped:
            if state.generation > state.saved:
                state = save(folder, state)
            console.print(
                f"stopped after {state.generation} of {config.generations} "
                f"generations; the same command goes on from {workdir}"
            )
            raise
    return finish(setup, state, ledger)


def make_evolution(config: ml_collections.ConfigDict) -> Evolution:
    """The settings of the update, checked."""
    try:
        evolution = Evolution(
            population=config.population,
            sigma=config.sigma,
            alpha=config.alpha,
            antithetic=config.antithetic,
            shaping=config.shaping,
        )
        evolution.noise.check_population(evolution.population)
        make_optimizer(evolution)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    return evolution


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a setting that no run can have."""
    for name in ("generations", "eval_every", "checkpoint_every", "eval_batch"):
        if config[name] < 1:
            raise InputError(f"{name} must be at least 1, not {config[name]}")
    for name in ("prompts", "max_new_tokens", "chunk", "memory_gb"):
        if config[name] < 0:
            raise InputError(f"{name} cannot be negative: {config[name]}")
    for name, value in config.data.items():
        if isinstance(value, int) and value < 0:
            raise InputError(f"data.{name} cannot be negative: {value}")
    for name in ("alpha", "temperature", "memory_gb"):
        if not np.isfinite(config[name]):
            raise InputError(f"{name} must be finite, not {config[name]}")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, not {config.seed}")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype must be one of {DTYPES}, not {config.dtype!r}")
    if not config.buckets or any(
        not isinstance(bucket, int) or bucket < 1 for bucket in config.buckets
    ):
        raise InputError(f"buckets are prompt lengths in tokens, not {config.buckets}")


def make_setup(config: ml_collections.ConfigDict, evolution: Evolution) -> Setup:
    """Loads the model and the tasks, and encodes all prompts."""
    pretrained = load(config.model)
    if pretrained.tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer, which tasks need")

    trained = make_examiner(
        config,
        pretrained,
        config.task,
        mode=config.mode,
        max_new_tokens=config.max_new_tokens,
        sampling=make_sampling(config),
    )
    # Members may sample their answers; what is reported is the greedy answer's.
    evaluated = {config.task: dataclasses.replace(trained, sampling=GREEDY)}
    evaluated |= {
        name: make_examiner(config, pretrained, name) for name in config.eval_tasks
    }
    train = prepare(trained, trained.task.train)
    if not train:
        raise InputError(f"task {config.task} has no training examples")
    if config.prompts > len(train):
        raise InputError(
            f"prompts={config.prompts}, but {config.task} has {len(train)} to train on"
        )
    # One shape for the whole run: that of the longest prompt.
    trained_on = one_bucket(trained, train)
    evaluations = {
        name: (each, prepare(each, each.task.test)) for name, each in evaluated.items()
    }
    for name, (_, test) in evaluations.items():
        if not test:
            raise InputError(f"task {name} has no examples to evaluate on")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
    return Setup(
        config, evolution, pretrained, parameters, trained_on, train, evaluations
    )


def make_examiner(
    config: ml_collections.ConfigDict,
    pretrained: Pretrained,
    name: str,
    **settings: Any,
) -> Examiner:
    """How the model is examined on the task of this name."""
    task = load_task(
        name,
        root=config.data.root,
        seed=config.seed,
        train=config.data.train,
        test=config.data.test,
    )
    return Examiner(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        eos_ids=pretrained.eos_ids,
        dtype=config.dtype,
        buckets=tuple(config.buckets),
        **settings,
    )


def make_sampling(config: ml_collections.ConfigDict) -> Sampling:
    """How training samples its answers, checked."""
    try:
        return Sampling(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def one_bucket(examiner: Examiner, questions: Sequence[Question]) -> Examiner:
    """The examiner with the one prompt length that holds all questions."""
    needed = longest(questions)
    bucket = min(b for b in examiner.buckets if b >= needed)
    return dataclasses.replace(examiner, buckets=(bucket,))


def choose_chunk(setup: Setup) -> int:
    """Members to hold at once: as set, or as many as the memory allows."""
    config, examiner = setup.config, setup.examiner
    if config.chunk:
        return min(config.chunk, config.population)
    rows = config.prompts or len(setup.train)
    if examiner.mode == "likelihood":
        rows *= max(len(question.choices) for question in setup.train)
    each = memory.bytes_per_member(
        setup.pretrained.config,
        setup.parameters,
        examiner.dtype,
        rows,
        examiner.buckets[0],
        examiner.max_new_tokens,
    )
    budget = int(config.memory_gb * 1e9) or memory.free_bytes()
    # The centre, its anchor and one update are there too.
    budget -= 0 if config.memory_gb else 3 * 4 * setup.parameters
    return chunk_size(config.population, each, budget, memory.most_members(rows))


def ledger_header(setup: Setup, base: str) -> dict[str, Any]:
    """What a replay needs to know."""
    return {
        "model": setup.config.model,
        "base": base,
        "seed": setup.config.seed,
        "evolution": dataclasses.asdict(setup.evolution),
        "dtype": setup.config.dtype,
        "parameters": setup.parameters,
        "versions": runs.versions(),
    }


def open_ledger(setup: Setup, path: Path) -> ledgers.Ledger:
    """The run's ledger, started if there is none, of this base model."""
    base = fingerprint(setup.pretrained.params)
    if not path.exists():
        ledgers.create(path, ledger_header(setup, base))
    try:
        ledger = ledgers.repair(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if ledger.header["base"] != base:
        raise InputError(
            f"{path} starts from other weights than those of {setup.config.model}"
        )
    check_length(path.parent, len(ledger.fitness), setup.config.generations)
    return ledger


def check_length(workdir: Path, done: int, generations: int) -> None:
    """Raises InputError where a run has gone further than it is to go."""
    if done > generations:
        raise InputError(
            f"{workdir} has gone {done} generations, more than {generations}; an "
            f"earlier state is rebuilt by: python -m jes.export --run={workdir} "
            f"--out=FOLDER --generations={generations}"
        )


def stored_copy(pretrained: Pretrained) -> PyTree:
    """The base weights, in the dtype of their files where that loses nothing.

    It is the anchor that ‖θ - θ_0‖ is measured from; in bfloat16 it takes half the
    memory of the float32 centre.
    """
    name = pretrained.hf_config.get("dtype") or pretrained.hf_config.get("torch_dtype")

    def stored(leaf: jax.Array) -> jax.Array:
        small, exact = _cast(leaf, jnp.dtype(name or leaf.dtype))
        # Its own memory in any case: that of the centre is given to its successor.
        return small if exact and small.dtype != leaf.dtype else jnp.array(leaf)

    return jax.tree.map(stored, pretrained.params)


@partial(jax.jit, static_argnums=1)
def _cast(leaf: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The leaf in another dtype, and whether that loses nothing."""
    small = leaf.astype(dtype)
    return small, (small.astype(leaf.dtype) == leaf).all()


def resume(
    evolution: Evolution,
    params: PyTree,
    ledger: ledgers.Ledger,
    folder: Path,
) -> State:
    """The state that the ledger says the run has reached.

    Args:
      evolution: settings of the update.
      params: the base weights.
      ledger: what happened.
      folder: of the run's checkpoints, to start from the newest that can be read.
    """
    optimizer = make_optimizer(evolution).init(params)
    saved, done = 0, len(ledger.fitness)
    restored = checkpoints.restore_latest(folder, (params, optimizer), done)
    if restored is not None:
        saved, (params, optimizer) = restored
    root = jax.random.key(ledger.header["seed"])
    params, optimizer = replay(
        evolution, params, optimizer, root, ledger.fitness[saved:], saved
    )
    return State(done, saved, params, optimizer)


@contextmanager
def writing(workdir: Path, done: int) -> Iterator[Writer]:
    """The metrics files, cut back to what happened before `done` generations."""
    keep_rows(workdir / "metrics.jsonl", lambda row: row["generation"] < done)
    keep_rows(workdir / "evaluations.jsonl", lambda row: row["generation"] <= done)
    writer = Writer(workdir, done)
    try:
        yield writer
    finally:
        writer.close()


def pick(setup: Setup, generation: int) -> list[Question]:
    """The questions of a generation: drawn without replacement, or all of them."""
    count, questions = setup.config.prompts, setup.train
    if not count or count == len(questions):
        return questions
    rng = np.random.default_rng([setup.config.seed, generation])
    return [questions[i] for i in rng.choice(len(questions), count, replace=False)]


def checked_fitness(scores: Score, generation: int) -> np.ndarray:
    """Rewards as float32 [N].

    Raises:
      InputError: if no member's reward is finite.
    """
    fitness = np.asarray(scores.reward, np.float32)
    if not np.isfinite(fitness).any():
        raise InputError(
            f"generation {generation}: no member has a finite reward; the weights have "
            "diverged (a smaller sigma or alpha helps), or the reward is at fault"
        )
    return fitness


def metrics_row(
    setup: Setup, scores: Score, state: State, base: PyTree, began: float
) -> dict[str, Any]:
    """One row of `metrics.jsonl`; `generation` counts from 0."""
    counted = np.isfinite(scores.reward)
    fitness = scores.reward[counted]
    moved = float(displacement(state.params, base))
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
        "truncated": float(np.mean(scores.truncated[counted])),
        "displacement_norm": moved,
        "displacement_norm_drift": drift(
            setup.evolution, setup.parameters, state.generation
        ),
        "tokens": int(np.sum(scores.tokens)),
        "tokens_per_second": float(np.sum(scores.tokens) / seconds),
        "seconds": seconds,
    }


def evaluate(
    setup: Setup, generation: int, params: PyTree, writer: Writer, stop: StopRequest
) -> None:
    """Scores the centre on held-out examples, unless a run before this did.

    Args:
      setup: of the run.
      generation: how many generations led to `params`.
      params: the centre.
      writer: of the rows.
      stop: asked before every batch.
    """
    rows = read_rows(writer.workdir / "evaluations.jsonl")
    have = {row["task"] for row in rows if row["generation"] == generation}
    for name, (examiner, questions) in setup.evaluations.items():
        if name in have:
            continue
        score = examine(
            examiner,
            params,
            questions,
            batch_size=setup.config.eval_batch,
            before_batch=stop.check,
        )
        row = {
            "generation": generation,
            "task": name,
            "examples": len(questions),
            **score._asdict(),
        }
        writer.write("evaluations", generation, row)
        console.print(
            f"after {generation} generations: {name} "
            f"{100 * score.accuracy:.1f} % of {len(questions)} held-out examples"
        )


def save(folder: Path, state: State) -> State:
    """Writes a checkpoint; the ledger alone would do, so that a full disk is no end."""
    try:
        checkpoints.save(folder, state.generation, (state.params, state.optimizer))
    except OSError as error:
        console.print(f"no checkpoint written ({error}); the ledger has everything")
        return state
    return state._replace(saved=state.generation)


def finish(setup: Setup, state: State, ledger: ledgers.Ledger) -> dict[str, Any]:
    """Saves the model, seals the ledger, and writes the summary last."""
    workdir = ledger.path.parent
    sealed = fingerprint(state.params)
    if ledger.fingerprints.get(state.generation) != sealed:
        ledgers.append_fingerprint(ledger.path, state.generation, sealed)
    trained = dataclasses.replace(setup.pretrained, params=state.params)
    # In the precision that the members answered in, so that it answers as evaluated.
    trained.save(workdir / "model", dtype=setup.config.dtype)
    rows = read_rows(workdir / "evaluations.jsonl")
    evaluations = {}
    for name in setup.evaluations:
        of_task = {row["generation"]: row for row in rows if row["task"] == name}
        evaluations[name] = {
            "before": of_task[0]["accuracy"],
            "after": of_task[state.generation]["accuracy"],
            "examples": of_task[0]["examples"],
        }
    training_curves(workdir)
    metrics = read_rows(workdir / "metrics.jsonl")
    summary = {
        "evaluations": evaluations,
        "generations": state.generation,
        "seconds": sum(row["seconds"] for row in metrics),
        "tokens": sum(row["tokens"] for row in metrics),
        "displacement_norm": metrics[-1]["displacement_norm"] if metrics else None,
    }
    write_json(workdir / "summary.json", summary)
    report(workdir, summary)
    return summary


def finished(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None for any other.

    Raises:
      InputError: if the folder is another run's, or a longer one's.
    """
    path = workdir / "summary.json"
    if runs.check(workdir, config.to_dict()) is None or not path.is_file():
        return None
    summary = json.loads(path.read_text())
    check_length(workdir, summary["generations"], config.generations)
    if summary["generations"] < config.generations:
        path.unlink()  # its presence says that the run is complete
        return None
    console.print("this run finished before; give another --workdir for a new one")
    report(workdir, summary)
    return summary


def report(workdir: Path, summary: dict[str, Any]) -> None:
    """Prints what changed and where everything is."""

    def percent(share: float | None) -> str:
        return "not finite" if share is None else f"{100 * share:.1f} %"

    for name, accuracy in summary["evaluations"].items():
        console.print(
            f"{name}: {percent(accuracy['before'])} -> {percent(accuracy['after'])} "
            f"on {accuracy['examples']} held-out examples"
        )
    console.print(
        f"{summary['generations']} generations in {summary['seconds']:.0f} s; model in "
        f"{workdir / 'model'}, curves with `tensorboard --logdir {workdir}`, "
        f"ledger in {workdir / 'ledger.jsonl'}"
    )


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings: a file in configs/.", lock_config=True
    )
    workdir_flag = flags.DEFINE_string(
        "workdir", None, "Run folder; by default runs/<name of the config file>."
    )
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        memory.give_back_freed_blocks()
        file_name = config_flags.get_config_filename(flags.FLAGS["config"])
        file, _, variant = file_name.partition(":")
        name = "_".join(filter(None, [Path(file).stem, variant]))
        run(config_flag.value, Path(workdir_flag.value or f"runs/{name}"))

    command_line.start(command)


if __name__ == "__main__":
    main()
