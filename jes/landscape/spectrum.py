r"""Curvature of the landscape around models: how many directions are stiff, and which.

    python -m jes.landscape.spectrum --config=configs/probe_gsm8k.py:tiny \
        [--workdir=FOLDER] [--run=FOLDER]

For each of `config.models`, at its weights and on the same training examples
(`config.curvature` has the settings):

1. a surrogate, minus the log-likelihood of reference answers: the spectrum of its
   Hessian by stochastic Lanczos quadrature (2602.00170, Alg. 3), its top eigenvectors,
   the top eigenvalues again by ARPACK, and all of them where the model is that small;
2. antithetic pairs of perturbed models: second differences of the reward and of the
   surrogate, prompt by prompt, for each σ;
3. from these the cheap index of curvature, and the spectrum of the smoothed reward's
   Hessian as the pairs show it, beside that of rewards dealt out at random;
4. the overlap of improving perturbations, of ES updates, of the surrogate's gradient,
   and of the displacement of a run (`--run`, from the first model), with the top
   subspace of the surrogate: the eigenvalues of largest magnitude, of either sign.

What is measured is kept in FOLDER/MODEL: model.json, results.jsonl (a row a probe, a
chunk of members, ...), top.npy (eigenvectors) and directions.npz. Killed, the same
command goes on. spectrum.json, spectrum.md and the figures are made anew each time.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.flatten_util import ravel_pytree
from ml_collections import config_flags
from scipy.sparse.linalg import LinearOperator, eigsh

from jes.baselines.gradient import largest_divisor, mean_gradient
from jes.config import freeze
from jes.core.ledger import append_row
from jes.core.noise import Noise, PyTree, generation_key
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.experiment import one_bucket, task_evaluation
from jes.io import command_line, memory
from jes.io.console import console
from jes.io.metrics import keep_rows, read_rows, write_json
from jes.io.runs import alone, claim
from jes.landscape import lanczos
from jes.landscape.pairs import values_of
from jes.landscape.smoothed import Directions, look_at
from jes.landscape.spectrum_report import report, write_report
from jes.landscape.subspaces import coordinates_of, random_subspace
from jes.landscape.surrogate import (
    reference_batch,
    surrogate_loss,
    surrogate_product,
)
from jes.metacognition.sparsity import displacement, load_run
from jes.models.weights import Pretrained, fingerprint, load
from jes.questions import Evaluation, Question, prepare
from jes.sampling.likelihood import ChoiceBatch


class Subject(NamedTuple):
    """A model, what it is asked, and where its results go.

    Attributes:
      name: as in the settings.
      folder: of its results.
      config: all settings.
      pretrained: the model, float32.
      evaluation: how it is asked.
      questions: the prompts.
      references: with their reference answers.
      size: D, number of weights.
    """

    name: str
    folder: Path
    config: ml_collections.ConfigDict
    pretrained: Pretrained
    evaluation: Evaluation
    questions: list[Question]
    references: ChoiceBatch
    size: int

    @property
    def path(self) -> Path:
        """Of the rows."""
        return self.folder / "results.jsonl"

    @property
    def key(self) -> jax.Array:
        """Of all perturbations: the same directions for every σ."""
        return generation_key(jax.random.key(self.config.seed), 0)

    @property
    def microbatch(self) -> int:
        """Examples whose gradient is taken at once."""
        count = len(self.questions)
        return largest_divisor(count, self.config.curvature.microbatch or count)

    @property
    def directions(self) -> Directions:
        """What `look` has left."""
        with np.load(self.folder / "directions.npz") as kept:
            return Directions(kept["products"], kept["coordinates"], self.size)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for settings that cannot be."""
    freeze(config)
    curvature = config.curvature
    lowest = {"examples": 2, "probes": 1, "steps": 2, "top": 1, "directions": 4}
    lowest |= {"microbatch": 0, "exact": 0, "dense": 0, "shuffles": 2}
    for name, least in lowest.items():
        if curvature[name] < least:
            raise InputError(
                f"curvature.{name} must be at least {least}, not {curvature[name]}"
            )
    if not 0 < curvature.extreme <= 0.5:
        raise InputError(
            f"curvature.extreme is a share, at most 0.5: not {curvature.extreme}"
        )
    if not curvature.sigmas or len(set(curvature.sigmas)) < len(curvature.sigmas):
        raise InputError("curvature.sigmas is empty, or has one twice")
    for sigma in curvature.sigmas:
        if not (np.isfinite(sigma) and sigma > 0):
            raise InputError(f"curvature.sigmas must be positive, not {sigma}")
    if not config.models or len(set(config.models)) < len(config.models):
        raise InputError("models is empty, or has one twice")


def make_subject(
    config: ml_collections.ConfigDict, number: int, workdir: Path
) -> Subject:
    """Loads a model and its examples, and makes its folder.

    Raises:
      InputError: for a quantised model, one without a tokenizer, a task that does not
        fit, or a folder with results of another model.
    """
    name = config.models[number]
    pretrained = load(name)
    if is_quantized(pretrained.params):
        raise InputError(f"{name} is quantised: whole codes have no curvature")
    if pretrained.tokenizer is None:
        raise InputError(f"{name} has no tokenizer, which tasks need")
    settings = freeze(config)
    evaluation = task_evaluation(
        settings,
        pretrained,
        config.task,
        mode=config.mode,
        max_new_tokens=config.max_new_tokens,
        sampling=settings.sampling,
    )
    if evaluation.task.meta is not None:
        raise InputError(f"task {config.task} asks two questions: give another")
    count, examples = config.curvature.examples, evaluation.task.train
    if count > len(examples):
        raise InputError(
            f"curvature.examples={count}, but {config.task} has {len(examples)} to "
            "train on"
        )
    rng = np.random.default_rng(config.probe.pool_seed)
    chosen = rng.choice(len(examples), count, replace=False)
    questions = prepare(evaluation, [examples[i] for i in chosen])
    references = reference_batch(evaluation, questions)
    folder = workdir / f"{number}-{Path(name).name}"
    folder.mkdir(exist_ok=True)
    found = {"model": name, "fingerprint": fingerprint(pretrained.params)}
    told = folder / "model.json"
    if told.exists() and json.loads(told.read_text()) != found:
        raise InputError(
            f"{folder} has results of another model: give another --workdir"
        )
    write_json(told, found)
    size = sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
    if config.curvature.steps > size:
        raise InputError(f"curvature.steps: {name} has {size} weights only")
    return Subject(
        name,
        folder,
        config,
        pretrained,
        one_bucket(evaluation, questions),
        questions,
        references,
        size,
    )


def measure(subject: Subject) -> None:
    """Measures what has no row yet."""
    keep_rows(subject.path, lambda row: True)  # but for half a row, left by a kill
    probe_surrogate(subject)
    probe_by_pairs(subject)
    if not (subject.folder / "directions.npz").exists():
        look(subject)


def rows_of(subject: Subject, kind: str) -> list[dict[str, Any]]:
    """What has been measured of a kind."""
    return [row for row in read_rows(subject.path) if row["kind"] == kind]


def probe_surrogate(subject: Subject) -> None:
    """The spectrum of the surrogate's Hessian: quadrature, top, and the checks."""
    curvature, size = subject.config.curvature, subject.size
    params, batch = subject.pretrained.params, subject.references
    model = subject.pretrained.model
    product = surrogate_product(model, params, subject.microbatch)
    key = jax.random.fold_in(jax.random.key(subject.config.seed), 1)

    for number in range(len(rows_of(subject, "quadrature")), curvature.probes):
        start = lanczos.probe(jax.random.fold_in(key, number), size)
        krylov = lanczos.lanczos(product, start, curvature.steps, params, batch)
        nodes, weights = lanczos.quadrature_of(krylov, size)
        row = {"kind": "quadrature", "nodes": nodes, "weights": weights}
        if number == 0:
            top = lanczos.ritz_pairs(krylov, curvature.top)
            save_array(subject.folder / "top.npy", np.asarray(top.vectors))
            row |= {"values": top.values, "residuals": top.residuals}
        note(subject, row)
        console.print(
            f"{subject.name}: probe {number + 1} of {curvature.probes}, highest "
            f"curvature of the surrogate {nodes[-1]:.4g}, lowest {nodes[0]:.4g}"
        )

    compiled = jax.jit(product)

    def multiply(vector: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(jnp.float32(vector.ravel()), params, batch))

    if curvature.exact and not rows_of(subject, "exact"):
        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float32)
        count = min(curvature.exact, size - 1)
        another = np.asarray(lanczos.probe(key, size))
        values = eigsh(operator, count, v0=another, tol=1e-3, return_eigenvectors=False)
        ordered = values[np.argsort(-np.abs(values))]
        note(subject, {"kind": "exact", "values": ordered})
        console.print(f"{subject.name}: largest curvature by ARPACK {ordered[0]:.4g}")

    if size <= curvature.dense and not rows_of(subject, "dense"):
        matrix = np.array([multiply(unit) for unit in np.eye(size)], np.float64)
        spectrum = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        note(subject, {"kind": "dense", "values": spectrum})


def probe_by_pairs(subject: Subject) -> None:
    """What the centre and all members around it get, for each σ."""
    if not rows_of(subject, "centre"):
        note(subject, {"kind": "centre", **values(subject, np.zeros(1, int), None)})
    members = 2 * subject.config.curvature.directions
    chunk = choose_chunk(subject, members)
    for sigma in subject.config.curvature.sigmas:
        noise = Noise(sigma=sigma, antithetic=True)
        rows = [row for row in rows_of(subject, "members") if row["sigma"] == sigma]
        first = sum(len(row["reward"]) for row in rows)
        while first < members:
            numbers = np.arange(first, min(first + chunk, members))
            found = values(subject, numbers, noise)
            note(subject, {"kind": "members", "sigma": sigma, "first": first, **found})
            if (first + chunk) * 4 // members > first * 4 // members:
                console.print(
                    f"{subject.name}: sigma {sigma:g}, {numbers[-1] + 1} of {members} "
                    f"members, reward {np.mean(found['reward']):.3f}"
                )
            first += len(numbers)


def values(
    subject: Subject, members: np.ndarray, noise: Noise | None
) -> dict[str, np.ndarray]:
    """Of both objectives, [C, P]."""
    found = values_of(
        subject.evaluation,
        subject.pretrained.params,
        subject.key,
        members,
        subject.questions,
        subject.references,
        noise,
    )
    if not np.isfinite(found.surrogate).all():
        raise InputError(
            f"{subject.name}: likelihoods of members are not finite: a smaller sigma?"
        )
    return found._asdict()


def choose_chunk(subject: Subject, members: int) -> int:
    """Members to hold at once: as set, or as many as the memory allows."""
    config = subject.config
    if config.chunk:
        return config.chunk
    rows = len(subject.questions)
    if subject.evaluation.mode == "likelihood":
        rows *= max(len(question.choices) for question in subject.questions)
    return memory.choose_chunk(
        subject.pretrained.config,
        memory.weight_bytes(subject.pretrained.config, subject.size, jnp.float32),
        jnp.float32,
        rows,
        subject.references.rows.tokens.shape[1],
        subject.evaluation.max_new_tokens,
        population=members,
        budget=int(config.memory_gb * 1e9) or memory.free_bytes(),
    )


def look(subject: Subject) -> None:
    """Draws all directions again, for their products and their coordinates.

    These are along the top of the surrogate, and along as many random vectors.
    """
    top = jnp.asarray(np.load(subject.folder / "top.npy"))
    basis = jnp.concatenate([top, random_basis(subject, len(top))])
    count = subject.config.curvature.directions
    found = look_at(subject.pretrained.params, basis, subject.key, count)
    path = subject.folder / "directions.npz"
    part = path.with_suffix(".part.npz")
    np.savez(part, products=found.products, coordinates=found.coordinates)
    part.replace(path)


def random_basis(subject: Subject, count: int) -> jax.Array:
    """A random subspace to compare the top with, [count, D]."""
    key = jax.random.fold_in(jax.random.key(subject.config.seed), 2)
    return random_subspace(key, count, subject.size)


def note(subject: Subject, row: dict[str, Any]) -> None:
    """Appends a row; arrays are written in as many digits as float32 has."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | list):
            return [plain(one) for one in value]
        if isinstance(value, float | np.floating):
            return float(f"{value:.9g}")
        return value

    append_row(subject.path, {key: plain(value) for key, value in row.items()})


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a file that appears whole or not at all."""
    part = path.with_suffix(".part.npy")
    np.save(part, array)
    part.replace(path)


def gradient(subject: Subject) -> PyTree:
    """That of the surrogate, like the parameters."""
    params = subject.pretrained.params
    arrays = jax.tree.map(jnp.asarray, subject.references)

    def slopes(rows: jax.Array) -> tuple[tuple[()], PyTree]:
        chosen = jax.tree.map(lambda array: array[rows], arrays)
        loss = partial(surrogate_loss, subject.pretrained.model, batch=chosen)
        return (), jax.grad(loss)(params)

    mean = jax.jit(partial(mean_gradient, slopes, microbatch=subject.microbatch))
    return mean(jnp.arange(len(subject.questions)))[1]


def displacement_of(subject: Subject, run: Path) -> PyTree:
    """How far a run has gone.

    Raises:
      InputError: for a folder that is no run, or one from another model.
    """
    base, tuned, _, _ = load_run(run)
    if fingerprint(base.params) != fingerprint(subject.pretrained.params):
        raise InputError(f"--run: {run} does not start from {subject.name}")
    return displacement(tuned.params, base.params, ())


def place(subject: Subject, what: str, tree: PyTree) -> dict[str, Any]:
    """A vector along the top subspace, and along a random one, for the report."""
    vector = jnp.asarray(ravel_pytree(tree)[0], jnp.float32)
    top = jnp.asarray(np.load(subject.folder / "top.npy"))
    bases = {"top": top, "random": random_basis(subject, len(top))}
    found = {name: coordinates_of(vector, basis) for name, basis in bases.items()}
    square = float(np.square(np.asarray(vector, np.float64)).sum())
    return {**found, "square": square, "what": what}


def study(config: ml_collections.ConfigDict, workdir: Path, run: Path | None) -> None:
    """Measures every model, and writes the report."""
    check(config)
    if run is not None:
        load_run(run)  # a mistake is found before the work
    claim(workdir, config.to_dict(), dict)
    reports = []
    for number in range(len(config.models)):
        subject = make_subject(config, number, workdir)
        measure(subject)
        vectors = [place(subject, "gradient of the surrogate", gradient(subject))]
        if run is not None and number == 0:
            moved = displacement_of(subject, run)
            vectors.append(place(subject, f"displacement of {run.name}", moved))
        rows = read_rows(subject.path)
        directions = subject.directions
        reports.append(report(subject.name, rows, directions, config, vectors))
    write_report(workdir, reports, config)


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings: a file in configs/.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", "By default runs/<config>_spectrum.")
    flags.DEFINE_string("run", "", "A run of jes.train, for its displacement.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        memory.give_back_freed_blocks()
        values = flags.FLAGS
        file_name = config_flags.get_config_filename(values["config"])
        file, _, variant = file_name.partition(":")
        name = "_".join(filter(None, [Path(file).stem, variant, "spectrum"]))
        workdir = Path(values.workdir or f"runs/{name}")
        with alone(workdir):
            study(config_flag.value, workdir, Path(values.run) if values.run else None)

    command_line.start(command)


if __name__ == "__main__":
    main()
