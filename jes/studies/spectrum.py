r"""Curvature of the landscape around models: how many directions are stiff, and which.

    python -m jes.studies.spectrum --config=configs/probe_gsm8k.py:tiny \
        [--workdir=FOLDER] [--run=FOLDER]

For each of `config.models`, at its weights and on the same training examples
(`config.curvature` has the settings):

1. a surrogate, minus the log-likelihood of reference answers: the spectrum of its
   Hessian by stochastic Lanczos quadrature (2602.00170, Alg. 3), its top eigenvectors,
   the top eigenvalues again by ARPACK, and all of them for small models;
2. antithetic pairs of perturbed models: second differences of the reward and of the
   surrogate, prompt by prompt, for each σ;
3. from these the cheap index of curvature, and the spectrum of the smoothed reward's
   Hessian by these pairs, beside that of permuted rewards;
4. the overlap of improving perturbations, of ES updates, of the surrogate's gradient,
   and of the displacement of a run (`--run`, from the first model), with the top
   subspace of the surrogate: the eigenvalues of largest magnitude, of either sign.

Measurements are in FOLDER/MODEL: model.json, results.jsonl (a row a probe, a chunk of
members, ...), top.npy (eigenvectors) and directions.npz. Interrupted, the same command
continues. spectrum.json is computed from them, and spectrum.md and the figures are
drawn from it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh

from jes.baselines.gradient import largest_divisor, mean_gradient
from jes.config import freeze
from jes.core.ledger import append_row
from jes.core.noise import Noise, PyTree, generation_key
from jes.core.population import perturb_members
from jes.errors import InputError
from jes.experiment import one_shape, task_evaluation
from jes.io.console import console
from jes.io.metrics import keep_rows, read_rows, write_json
from jes.landscape import curvature, lanczos
from jes.landscape.curvature import Directions
from jes.landscape.lanczos import Measures, Quadrature
from jes.models.weights import Pretrained, fingerprint
from jes.questions import Evaluation, Question, batch_of
from jes.rollout import answer, prepare_rollout
from jes.run_folder import claim
from jes.sampling.likelihood import (
    Choices,
    choice_log_likelihoods,
    log_likelihoods,
    pack_choices,
)
from jes.sampling.packing import Shape
from jes.sampling.prompts import bucket, check_lengths, encode_continuation
from jes.scoring import answer_rewards
from jes.studies import grid
from jes.studies.probe import (
    check_least,
    choose_chunk,
    draw_questions,
    load_floats,
    start,
)
from jes.studies.sparsity import displacement, load_run
from jes.tasks.task import Example, Task

Row = dict[str, Any]
OBJECTIVES = ("reward", "surrogate")
HALVES = 5
"""Eigenvectors of a half of the pairs, measured by the other half."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its questions, and the folder of its results."""

    name: str
    folder: Path
    config: ml_collections.ConfigDict
    pretrained: Pretrained
    evaluation: Evaluation
    questions: list[Question]
    references: Choices  # the prompts with their reference answers

    @property
    def size(self) -> int:
        """D, number of weights."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.pretrained.params))

    @property
    def key(self) -> jax.Array:
        """Root key of the model's random numbers."""
        return jax.random.key(self.config.seed)

    @property
    def microbatch(self) -> int:
        """Examples per gradient computation."""
        count = len(self.questions)
        return largest_divisor(count, self.config.curvature.microbatch or count)

    def rows(self, kind: str) -> list[Row]:
        """Measurements of a kind."""
        rows = read_rows(self.folder / "results.jsonl")
        return [row for row in rows if row["kind"] == kind]

    def add(self, kind: str, **row: Any) -> None:
        """Appends a row, with the digits of float32."""
        text = json.dumps(
            {"kind": kind} | row, default=lambda x: np.asarray(x).tolist()
        )
        rounded = json.loads(text, parse_float=lambda x: float(f"{float(x):.9g}"))
        append_row(self.folder / "results.jsonl", rounded)

    def basis(self) -> jax.Array:
        """The surrogate's k top eigenvectors and a random subspace, [2k, D]."""
        top = jnp.asarray(np.load(self.folder / "top.npy"))
        key = jax.random.fold_in(self.key, 2)
        random = curvature.random_subspace(key, len(top), self.size)
        return jnp.concatenate([top, random])


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for settings out of range."""
    settings = config.curvature
    least = {"examples": 2, "probes": 1, "steps": 2, "top": 1, "directions": 4}
    least |= {"microbatch": 0, "exact": 0, "dense": 0, "shuffles": 2}
    check_least("curvature", settings, least)
    if not 0 < settings.extreme <= 0.5:
        raise InputError(
            f"curvature.extreme is a share, at most 0.5: not {settings.extreme}"
        )
    lists = {"curvature.sigmas": settings.sigmas, "models": config.models}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} is empty, or has an entry twice")
    for sigma in settings.sigmas:
        if not (np.isfinite(sigma) and sigma > 0):
            raise InputError(f"curvature.sigmas must be positive, not {sigma}")


def make_subject(
    config: ml_collections.ConfigDict, number: int, workdir: Path
) -> Subject:
    """Loads a model and its examples, and makes its folder.

    Raises:
      InputError: for a quantised model, one without a tokenizer, a task that does not
        fit, or a folder with results of another model.
    """
    name, count = config.models[number], config.curvature.examples
    pretrained, settings = load_floats(name), freeze(config)
    evaluation = task_evaluation(
        settings,
        pretrained,
        config.task,
        mode=config.mode,
        sampling=settings.sampling,
    )
    if evaluation.task.meta is not None:
        raise InputError(f"task {config.task} asks two questions: give another")
    needed = f"curvature.examples={count}"
    questions = draw_questions(evaluation, count, config.probe.pool_seed, needed)
    references = reference_batch(evaluation, questions)
    folder = workdir / f"{number}-{Path(name).name}"
    folder.mkdir(exist_ok=True)
    found = {"model": name, "fingerprint": fingerprint(pretrained.params)}
    path = folder / "model.json"
    if path.exists() and json.loads(path.read_text()) != found:
        raise InputError(
            f"{folder} has results of another model: give another --workdir"
        )
    write_json(path, found)
    evaluation = one_shape(evaluation, questions)
    subject = Subject(
        name, folder, config, pretrained, evaluation, questions, references
    )
    if config.curvature.steps > subject.size:
        raise InputError(f"curvature.steps: {name} has {subject.size} weights only")
    return subject


# The surrogate: a differentiable loss in place of the reward. It shares the weights
# and the examples with the reward, not its Hessian.


def reference(task: Task, example: Example) -> str:
    """The text of a correct answer: a worked solution, the right choice, or the answer.

    Raises:
      InputError: if the examples of the task have none.
    """
    if "solution" in example:
        return example["solution"]
    if task.choices is not None and task.answer is not None:
        return task.choices(example)[task.answer(example)]
    answer = example.get("answer")
    if not isinstance(answer, str):
        raise InputError(
            f"task {task.name} has no text of a right answer, which a surrogate of its "
            "reward needs"
        )
    return answer


def reference_batch(evaluation: Evaluation, questions: Sequence[Question]) -> Choices:
    """Prompts with their reference answers and the end token, a row an example.

    Raises:
      InputError: for a task without such answers, or a row that no bucket holds.
    """
    task, tokenizer, end = evaluation.task, evaluation.tokenizer, evaluation.eos_ids[:1]
    texts = [reference(task, question.example) for question in questions]
    answers = [[*encode_continuation(tokenizer, text), *end] for text in texts]
    whole = [[*q.prompt, *text] for q, text in zip(questions, answers, strict=True)]
    try:
        check_lengths(whole, evaluation.buckets)
    except ValueError as error:
        raise InputError(f"{task.name}: {error}") from error
    count, lengths = len(questions), evaluation.buckets
    shape = Shape(1, count, bucket(max(map(len, whole)), lengths))
    prompts, choices = [q.prompt for q in questions], [[text] for text in answers]
    return pack_choices(prompts, choices, lengths, (), shape, np.arange(count))


def surrogate_loss(model: Any, params: PyTree, batch: Choices) -> jax.Array:
    """Minus the log-likelihood in nats of a reference answer, the mean over the rows.

    Args:
      model: a decoder.
      params: its weights, float32, without a member axis.
      batch: from `reference_batch`.
    """
    return -choice_log_likelihoods(model, {"params": params}, batch).mean()


def mean_over_rows(function: Any, batch: Choices, microbatch: int = 0) -> PyTree:
    """The mean of a function of a part of the batch, at most `microbatch` rows each."""

    def part(rows: jax.Array) -> tuple[tuple[()], PyTree]:
        some = jax.tree.map(lambda array: jnp.asarray(array)[:, rows], batch.texts.rows)
        some = some._replace(number=some.number - rows[0])
        texts = batch.texts._replace(rows=some)
        return (), function(Choices(texts, jnp.asarray(batch.lengths)[rows]))

    return mean_gradient(part, jnp.arange(len(batch.lengths)), microbatch)[1]


def surrogate_product(
    model: Any, params: PyTree, microbatch: int = 0
) -> lanczos.Product:
    """The Hessian of the surrogate as a product for `jes.landscape.lanczos`.

    Args:
      model: a decoder.
      params: its weights; only their shapes matter.
      microbatch: rows whose activations are in memory at once; divides P, 0 for all.

    Returns:
      A function of a flat vector [D], the weights and the batch, to be traced.
    """
    _, unravel = ravel_pytree(params)

    def product(vector: jax.Array, params: PyTree, batch: Choices) -> jax.Array:
        def part(batch: Choices) -> jax.Array:
            loss = partial(surrogate_loss, model, batch=batch)
            return ravel_pytree(curvature.hvp(loss, params, unravel(vector)))[0]

        # Accelerators round float32 products by default.
        with jax.default_matmul_precision("highest"):
            return mean_over_rows(part, batch, microbatch)

    return product


# Measurements.


def measure(subject: Subject) -> None:
    """Measures what has no row yet."""
    # Drops a row that a kill cut short.
    keep_rows(subject.folder / "results.jsonl", lambda row: True)
    params = subject.pretrained.params
    product = surrogate_product(subject.pretrained.model, params, subject.microbatch)
    measure_quadrature(subject, product)
    check_quadrature(subject, product)
    measure_pairs(subject)
    path = subject.folder / "directions.npz"
    if not path.exists():
        key, count = generation_key(subject.key, 0), subject.config.curvature.directions
        found = curvature.directions_of(params, subject.basis(), key, count)
        save(np.savez, path, products=found.products, coordinates=found.coordinates)


def save(write: Any, path: Path, *arrays: Any, **named: Any) -> None:
    """Writes a file of arrays that appears whole or not at all."""
    part = path.with_suffix(f".part{path.suffix}")
    write(part, *arrays, **named)
    part.replace(path)


def measure_quadrature(subject: Subject, product: lanczos.Product) -> None:
    """The surrogate's spectrum by probes; from the first the top eigenvectors, too."""
    settings, key = subject.config.curvature, jax.random.fold_in(subject.key, 1)
    arguments = subject.pretrained.params, subject.references
    for number in range(len(subject.rows("quadrature")), settings.probes):
        start = lanczos.probe(jax.random.fold_in(key, number), subject.size)
        krylov = lanczos.lanczos(product, start, settings.steps, *arguments)
        nodes, weights = lanczos.quadrature_of(krylov)
        row = {"nodes": nodes, "weights": weights}
        if number == 0:
            top = lanczos.ritz_pairs(krylov, settings.top)
            save(np.save, subject.folder / "top.npy", np.asarray(top.vectors))
            row |= {"values": top.values, "residuals": top.residuals}
        subject.add("quadrature", **row)
        console.print(
            f"{subject.name}: probe {number + 1} of {settings.probes}, highest "
            f"curvature of the surrogate {nodes[-1]:.4g}, lowest {nodes[0]:.4g}"
        )


def check_quadrature(subject: Subject, product: lanczos.Product) -> None:
    """The largest eigenvalues by ARPACK; of a small model all of them."""
    settings, size = subject.config.curvature, subject.size
    arguments = subject.pretrained.params, subject.references
    compiled = jax.jit(product)

    def multiply(vector: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(jnp.float32(vector.ravel()), *arguments))

    if settings.exact and not subject.rows("exact"):
        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float32)
        count = min(settings.exact, size - 1)
        v0 = np.asarray(lanczos.probe(jax.random.fold_in(subject.key, 1), size))
        values = eigsh(operator, count, v0=v0, tol=1e-3, return_eigenvectors=False)
        ordered = values[np.argsort(-np.abs(values))]
        subject.add("exact", values=ordered)
        console.print(f"{subject.name}: largest curvature by ARPACK {ordered[0]:.4g}")
    if size <= settings.dense and not subject.rows("dense"):
        matrix = np.array([multiply(unit) for unit in np.eye(size)], np.float64)
        subject.add("dense", values=np.linalg.eigvalsh((matrix + matrix.T) / 2))


def measure_pairs(subject: Subject) -> None:
    """Both objectives of the centre and of all members around it, for each σ."""
    settings, params = subject.config.curvature, subject.pretrained.params
    if not subject.rows("centre"):
        subject.add("centre", **values_of(subject, np.zeros(1, int), None))
    members = 2 * settings.directions
    noise = Noise(sigma=1.0, antithetic=True)  # all have the same programs
    chunk = choose_chunk(
        subject.config, params, subject.evaluation, subject.questions, noise, members
    )
    for sigma in settings.sigmas:
        noise = Noise(sigma=sigma, antithetic=True)
        rows = [row for row in subject.rows("members") if row["sigma"] == sigma]
        start = sum(len(row["reward"]) for row in rows)
        for first in range(start, members, chunk):
            numbers = np.arange(first, min(first + chunk, members))
            found = values_of(subject, numbers, noise)
            subject.add("members", sigma=sigma, first=first, **found)
            if (first + chunk) * 4 // members > first * 4 // members:
                console.print(
                    f"{subject.name}: sigma {sigma:g}, {numbers[-1] + 1} of {members} "
                    f"members, reward {np.mean(found['reward']):.3f}"
                )


def values_of(
    subject: Subject, members: np.ndarray, noise: Noise | None
) -> dict[str, np.ndarray]:
    """Both objectives of some members, float64 [C, P] each; higher is better.

    `reward` is of their answers, `surrogate` the log-likelihood in nats of the
    reference answers, in float32 throughout.
    """
    evaluation, questions = subject.evaluation, subject.questions
    params, key = subject.pretrained.params, generation_key(subject.key, 0)
    batch = batch_of(evaluation, questions)
    outputs = answer(prepare_rollout(evaluation, params, noise), key, members, batch)
    reward = answer_rewards(evaluation, questions, batch, outputs)[..., 0]
    exact = perturb_members(params, key, jnp.asarray(members), noise)
    with jax.default_matmul_precision("highest"):
        logs = log_likelihoods(evaluation.model, exact, subject.references)
    surrogate = np.asarray(logs, np.float64)[..., 0]
    if not np.isfinite(surrogate).all():
        raise InputError(
            f"{subject.name}: likelihoods of members are not finite: a smaller sigma?"
        )
    return {"reward": reward, "surrogate": surrogate}


def vectors_of(subject: Subject, run: Path | None) -> list[Row]:
    """The surrogate's gradient, and a run's displacement, in both subspaces.

    Raises:
      InputError: for a folder that is no run, or one from another model.
    """
    params, model = subject.pretrained.params, subject.pretrained.model

    def slope(batch: Choices) -> PyTree:
        return jax.grad(partial(surrogate_loss, model, batch=batch))(params)

    mean = partial(mean_over_rows, slope, microbatch=subject.microbatch)
    vectors = {"gradient of the surrogate": jax.jit(mean)(subject.references)}
    if run is not None:
        base, tuned, _, _ = load_run(run)
        if fingerprint(base.params) != fingerprint(params):
            raise InputError(f"--run: {run} does not start from {subject.name}")
        name = f"displacement of {run.name}"
        vectors[name] = displacement(tuned.params, base.params, ())
    basis, found = subject.basis(), []
    for name, tree in vectors.items():
        vector = jnp.asarray(ravel_pytree(tree)[0], jnp.float32)
        square = np.square(np.asarray(vector, np.float64)).sum()
        coordinates = curvature.coordinates_of(vector, basis)
        found.append({"what": name} | overlaps_of(coordinates, square, subject.size))
    return found


# The report: plain numbers in spectrum.json.


def report(subject: Subject, vectors: Sequence[Row]) -> Row:
    """All that is reported of a model, from its measurements and `vectors_of`."""
    with np.load(subject.folder / "directions.npz") as kept:
        directions = Directions(kept["products"], kept["coordinates"], subject.size)
    parts, exact = subject.rows("quadrature"), subject.rows("exact")
    top = {key: parts[0][key] for key in ("values", "residuals")}
    nodes, weights = (np.array([row[k] for row in parts]) for k in Quadrature._fields)
    quadrature = Quadrature(nodes, weights)
    shapes = {"SLQ of the surrogate": shape(*lanczos.measure_quadrature(quadrature))}
    for row in subject.rows("dense"):
        found = shape(lanczos.measure(row["values"]))
        shapes["whole Hessian of the surrogate"] = found
    every = np.arange(len(directions.products))
    model: Row = {
        "model": subject.name,
        "parameters": directions.size,
        "examples": subject.config.curvature.examples,
        "shapes": shapes,
        "indices": {},
        "operators": {},
        "curvatures": [],
        "overlaps": [{"what": "all perturbations"} | pooled(directions, every)],
        "top": top,
        "exact": exact[0]["values"] if exact else None,
        "quadrature": {"nodes": nodes.tolist(), "weights": weights.tolist()},
    }
    for sigma in subject.config.curvature.sigmas:
        for objective in OBJECTIVES:
            add_pairs(model, subject, directions, sigma, objective)
    model["overlaps"] += vectors
    return model


def add_pairs(
    model: Row, subject: Subject, directions: Directions, sigma: float, objective: str
) -> None:
    """Adds what the pairs of one σ say of an objective to the report of a model."""
    label = f"{objective}, sigma {sigma:g}"
    values, centre = members_of(subject, sigma, objective)
    differences = curvature.second_differences(values, centre)
    index = curvature.cheap_index(differences, sigma)
    model["indices"][f"pairs, {label}"] = index._asdict()
    weights, means = -differences.mean(1) / sigma**2, values.mean(1)
    controls = {
        "rewards": [
            -curvature.second_differences(one, centre.mean()) / sigma**2
            for one in permuted(means, subject.config)
        ],
        "pairs": permuted(weights, subject.config),
    }
    model["operators"][label] = operator(directions, weights, controls)
    found = curvature_along(directions, weights, np.array(model["top"]["values"]))
    model["curvatures"].append({"sigma": sigma, "objective": objective} | found)
    share = subject.config.curvature.extreme
    model["overlaps"] += improving(directions, means, label, share)


def members_of(
    subject: Subject, sigma: float, objective: str
) -> tuple[np.ndarray, np.ndarray]:
    """An objective of the members in their order, [2n, P], and of the centre, [P]."""
    (centre,) = subject.rows("centre")
    chunks = [row for row in subject.rows("members") if row["sigma"] == sigma]
    chunks.sort(key=lambda row: row["first"])
    values = np.concatenate([row[objective] for row in chunks])
    return values, np.array(centre[objective][0])


def shape(found: Measures, errors: Measures | None = None) -> Row:
    """Measures, and with them `<name>_error`."""
    more = {} if errors is None else errors._asdict()
    return found._asdict() | {f"{key}_error": value for key, value in more.items()}


def permuted(values: np.ndarray, config: ml_collections.ConfigDict) -> list[np.ndarray]:
    """Random permutations, one for each control."""
    rng = np.random.default_rng(config.seed)
    return [rng.permutation(values) for _ in range(config.curvature.shuffles)]


def operator(
    directions: Directions,
    weights: np.ndarray,
    controls: Mapping[str, Sequence[np.ndarray]],
) -> Row:
    """Spectra of the sample operator: as measured, and of each kind of control."""
    own = curvature.spectrum(directions, weights)
    found = {"measured": shape(own.measures()), "eigenvalues": own.eigenvalues.tolist()}
    for name, drawn in controls.items():
        others = [curvature.spectrum(directions, one) for one in drawn]
        measures = np.array([one.measures() for one in others])
        mean, spread = measures.mean(0), measures.std(0, ddof=1)
        values = np.array([one.eigenvalues for one in others])
        found[name] = shape(Measures(*mean), Measures(*spread)) | {
            "lowest": values.min(0).tolist(),
            "highest": values.max(0).tolist(),
        }
    return found


def curvature_along(
    directions: Directions, weights: np.ndarray, top: np.ndarray
) -> Row:
    """Curvature by these pairs along directions that they did not choose.

    Those of the other half of the pairs, and the surrogate's eigenvectors with
    positive and with negative eigenvalues `top` [k].
    """
    found = curvature.held_out(directions, weights, HALVES)._asdict()
    for name, chosen in (("positive", top > 0), ("negative", top < 0)):
        own = directions.coordinates[:, : len(top)][:, chosen]
        if chosen.any():
            found[name] = curvature.along(own, weights)._asdict()
    return found


def improving(
    directions: Directions, values: np.ndarray, label: str, share: float
) -> list[Row]:
    """Overlaps of the share of best and worst members [2n], and of the ES update."""
    count = max(1, round(share * len(values)))
    order = np.argsort(values, kind="stable") // 2
    fitness = (values - values.mean()) / (values.std() + 1e-8)
    update = fitness[0::2] - fitness[1::2]
    along = update @ directions.coordinates
    square = update @ directions.products @ update
    sides = {"best": np.unique(order[-count:]), "worst": np.unique(order[:count])}
    found = [
        {"what": f"{name} {100 * share:g} %, {label}"} | pooled(directions, chosen)
        for name, chosen in sides.items()
    ]
    update_row = overlaps_of(along, square, directions.size)
    return [*found, {"what": f"ES update, {label}"} | update_row]


def pooled(directions: Directions, chosen: np.ndarray) -> Row:
    """Overlaps of some directions, pooled."""
    squares = np.diag(directions.products)[chosen]
    return overlaps_of(directions.coordinates[chosen], squares, directions.size)


def overlaps_of(coordinates: np.ndarray, squares: Any, size: int) -> Row:
    """Overlaps with the top and with a random subspace: halves of the coordinates."""
    top, random = np.split(np.atleast_2d(coordinates), 2, axis=1)
    return {
        "vectors": len(top),
        "top": curvature.overlap(top, squares, size)._asdict(),
        "random": curvature.overlap(random, squares, size)._asdict(),
    }


# Tables and figures.

NOTES = """\
Curvature is that of a loss (minus the reward, minus the log-likelihood). d_eff is
(tr H)² / tr H² with signs, PR the participation ratio (Σ|λ|)² / Σλ², rank the effective
rank exp(-Σ p log p) with p = |λ| / Σ|λ|, negative the share of |λ| below 0 and, after
the stroke, of the eigenvalues. Brackets are 95 % intervals over directions, for these
prompts and this centre; ± standard errors over probes, of what is shuffled the
deviation over shuffles. Of rewards that are steps the trace is the difference of J at
the centre and J around it, σ² tr H P / 2 of the P prompts: a prompt or two at their
threshold can make it, and the intervals leave the choice of prompts out.

SLQ has few nodes: nearly all eigenvalues are counted at one or two of them next to 0,
whose sign decides the share of negative eigenvalues, and the PR comes out too small. On
a spectrum that is half negative, 40 steps give 98 % and half the PR. Traces and the
largest eigenvalues are not affected.

Rows "pairs as an operator" are spectra of a sum of as many outer products as there are
pairs. In many dimensions their shape is that of the second differences, whatever the
landscape: with the second differences dealt out to other pairs it is the same. With
the rewards dealt out to other members, gradient is taken for curvature, too.
"""


def draw(out: Path) -> str:
    """Writes spectrum.md and the figures from spectrum.json; returns the text."""
    data = json.loads((out / "spectrum.json").read_text())
    models = data["models"]
    text = f"Task `{data['task']}`, {models[0]['examples']} training examples.\n\n"
    text += NOTES
    for number, one in enumerate(models):
        text += f"\n### {one['model']}, {one['parameters']:,} weights\n"
        for part in (shape_table, top_table, along_table, overlap_table):
            text += "\n" + grid.table(*part(one))
        figure(one).savefig(out / f"spectrum-{number}.png", dpi=120)
    (out / "spectrum.md").write_text(text)
    dimensions(models).savefig(out / "dimensions.png", dpi=120)
    return text


def shape_table(found: Row) -> tuple[Sequence[str], list[list[str]]]:
    """Estimates of the shape of the spectrum, side by side."""
    lines = []
    for name, one in found["indices"].items():
        trace, dimension = (
            f"{g(one[k], '∞')} [{g(one[f'{k}_low'], '∞')}, {g(one[f'{k}_high'], '∞')}]"
            for k in ("trace", "dimension")
        )
        lines.append([name, trace, g(one["square"]), dimension, *"----"])
    lines += [shape_line(*item) for item in found["shapes"].items()]
    for label, one in found["operators"].items():
        lines.append(shape_line(f"pairs as an operator, {label}", one["measured"]))
        for kind in ("pairs", "rewards"):
            lines.append(shape_line(f"the same, {kind} shuffled", one[kind]))
    heads = ["estimate", "tr H", "tr H²", "d_eff", "PR", "rank"]
    return [*heads, "negative", "highest λ"], lines


def shape_line(name: str, one: Row) -> list[str]:
    """A row of the table, of `shape`."""

    def cell(key: str, times: float = 1) -> str:
        error, text = one.get(f"{key}_error"), g(one[key], times=times)
        return text if error is None else f"{text} ± {times * error:.2g}"

    negative = f"{cell('negative_mass', 100)} % / {cell('negative_count', 100)} %"
    keys = ("trace", "square", "dimension", "participation", "rank")
    return [name, *map(cell, keys), negative, cell("largest")]


def top_table(found: Row) -> tuple[Sequence[str], list[list[str]]]:
    """The top of the surrogate's spectrum, by two methods."""
    top, exact = found["top"], found["exact"] or []
    rows = zip_longest(top["values"], top["residuals"], exact[: len(top["values"])])
    lines = [
        [f"{number}", g(value), f"{residual:.2g}", g(other, "")]
        for number, (value, residual, other) in enumerate(rows, 1)
    ]
    return ["surrogate, number", "λ by Lanczos", "residual", "by ARPACK"], lines


def along_table(found: Row) -> tuple[Sequence[str], list[list[str]]]:
    """Curvature along chosen directions, by pairs that did not choose them."""
    top = np.array(found["top"]["values"])
    heads = ["curvature", f"top {HALVES} of half the pairs", "the same, by the others"]
    signs = {"positive": top[top > 0], "negative": top[top < 0]}
    signs = {name: values for name, values in signs.items() if len(values)}
    for name, values in signs.items():
        mean = g(float(values.mean()))
        heads.append(f"along the surrogate's {len(values)} {name} (mean λ {mean})")
    lines = []
    for row in found["curvatures"]:
        cells = [f"{row['objective']}, sigma {row['sigma']:g}", g(row["within"])]
        cells.append(f"{g(row['beyond'])} ± {row['error']:.2g}")
        for name in signs:
            cells.append(f"{g(row[name]['curvature'])} ± {row[name]['error']:.2g}")
        lines.append(cells)
    return heads, lines


def overlap_table(found: Row) -> tuple[Sequence[str], list[list[str]]]:
    """Shares in the top subspace and in a random one, in units of k/D."""
    lines, count = [], len(found["top"]["values"])
    for row in found["overlaps"]:
        top, part = row["top"], row["top"]["expected"]
        low, high, share = (g(top[key] / part) for key in ("low", "high", "share"))
        lines.append([row["what"], str(row["vectors"]), share, f"{low} to {high}"])
        lines[-1] += [f"{top['p_value']:.2g}", g(row["random"]["share"] / part)]
    share = f"share in the top {count}, over {count}/D = {part:.2g}"
    heads = ["perturbations", "number", share, "95 % of chance", "p"]
    return [*heads, "in a random one"], lines


def g(value: float | None, missing: str = "-", times: float = 1) -> str:
    """A number in three or four digits."""
    if value is None:
        return missing
    value *= times
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def figure(found: Row) -> Figure:
    """Of one model: the surrogate's spectrum, the pairs' operator, the overlaps."""
    rows = found["overlaps"]
    made = Figure(figsize=(15, 2.5 + 0.22 * len(rows)), layout="constrained")
    surrogate, pairs, overlaps = made.subplots(1, 3, width_ratios=[1, 1, 1.1])
    draw_density(surrogate, found)
    draw_operator(pairs, found)
    draw_overlaps(overlaps, rows)
    made.suptitle(f"{found['model']}, {found['parameters']:,} weights")
    return made


def draw_density(axes: Axes, found: Row) -> None:
    """Density by quadrature, and the top eigenvalues."""
    quadrature = Quadrature(*map(np.array, found["quadrature"].values()))
    low, high = quadrature.nodes.min(), quadrature.nodes.max()
    width = (high - low) / 150
    at = np.linspace(low - 5 * width, high + 5 * width, 1500)
    shares = lanczos.density(quadrature, at, width)
    axes.semilogy(at, shares, label="SLQ")
    floor = 1 / (10 * found["parameters"] * width)  # a tenth of one eigenvalue
    axes.set_ylim(floor, 3 * shares.max())
    top, exact = np.array(found["top"]["values"]), np.array(found["exact"] or [])
    axes.plot(top, np.full(len(top), 2 * floor), "|", ms=12, label="top, by Lanczos")
    if len(exact):
        axes.plot(exact, np.full(len(exact), 5 * floor), "x", label="ARPACK")
    y = "share of the eigenvalues a unit of λ"
    grid.tidy(axes, "Hessian of the surrogate", "λ", y)


def draw_operator(axes: Axes, found: Row) -> None:
    """Eigenvalues of the reward's operator by rank, with the bands of the controls."""
    named = {k: v for k, v in found["operators"].items() if k.startswith("reward")}
    for number, (label, one) in enumerate(named.items()):
        color = f"C{number}"
        values = np.array(one["eigenvalues"])
        scale = np.abs(values).max() or 1.0
        at = np.arange(len(values))
        low, high = (np.array(one["rewards"][e]) / scale for e in ("lowest", "highest"))
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        middle = np.add(one["pairs"]["lowest"], one["pairs"]["highest"]) / (2 * scale)
        axes.plot(at, middle, ":", color="k", linewidth=1)
        axes.plot(at, values / scale, color=color, label=label.partition(", ")[2])
    axes.axhline(0, color="gray", linewidth=0.5)
    title = "reward, pairs as an operator; shuffled: pairs (dots), rewards (bands)"
    grid.tidy(axes, title, "rank", "λ over the largest |λ|")


def draw_overlaps(axes: Axes, rows: Sequence[Row]) -> None:
    """Shares in the top subspace over k/D, with the interval under chance."""
    at = np.arange(len(rows))
    part = np.array([row["top"]["expected"] for row in rows])
    low, high = (np.array([r["top"][e] for r in rows]) / part for e in ("low", "high"))
    axes.barh(at, high - low, left=low, color="0.85", label="chance")
    for name, mark in (("top", "o"), ("random", "x")):
        share = np.array([row[name]["share"] for row in rows]) / part
        axes.plot(share, at, mark, label=f"in the {name} subspace")
    axes.set_yticks(at, [row["what"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    title = "overlap with the surrogate's top subspace"
    grid.tidy(axes, title, "share of the squared norm, over k/D")


def dimensions(models: Sequence[Row]) -> Figure:
    """The effective dimension by every estimate, and of every model."""
    found = [one["indices"] | one["shapes"] for one in models]
    names = list(dict.fromkeys(name for one in found for name in one))
    made = Figure(figsize=(9, 1.5 + 0.35 * len(names)), layout="constrained")
    axes = made.subplots()
    for number, (one, estimates) in enumerate(zip(models, found, strict=True)):
        shift = 0.12 * (number - (len(models) - 1) / 2)
        dots = [
            (names.index(name) + shift, *interval(estimate))
            for name, estimate in estimates.items()
            if estimate["dimension"]
        ]
        at, value, low, high = np.array(dots).T
        error = np.array([value - low, high - value]).clip(0)
        label = f"{one['model']}, {one['parameters']:,} weights"
        axes.errorbar(value, at, xerr=error, fmt="o", capsize=2, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axis = "(tr H)² / tr H²; what is not finite is not drawn"
    grid.tidy(axes, "", axis, loc="lower right")
    return made


def interval(one: Row) -> tuple[float, float, float]:
    """The effective dimension and its interval; no end is drawn at infinity."""
    value, error = one["dimension"], 1.96 * (one.get("dimension_error") or 0.0)
    if "dimension_low" not in one:
        return value, value - error, value + error
    return value, one["dimension_low"], one["dimension_high"] or value


def study(config: ml_collections.ConfigDict, workdir: Path, run: Path | None) -> None:
    """Measures every model, and writes the report."""
    freeze(config)
    check(config)
    if run is not None:
        load_run(run)  # an error here costs no work
    claim(workdir, config.to_dict(), dict)
    models = []
    for number in range(len(config.models)):
        subject = make_subject(config, number, workdir)
        measure(subject)
        vectors = vectors_of(subject, None if number else run)
        models.append(report(subject, vectors))
    write_json(workdir / "spectrum.json", {"task": config.task, "models": models})
    console.print(draw(workdir))
    console.print(f"tables and figures in {workdir}")


def main() -> None:
    """The command line."""
    flags.DEFINE_string("run", "", "A run of jes.train, for its displacement.")

    def command(config: ml_collections.ConfigDict, workdir: Path) -> None:
        run = flags.FLAGS.run
        study(config, workdir, Path(run) if run else None)

    start(command, check, "_spectrum")


if __name__ == "__main__":
    main()
