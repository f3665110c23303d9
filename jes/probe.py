r"""Probes the landscape at a model: what random perturbations do to the reward.

    python -m jes.probe --config=configs/probe_gsm8k.py:tiny [--workdir=FOLDER]

For each of `config.models`, each σ of `config.probe.sigmas` and each batch, candidates
:math:`\theta + \sigma u` answer a pool of training prompts, and fresh ones, on which
the best of the pool can be scored again (2602.00170, section 5 and App. G). The same
directions u are taken at every σ. At the end one more batch, the sham: the model
itself, sampling its answers, for what chance alone does.

FOLDER has settings.json, candidates.jsonl (a row a candidate: which answers are right,
as hexadecimal bits, and how many are other than the model's), probe.json, probe.md and
probe.png. Stopped at any moment, the same command goes on; it may be given again with
more models, σ or batches.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from jes.config import freeze
from jes.core.ledger import append_row
from jes.core.noise import Noise, generation_key
from jes.core.population import chunks
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.experiment import one_bucket, task_evaluation
from jes.io import command_line, memory
from jes.io.console import console
from jes.io.interrupts import Stopped, StopRequest, stop_request
from jes.io.metrics import keep_rows, read_rows
from jes.io.runs import alone, claim_results
from jes.landscape.probe_report import write_report
from jes.landscape.probes import SIZES
from jes.models.weights import Pretrained, fingerprint, load
from jes.questions import Evaluation, Question, padded_lengths, prepare
from jes.rollout import answer_each
from jes.sampling.generate import GREEDY, Sampling
from jes.scoring import Answered


class Batch(NamedTuple):
    """Candidates that are asked alike.

    Attributes:
      sigma: of the perturbation; 0 for the model itself, or for the sham.
      number: its number, from 0; that of the model itself and of the sham is negative.
      candidates: how many.
    """

    sigma: float
    number: int
    candidates: int


MODEL = Batch(0.0, -1, 1)
"""The model itself, as if it were a candidate."""
SHAM = -2
BEFORE = 2
"""Numbers of batches that are no perturbations: keys are from 0."""


def plan(probe: ml_collections.ConfigDict) -> list[Batch]:
    """What is asked of a model: batch by batch every σ, then the sham."""
    batches = [
        Batch(sigma, batch, probe.candidates)
        for batch in range(probe.batches)
        for sigma in probe.sigmas
    ]
    if probe.sham_temperature:
        batches.append(Batch(0.0, SHAM, probe.candidates))
    return batches


def check_probe(probe: ml_collections.ConfigDict) -> None:
    """Raises InputError for settings that no probe can have."""
    for name, least in (("candidates", min(SIZES)), ("batches", 1), ("pool", 1)):
        if probe[name] < least:
            raise InputError(f"probe.{name} must be at least {least}: {probe[name]}")
    if probe.fresh < 0 or probe.pool_seed < 0:
        raise InputError("probe.fresh and probe.pool_seed cannot be negative")
    if not np.isfinite(probe.sham_temperature) or probe.sham_temperature < 0:
        raise InputError(f"probe.sham_temperature={probe.sham_temperature} cannot be")
    if not probe.sigmas or len(set(probe.sigmas)) < len(probe.sigmas):
        raise InputError(f"probe.sigmas are to be different: {probe.sigmas}")
    try:
        for sigma in probe.sigmas:
            Noise(sigma=float(sigma))
    except (ValueError, TypeError) as error:
        raise InputError(f"probe.sigmas: {error}") from error


def load_floats(name: str) -> Pretrained:
    """A model that Gaussian noise can be added to, with a tokenizer."""
    pretrained = load(name)
    if pretrained.tokenizer is None:
        raise InputError(f"{name} has no tokenizer, which tasks need")
    if is_quantized(pretrained.params):
        raise InputError(f"{name} is quantised: probes are of models of floats")
    return pretrained


def pool_of(
    config: ml_collections.ConfigDict, evaluation: Evaluation
) -> tuple[Evaluation, list[Question]]:
    """The prompts of the pool and then the fresh ones, the same for all models.

    Returns:
      The evaluation with the one prompt length that holds them all, and the questions.

    Raises:
      InputError: if the task has too few training examples.
    """
    examples, probe = evaluation.task.train, config.probe
    wanted = probe.pool + probe.fresh
    if wanted > len(examples):
        raise InputError(
            f"probe.pool={probe.pool} and probe.fresh={probe.fresh} are more than the "
            f"{len(examples)} training examples of {config.task}"
        )
    rng = np.random.default_rng(probe.pool_seed)
    chosen = rng.choice(len(examples), wanted, replace=False)
    questions = prepare(evaluation, [examples[i] for i in chosen])
    return one_bucket(evaluation, questions), questions


def probe_model(
    config: ml_collections.ConfigDict,
    name: str,
    path: Path,
    settings: dict[str, Any],
    stop: StopRequest,
) -> None:
    """Asks what has no row yet of one model, and appends the rows.

    Args:
      config: all settings.
      name: of the model.
      path: of the rows.
      settings: what the rows depend on.
      stop: asked before every batch of prompts.
    """
    pretrained = load_floats(name)
    evaluation = task_evaluation(
        freeze(config),
        pretrained,
        config.task,
        mode=config.mode,
        max_new_tokens=config.max_new_tokens,
    )
    evaluation, questions = pool_of(config, evaluation)
    claim_results(
        path.parent, {**settings, f"model {name}": fingerprint(pretrained.params)}
    )
    done = {
        (row["sigma"], row["batch"], row["candidate"])
        for row in read_rows(path)
        if row["model"] == name
    }
    # The model itself is always asked: the others are compared with what it says.
    ((_, itself),) = answers_of(config, evaluation, pretrained, questions, MODEL, stop)
    for batch in (MODEL, *plan(config.probe)):
        missing = [
            candidate
            for candidate in range(batch.candidates)
            if (batch.sigma, batch.number, candidate) not in done
        ]
        if not missing:
            continue
        asked = answers_of(
            config, evaluation, pretrained, questions, batch, stop, missing
        )
        for candidate, answered in asked:
            other = (answered.said != itself.said).any(-1).mean()
            row = {
                "model": name,
                "sigma": batch.sigma,
                "batch": batch.number,
                "candidate": candidate,
                "right": to_hex(answered.right),
                "other_answers": float(other),
            }
            append_row(path, row)
        console.print(f"{name}: {batch.candidates} candidates, {describe(batch)}")


def describe(batch: Batch) -> str:
    """Which batch it is, for people."""
    if batch == MODEL:
        return "the model itself"
    if batch.number == SHAM:
        return "sham, the model sampling its answers"
    return f"sigma {batch.sigma:g}, batch {batch.number}"


def answers_of(
    config: ml_collections.ConfigDict,
    evaluation: Evaluation,
    pretrained: Pretrained,
    questions: list[Question],
    batch: Batch,
    stop: StopRequest,
    candidates: Sequence[int] = (0,),
) -> Iterator[tuple[int, Answered]]:
    """What candidates of a batch answer, one after the other; arrays [B] and [B, N]."""
    noise = Noise(sigma=float(batch.sigma)) if batch.sigma else None
    sampling = GREEDY
    if batch.number == SHAM:
        sampling = Sampling(temperature=config.probe.sham_temperature)
    evaluation = dataclasses.replace(evaluation, sampling=sampling)
    key = generation_key(jax.random.key(config.seed), batch.number + BEFORE)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
    rows = min(len(questions), config.eval_batch)
    if evaluation.mode == "likelihood":
        rows *= max(len(question.choices) for question in questions)
    held = 0 if config.memory_gb else 4 * parameters
    prefix, rest = padded_lengths(evaluation, questions)
    chunk = config.chunk or memory.choose_chunk(
        pretrained.config,
        memory.weight_bytes(pretrained.config, parameters, evaluation.dtype),
        evaluation.dtype,
        rows,
        rest,
        evaluation.max_new_tokens,
        prefix,
        population=len(candidates),
        budget=(int(config.memory_gb * 1e9) or memory.free_bytes()) - held,
    )
    for members in chunks(np.asarray(candidates), min(chunk, len(candidates))):
        answered = answer_each(
            evaluation,
            pretrained.params,
            key,
            questions,
            members,
            noise=noise,
            batch_size=config.eval_batch,
            before_batch=stop.check,
        )
        # The last chunk is filled up with one of its own.
        for i in range(len(set(members.tolist()))):
            yield int(members[i]), Answered(*(each[i] for each in answered))


def to_hex(bits: np.ndarray) -> str:
    """Bools [P] as hexadecimal digits, the first in the highest bit."""
    return np.packbits(bits).tobytes().hex()


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings: a configs/probe_*.py.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", "Of the results; by default runs/<config>.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        memory.give_back_freed_blocks()
        config = config_flag.value
        if "probe" not in config:
            raise InputError(
                "the config has no settings of a probe: see configs/probe_*"
            )
        freeze(config)
        check_probe(config.probe)
        workdir = Path(flags.FLAGS.workdir or f"runs/{command_line.config_name()}")
        with alone(workdir), stop_request() as stop:
            run(config, workdir, stop)

    command_line.start(command)


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopRequest) -> None:
    """Probes every model, and writes the report."""
    path = workdir / "candidates.jsonl"
    keep_rows(path, lambda row: True)  # but for half a row, which a kill may leave
    probe = config.probe
    settings = {
        "task": config.task,
        "mode": config.mode,
        "dtype": config.dtype,
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens,
        "pool": probe.pool,
        "pool_seed": probe.pool_seed,
        "fresh": probe.fresh,
        "sham_temperature": probe.sham_temperature,
    }
    try:
        for name in config.models:
            probe_model(config, name, path, settings, stop)
    except Stopped:
        console.print(f"stopped; the same command goes on from {workdir}")
        raise
    write_report(config, read_rows(path), workdir)


if __name__ == "__main__":
    main()
