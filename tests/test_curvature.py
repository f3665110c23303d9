"""Curvature by derivatives and by perturbations, where the truth is known."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict
from scipy.sparse.linalg import LinearOperator, eigsh
from small_run import SHAPE
from test_lanczos import stochastic_quadrature

import jes
from jes.core.noise import Noise, perturb_member
from jes.experiment import make_evaluation
from jes.landscape import lanczos
from jes.landscape.curvature import (
    along,
    cheap_index,
    coordinates_of,
    directions_of,
    held_out,
    hvp,
    overlap,
    random_subspace,
    second_differences,
    smoothed_hvp,
    spectrum,
)
from jes.landscape.lanczos import measure
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.questions import prepare
from jes.rollout import ask
from jes.studies.spectrum import (
    Subject,
    reference,
    reference_batch,
    surrogate_loss,
    surrogate_product,
    values_of,
)
from jes.tasks import load_task

# A quadratic loss x'Hx/2, which smoothing moves but does not bend.


def quadratic(matrix: Any) -> Any:
    return lambda x: -0.5 * jnp.einsum("...i,ij,...j->...", x, matrix, x)


def noise_of(key: jax.Array, count: int, size: int) -> jax.Array:
    """The directions that a flat vector is perturbed in, [n, D]."""
    zeros = jnp.zeros(size)
    noise = Noise(sigma=1.0)
    draw = jax.vmap(lambda member: perturb_member(zeros, key, member, noise))
    return draw(jnp.arange(count))


def pair_rewards(matrix: Any, x: Any, key: jax.Array, count: int, sigma: float) -> Any:
    """Of members 2i and 2i+1, [2n], and of the centre."""
    drawn = noise_of(key, count, len(x))
    reward = quadratic(matrix)
    both = jnp.stack([reward(x[None] + s * drawn) for s in (sigma, -sigma)], 1)
    return np.asarray(both, np.float64).ravel(), float(reward(x))


def weights_of(differences: Any, sigma: float) -> jax.Array:
    return -jnp.asarray(differences, jnp.float32) / sigma**2


def symmetric(values: Any, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return jnp.asarray((turn * np.asarray(values)) @ turn.T, jnp.float32)


def test_the_cheap_index_of_a_known_quadratic() -> None:
    """Section 10: diag(10 x 2.0, 190 x .01), sigma .1, 2e5 draws. tr 21.9, d_eff 11.98.

    The standard error of the trace is sqrt(2 tr H^2 / n) = .020; its bound is four of
    them, and that of d_eff four of those that its interval says, at most .24.
    """
    rng, draws = np.random.default_rng(0), 200_000
    sums = 2.0 * rng.chisquare(10, draws) + 0.01 * rng.chisquare(190, draws)
    index = cheap_index(-(0.1**2) / 2 * sums, 0.1, draws=100)
    assert index.trace == pytest.approx(21.9, abs=0.08)
    assert index.square == pytest.approx(10 * 2**2 + 190 * 0.01**2, rel=0.03)
    error = (index.dimension_high - index.dimension_low) / (2 * 1.96)
    assert 0 < error < 0.06
    assert index.dimension == pytest.approx(11.98, abs=4 * error)
    assert index.trace_high - index.trace_low == pytest.approx(2 * 1.96 * 0.02, rel=0.3)
    assert index.noise == 0


def test_noise_of_the_prompts_is_taken_off() -> None:
    """With noise of ten times the variance the raw d_eff is 11 times too small."""
    rng = np.random.default_rng(1)
    signal = -1 + 0.1 * rng.standard_normal(4000)
    prompts = rng.standard_normal(50)
    noise = 0.1 * (10 * 50) ** 0.5 * rng.standard_normal((4000, 50))
    differences = signal[:, None] + prompts - prompts.mean() + noise
    index = cheap_index(differences, 1.0, draws=500)
    assert index.noise == pytest.approx(0.1, rel=0.02)
    assert index.variance == pytest.approx(0.01, rel=0.35)
    assert index.dimension_low < 200 < index.dimension_high
    raw = cheap_index(differences.mean(1), 1.0, draws=2)
    assert raw.dimension == pytest.approx(200 / 11, rel=0.1)


def test_the_noise_is_what_random_halves_of_the_prompts_differ_by() -> None:
    rng = np.random.default_rng(2)
    differences = rng.standard_normal((12, 1)) + rng.standard_normal((12, 8))
    index = cheap_index(differences, 1.0, draws=2)
    covariances = []
    for _ in range(5_000):
        order = rng.permutation(8)
        a, b = (differences[:, half].mean(1) for half in (order[:4], order[4:]))
        covariances.append(np.cov(a, b)[0, 1])
    error = np.std(covariances) / len(covariances) ** 0.5
    assert abs(index.variance - np.mean(covariances)) < 4 * error


def test_an_index_of_nothing_but_noise_says_so() -> None:
    rng = np.random.default_rng(3)
    index = cheap_index(rng.standard_normal((40, 30)), 0.1)
    assert index.trace_low < 0 < index.trace_high
    assert index.dimension_high == np.inf
    with pytest.raises(ValueError, match="1 pairs have no variance"):
        cheap_index(np.zeros((1, 3)), 0.1)
    with pytest.raises(ValueError, match="the noise of one prompt"):
        cheap_index(np.zeros((3, 1)), 0.1)


def test_the_hessian_by_perturbations_converges() -> None:
    """The error of Hv falls as 1/sqrt(n), from the size that theory has for it.

    E|error|² is near E[w²] (D + 1) / n with w = ε'Hε / 2, which has the second moment
    (tr H)²/4 + tr H²/2; one draw is within a factor of 1.6 of it.
    """
    values = np.r_[3.0, 2.0, 1.0, np.full(17, 0.1)]
    matrix, sigma, x = symmetric(values), 0.1, jnp.zeros(20)
    v = jax.random.normal(jax.random.key(5), (20,))
    v /= jnp.linalg.norm(v)
    errors = {}
    for count in (2_000, 32_000):
        key = jax.random.key(6)
        rewards, centre = pair_rewards(matrix, x, key, count, sigma)
        weights = weights_of(second_differences(rewards, centre), sigma)
        estimate = jax.jit(smoothed_hvp)(v, key, weights)
        errors[count] = float(jnp.linalg.norm(estimate - matrix @ v))
        moment = values.sum() ** 2 / 4 + (values**2).sum() / 2
        assert 1 / 1.6 < errors[count] / (moment * 21 / count) ** 0.5 < 1.6
    assert errors[32_000] < 0.25 * float(jnp.linalg.norm(matrix @ v))


def test_frozen_pairs_are_one_symmetric_operator() -> None:
    """Bilinear and symmetric to 1e-6, and the matrix that the formula says."""
    size, count, sigma = 12, 30, 0.2
    matrix, key = symmetric(np.linspace(-1, 3, size)), jax.random.key(7)
    rewards, centre = pair_rewards(matrix, jnp.ones(size), key, count, sigma)
    differences = second_differences(rewards, centre)
    weights = weights_of(differences, sigma)
    columns = jax.vmap(lambda v: smoothed_hvp(v, key, weights))(jnp.eye(size))
    scale = float(jnp.abs(columns).max())
    np.testing.assert_allclose(columns / scale, columns.T / scale, atol=1e-6)
    drawn = np.asarray(noise_of(key, count, size), np.float64)
    w = -differences / sigma**2
    whole = (drawn.T * w) @ drawn / count - w.mean() * np.eye(size)
    np.testing.assert_allclose(columns / scale, whole / scale, atol=1e-6)


@pytest.fixture(scope="module")
def pairs_of_a_tree() -> tuple[Any, jax.Array, np.ndarray]:
    """Parameters of two leaves, a key, and second differences that mean nothing."""
    params = {"a": jnp.zeros((5, 7)), "b": {"c": jnp.ones(25)}}
    return params, jax.random.key(11), np.random.default_rng(0).standard_normal(9)


def test_the_operator_of_few_pairs_has_the_spectrum_of_their_products(
    pairs_of_a_tree: Any,
) -> None:
    """Without Lanczos, and by Lanczos on products by seed replay: the same."""
    params, key, weights = pairs_of_a_tree
    flat, unravel = ravel_pytree(params)
    basis = random_subspace(jax.random.key(1), 3, 60)
    directions = directions_of(params, basis, key, 9, block=4)
    whole = directions_of(params, basis, key, 9)
    # Sums of 60 products of float32 numbers about 1, in two orders.
    np.testing.assert_allclose(
        directions.products, whole.products, rtol=1e-5, atol=60 * 2**-24
    )
    found = spectrum(directions, weights)
    assert (found.others, len(found.eigenvalues)) == (51, 9)

    frozen = jnp.asarray(weights, jnp.float32)

    def product(vector: jax.Array) -> jax.Array:
        return ravel_pytree(smoothed_hvp(unravel(vector), key, frozen))[0]

    dense = np.asarray(jax.vmap(product)(jnp.eye(60)), np.float64)
    bulk = np.full(51, found.bulk)
    expected = np.sort(np.r_[found.eigenvalues, bulk])
    np.testing.assert_allclose(np.linalg.eigvalsh(dense), expected, atol=2e-5)
    krylov = lanczos.lanczos(product, lanczos.probe(jax.random.key(2), 60), 12)
    ritz = lanczos.ritz_pairs(krylov, 4)
    order = np.argsort(-np.abs(found.eigenvalues))[:4]
    np.testing.assert_allclose(ritz.values, found.eigenvalues[order], atol=2e-5)
    np.testing.assert_allclose(
        found.measures(), measure(np.linalg.eigvalsh(dense)), rtol=1e-3
    )
    drawn = np.stack(
        [
            ravel_pytree(perturb_member(params, key, jnp.int32(i), Noise(sigma=1.0)))[0]
            - flat
            for i in range(9)
        ]
    )
    # Sums that cancel keep the error of what they are sums of.
    np.testing.assert_allclose(
        directions.products, drawn @ drawn.T, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(directions.coordinates, drawn @ basis.T, atol=1e-4)


def test_more_pairs_than_dimensions_span_all_of_them() -> None:
    size, count, key = 8, 30, jax.random.key(0)
    basis = random_subspace(jax.random.key(1), 1, size)
    directions = directions_of(jnp.zeros(size), basis, key, count)
    weights = np.random.default_rng(0).standard_normal(count)
    found = spectrum(directions, weights)
    assert found.others == 0
    frozen = jnp.float32(weights)
    dense = jax.vmap(lambda v: smoothed_hvp(v, key, frozen))(jnp.eye(size))
    expected = np.linalg.eigvalsh(np.asarray(dense, np.float64))
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-5)


def test_held_out_pairs_tell_curvature_from_chance() -> None:
    """One direction of curvature 50 among 20: found within, and beyond. With weights of
    other pairs there are high eigenvalues within all the same, and nothing beyond."""
    size, count, sigma = 20, 1200, 0.1
    key = jax.random.key(12)
    first = jnp.zeros((1, size)).at[0, 0].set(1)
    directions = directions_of(jnp.zeros(size), first, key, count)
    rewards, centre = pair_rewards(
        jnp.diag(jnp.zeros(size).at[0].set(50)), jnp.zeros(size), key, count, sigma
    )
    weights = np.asarray(weights_of(second_differences(rewards, centre), sigma))
    found = along(directions.coordinates, weights)
    assert abs(found.curvature - 50) < 4 * found.error
    assert found.error < 10
    signal = held_out(directions, weights, 1)
    assert abs(signal.beyond - 50) < 4 * signal.error
    assert signal.error < 10
    dealt = np.random.default_rng(0).permutation(weights)
    chance = held_out(directions, dealt, 1)
    assert abs(chance.beyond) < 3 * chance.error
    assert chance.within > 4 * chance.error


def test_the_spectrum_of_pairs_is_that_of_their_second_differences() -> None:
    """Many dimensions: whatever pairs the weights are dealt to, D w / n."""
    size, count = 200_000, 12
    basis = jnp.zeros((1, size)).at[0, 0].set(1)
    directions = directions_of(jnp.zeros(size), basis, jax.random.key(0), count)
    weights = np.random.default_rng(0).standard_normal(count)
    found = spectrum(directions, weights)
    expected = np.sort(weights) * size / count
    np.testing.assert_allclose(
        found.eigenvalues, expected, atol=0.02 * np.abs(expected).max()
    )


# Overlaps.


def test_overlaps_of_random_vectors_are_as_chance_has_them() -> None:
    size, dimensions, count = 400, 8, 600
    rng = np.random.default_rng(0)
    basis = random_subspace(jax.random.key(0), dimensions, size)
    np.testing.assert_allclose(basis @ basis.T, np.eye(dimensions), atol=1e-6)
    vectors = rng.standard_normal((count, size)).astype(np.float32)
    coordinates = coordinates_of(jnp.asarray(vectors), basis)
    squares = (vectors**2).sum(-1)
    one_by_one = [
        overlap(c, s, size) for c, s in zip(coordinates, squares, strict=True)
    ]
    inside = np.mean([one.low < one.share < one.high for one in one_by_one])
    assert abs(inside - 0.95) < 4 * (0.95 * 0.05 / count) ** 0.5
    p_values = np.array([one.p_value for one in one_by_one])
    assert abs((p_values < 0.1).mean() - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5
    pooled = overlap(coordinates, squares, size)
    assert pooled.expected == 0.02
    assert pooled.low < pooled.share < pooled.high
    # sd of a share: sqrt(2 k (D - k) / (D^2 (D + 2))), smaller by sqrt(m) when pooled
    deviation = (2 * 8 * 392 / (400**2 * 402)) ** 0.5 / count**0.5
    assert pooled.high - pooled.low == pytest.approx(2 * 1.96 * deviation, rel=0.01)


def test_a_vector_in_the_subspace_is_seen() -> None:
    basis = random_subspace(jax.random.key(1), 5, 1000)
    vector = basis[2] + 0.05 * jax.random.normal(jax.random.key(2), (1000,))
    found = overlap(coordinates_of(vector, basis), float(vector @ vector), 1000)
    assert found.share == pytest.approx(1 / (1 + 0.05**2 * 1000), rel=0.2)
    assert found.p_value < 1e-10
    with pytest.raises(ValueError, match="a subspace of 3 in 3 dimensions"):
        overlap(np.zeros(3), 1.0, 3)


# A model of less than 3000 weights, whose Hessian can be had whole.


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any, Any, Any, Any]:
    """A random decoder, its weights, an evaluation, questions and references."""
    tiny = jes.load("tiny")
    shape = dict(tiny.hf_config) | SHAPE
    shape |= {"hidden_size": 8, "intermediate_size": 12}
    model = Decoder(ModelConfig.from_hf(shape | {"head_dim": 4}))
    key = jax.random.key(0)
    params = jax.jit(model.init)(key, *jnp.zeros((2, 1, 4), jnp.int32))
    # From 0.02 the logits hardly differ from 0, and all curvature is that of the head.
    drawn = jes.perturb(params["params"], key, 0.3)
    task = load_task("tiny/min", train_examples=4, test_examples=2)
    evaluation = make_evaluation(tiny, task)
    questions = prepare(evaluation, task.train)
    return model, drawn, evaluation, questions, reference_batch(evaluation, questions)


@pytest.mark.slow
def test_a_nano_models_hessian_is_the_same_by_all_ways(nano: Any) -> None:
    """Gradients of gradients, column by column (all columns at once, as jax.hessian
    has them, take minutes on a CPU); products over microbatches; and Lanczos."""
    model, params, _, _, batch = nano
    flat, unravel = ravel_pytree(params)
    size = flat.size
    assert size < 3000

    def loss(vector: jax.Array) -> jax.Array:
        return surrogate_loss(model, unravel(vector), batch)

    @jax.jit
    def column(unit: jax.Array) -> jax.Array:
        return jax.grad(lambda at: jnp.vdot(jax.grad(loss)(at), unit))(flat)

    whole = np.array([column(unit) for unit in np.eye(size, dtype=np.float32)])
    whole = whole.astype(np.float64)
    scale = np.abs(whole).max()
    np.testing.assert_allclose(whole, whole.T, atol=1e-5 * scale)
    vector = lanczos.probe(jax.random.key(0), size)
    expected = whole @ np.asarray(vector, np.float64)
    for microbatch in (0, 2):
        product = jax.jit(surrogate_product(model, params, microbatch))
        found = product(vector, params, batch)
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=bound)
    tree = hvp(lambda p: surrogate_loss(model, p, batch), params, unravel(vector))
    np.testing.assert_allclose(ravel_pytree(tree)[0], expected, atol=bound)

    eigenvalues = np.linalg.eigvalsh((whole + whole.T) / 2)
    krylov = lanczos.lanczos(product, vector, 60, params, batch)
    top = lanczos.ritz_pairs(krylov, 5)
    largest = eigenvalues[np.argsort(-np.abs(eigenvalues))][:5]
    np.testing.assert_allclose(top.values, largest, rtol=1e-3)
    found = stochastic_quadrature(
        product, size, params, batch, key=jax.random.key(1), probes=8, steps=30
    )
    trace, error = lanczos.trace(found, lambda x: x)
    assert abs(trace - eigenvalues.sum()) < 4 * error
    square, error = lanczos.trace(found, np.square)
    assert abs(square - (eigenvalues**2).sum()) < 4 * error


@pytest.mark.slow
def test_perturbations_find_the_curvature_of_a_nano_model(nano: Any) -> None:
    """With many small pairs: trace, and curvature along the top, as the Hessian has."""
    model, params, _, _, batch = nano
    size = ravel_pytree(params)[0].size
    sigma, count, key = 3e-3, 400, jax.random.key(3)
    product = surrogate_product(model, params)
    krylov = lanczos.lanczos(product, jnp.ones(size), 40, params, batch)
    top = lanczos.ritz_pairs(krylov, 1)
    noise = Noise(sigma=sigma, antithetic=True)

    @jax.jit
    def likelihood(member: jax.Array) -> jax.Array:
        return -surrogate_loss(model, perturb_member(params, key, member, noise), batch)

    members = np.asarray(jax.lax.map(likelihood, jnp.arange(2 * count), batch_size=40))
    centre = -float(surrogate_loss(model, params, batch))
    differences = second_differences(members, np.array(centre))
    weights = np.asarray(weights_of(differences, sigma))
    directions = directions_of(params, top.vectors, key, count)
    found = along(directions.coordinates, weights)
    assert abs(found.curvature - top.values[0]) < 4 * found.error
    assert found.error < 0.5 * abs(top.values[0])
    found = stochastic_quadrature(
        product, size, params, batch, key=jax.random.key(1), probes=8, steps=20
    )
    trace, error = lanczos.trace(found, lambda x: x)
    index = cheap_index(differences, sigma)
    half = (index.trace_high - index.trace_low) / 4
    assert abs(index.trace - trace) < 4 * (half**2 + error**2) ** 0.5


# The embedded model.


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """The model, and the references of eight examples."""
    pretrained = jes.load("tiny")
    task = load_task("tiny/min", train_examples=8, test_examples=2)
    evaluation = make_evaluation(pretrained, task)
    return pretrained, reference_batch(evaluation, prepare(evaluation, task.train))


def test_products_are_differences_of_gradients(tiny: Any) -> None:
    """On the embedded model, along its gradient: to 1 %, which is the fourth-order
    error and the rounding of float32 gradients together at this step."""
    pretrained, batch = tiny
    slope = jax.jit(jax.grad(lambda p: surrogate_loss(pretrained.model, p, batch)))
    flat, unravel = ravel_pytree(pretrained.params)
    g = ravel_pytree(slope(pretrained.params))[0]
    v = g / jnp.linalg.norm(g)
    step = 3e-3
    ends = [ravel_pytree(slope(unravel(flat + t * step * v)))[0] for t in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    product = jax.jit(surrogate_product(pretrained.model, pretrained.params))
    found = product(v, pretrained.params, batch)
    apart = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(found))
    assert apart < 0.01


@pytest.mark.slow
def test_the_top_is_that_of_arpack(tiny: Any) -> None:
    pretrained, batch = tiny
    product = surrogate_product(pretrained.model, pretrained.params)
    size = ravel_pytree(pretrained.params)[0].size
    run = jax.jit(product)

    def matvec(vector: np.ndarray) -> np.ndarray:
        return np.asarray(run(jnp.float32(vector.ravel()), pretrained.params, batch))

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
    start = lanczos.probe(jax.random.key(0), size)
    values = eigsh(
        operator, 2, v0=np.asarray(start), tol=1e-3, return_eigenvectors=False
    )
    krylov = lanczos.lanczos(product, start, 16, pretrained.params, batch)
    top = lanczos.ritz_pairs(krylov, 2)
    expected = values[np.argsort(-np.abs(values))]
    np.testing.assert_allclose(top.values, expected, rtol=2e-3)


@pytest.mark.slow
def test_members_get_what_asking_gives_them() -> None:
    """Prompt by prompt; the mean is the fitness that `ask` has."""
    tiny = jes.load("tiny")
    task = load_task("tiny/max", train_examples=6, test_examples=2)
    evaluation = make_evaluation(tiny, task)
    likely = make_evaluation(tiny, task, mode="likelihood")
    noise = Noise(sigma=0.03, antithetic=True)
    config = ConfigDict({"seed": 4})
    key = jes.generation_key(jax.random.key(4), 0)
    for each in (evaluation, likely):
        questions = prepare(each, task.train)
        batch = reference_batch(each, questions)
        subject = Subject("tiny", Path(), config, tiny, each, questions, batch)
        found = values_of(subject, np.arange(4), noise)
        score = ask(
            each, tiny.params, key, questions, noise=noise, population=4, chunk=4
        )
        np.testing.assert_allclose(found["reward"].mean(1), score.reward)
        assert found["reward"].shape == found["surrogate"].shape == (4, 6)
        at = perturb_member(tiny.params, key, jnp.int32(3), noise)
        loss = surrogate_loss(tiny.model, at, batch)
        assert -found["surrogate"][3].mean() == pytest.approx(float(loss), rel=1e-4)


def test_references_are_right_answers() -> None:
    for name in ("tiny/add", "tiny/countdown", "tiny/rules", "tiny/min", "tiny/facts"):
        task = load_task(name, train_examples=3, test_examples=3)
        for example in task.train:
            assert task.reward(example, reference(task, example)).correct
    with pytest.raises(jes.errors.InputError, match="no text of a right answer"):
        reference(task, {"answer": 3.0})
