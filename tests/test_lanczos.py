"""Lanczos and stochastic quadrature on operators of which everything is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jes.landscape.lanczos import (
    ROUNDING,
    Krylov,
    Quadrature,
    density,
    lanczos,
    measure,
    measure_quadrature,
    probe,
    quadrature_of,
    ritz_pairs,
    trace,
)

ONE_TO_TEN = jnp.arange(1.0, 11.0)


def diagonal(vector: jax.Array, values: jax.Array) -> jax.Array:
    return values * vector


def full(vector: jax.Array, matrix: jax.Array) -> jax.Array:
    return matrix @ vector


def random_symmetric(values: np.ndarray, seed: int = 0) -> tuple[Any, np.ndarray]:
    """A matrix with these eigenvalues, and its eigenvectors as rows."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return jnp.asarray((turn * values) @ turn.T, jnp.float32), turn.T


def stochastic_quadrature(
    product: Any, size: int, *arguments: Any, key: jax.Array, probes: int, steps: int
) -> Quadrature:
    rows = []
    for number in range(probes):
        start = probe(jax.random.fold_in(key, number), size)
        rows.append(quadrature_of(lanczos(product, start, steps, *arguments)))
    return Quadrature(*map(np.array, zip(*rows, strict=True)))


def key_of(seed: int) -> jax.Array:
    return jax.random.key(seed)


def test_quadrature_of_one_to_ten_is_exact() -> None:
    """Section 10. With m = D a Rademacher probe gives z'f(A)z without error, and that
    is the trace: z'Dz = tr D where all z are 1 or -1."""
    found = stochastic_quadrature(
        diagonal, 10, ONE_TO_TEN, key=key_of(0), probes=3, steps=10
    )
    np.testing.assert_allclose(found.weights.sum(-1), 10, rtol=1e-12)
    for function, expected in (
        (lambda x: x, 55),
        (np.square, 385),
        (np.log, 15.104413),
    ):
        mean, error = trace(found, function)
        assert mean == pytest.approx(expected, rel=1e-6)
        assert error < 1e-5
    measures, errors = measure_quadrature(found)
    assert measures.participation == pytest.approx(7.857143, rel=1e-6)
    assert measures.rank == pytest.approx(8.595869, rel=1e-6)
    assert measures.negative_mass == measures.negative_count == 0
    assert errors.participation < 1e-4
    assert np.isnan(errors.largest)


def test_measures_have_one_definition_each() -> None:
    measures = measure(np.arange(1, 11))
    assert measures.dimension == measures.participation
    assert measures.participation == pytest.approx(55**2 / 385)
    assert measures.rank == pytest.approx(8.595869, rel=1e-6)
    mixed = measure(np.array([3.0, -1.0, 0.0, 0.0]))
    assert mixed.trace == 2
    assert mixed.square == 10
    assert mixed.participation == pytest.approx(16 / 10)
    assert mixed.dimension == pytest.approx(4 / 10)
    assert mixed.negative_mass == pytest.approx(1 / 4)
    assert mixed.negative_count == pytest.approx(1 / 4)
    assert (mixed.largest, mixed.lowest) == (3, -1)
    # A weight is how many eigenvalues there are of a kind.
    weighted = measure(np.array([3.0, -1.0, 0.0, 7.0]), np.array([1, 1, 2, 0]))
    np.testing.assert_allclose(weighted, mixed)
    assert measure(np.array([1.0, -1e-7])).negative_count == 0  # that is rounding
    assert np.isnan(measure(np.zeros(3)).participation)


def test_random_probes_of_a_random_matrix_agree_within_their_errors() -> None:
    """tr A = 3, with eigenvalues of both signs: within four standard errors, and each
    error within a factor of two of the theory, 2 |off-diagonal|^2 / s."""
    values = np.concatenate([[5.0, -3.0, 1.5], np.full(60, 0.025), np.full(37, -0.054)])
    matrix, _ = random_symmetric(values)
    found = stochastic_quadrature(full, 100, matrix, key=key_of(1), probes=40, steps=8)
    mean, error = trace(found, lambda x: x)
    off = np.asarray(matrix) - np.diag(np.diag(matrix))
    theory = np.sqrt(2 * (off**2).sum() / 40)
    assert abs(mean - values.sum()) < 4 * error
    assert 0.5 < error / theory < 2
    square, square_error = trace(found, np.square)
    assert abs(square - (values**2).sum()) < 4 * square_error
    measures, errors = measure_quadrature(found)
    exact = measure(values)
    for name in ("participation", "rank", "negative_mass", "negative_count"):
        apart = getattr(measures, name) - getattr(exact, name)
        assert abs(apart) < 4 * getattr(errors, name)
    assert measures.largest == pytest.approx(5, abs=1e-4)
    assert measures.lowest == pytest.approx(-3, abs=1e-4)


def test_density_has_its_mass_where_the_eigenvalues_are() -> None:
    values = np.concatenate([np.zeros(90), np.full(10, 4.0)])
    found = stochastic_quadrature(
        diagonal,
        100,
        jnp.asarray(values, jnp.float32),
        key=key_of(0),
        probes=2,
        steps=2,
    )
    grid = np.linspace(-2, 6, 1601)
    shares = density(found, grid, 0.1) * (grid[1] - grid[0])
    assert shares.sum() == pytest.approx(1, abs=1e-6)
    assert shares[grid > 2].sum() == pytest.approx(0.1, abs=1e-5)


def test_the_basis_stays_orthonormal_and_gives_the_top() -> None:
    """60 steps in float32: without reorthogonalisation copies of 100 would appear."""
    values = np.concatenate([[100.0, 50.0, -30.0], np.linspace(0, 1, 297)])
    matrix, vectors = random_symmetric(values)
    start = jax.random.normal(key_of(2), (300,))
    krylov = lanczos(full, start, 60, matrix)
    product = np.asarray(krylov.basis @ krylov.basis.T)
    np.testing.assert_allclose(product, np.eye(60), atol=2e-6)
    top = ritz_pairs(krylov, 3)
    np.testing.assert_allclose(top.values, values[:3], rtol=1e-5)
    aligned = np.abs((np.asarray(top.vectors) * vectors[:3]).sum(-1))
    np.testing.assert_allclose(aligned, 1, atol=1e-5)


def test_residuals_bound_the_error_of_eigenvalues() -> None:
    values = np.linspace(-4, 10, 200)
    matrix, _ = random_symmetric(values)
    krylov = lanczos(full, jax.random.normal(key_of(3), (200,)), 25, matrix)
    pairs = ritz_pairs(krylov, 8)
    images = np.asarray(pairs.vectors @ matrix)
    apart = images - pairs.values[:, None] * np.asarray(pairs.vectors)
    # The residuals are said without asking for another product.
    np.testing.assert_allclose(
        np.linalg.norm(apart, axis=1), pairs.residuals, atol=1e-4
    )
    assert pairs.residuals.max() > 1e-2  # some have not converged
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        assert np.abs(values - value).min() <= residual + 1e-4


def test_a_subspace_that_closes_leaves_no_copies() -> None:
    """Rank 2: after three vectors there is nothing to add."""
    values = np.zeros(30)
    values[:2] = 2, -1
    krylov = lanczos(diagonal, jnp.ones(30), 12, jnp.asarray(values, jnp.float32))
    assert int(np.asarray(krylov.basis).any(-1).sum()) == 3
    pairs = ritz_pairs(krylov, 12)
    # What was cut off is at most this, relative to the operator's size of 2.
    np.testing.assert_allclose(pairs.values, [2, -1, 0], atol=2 * ROUNDING)
    assert pairs.vectors.shape == (3, 30)
    found = stochastic_quadrature(
        diagonal,
        30,
        jnp.asarray(values, jnp.float32),
        key=key_of(0),
        probes=2,
        steps=12,
    )
    assert trace(found, lambda x: x)[0] == pytest.approx(1, abs=1e-5)
    # Of what stands for nothing a function may be undefined.
    assert trace(found, lambda x: 1 / (x + 5))[0] == pytest.approx(
        28 / 5 + 1 / 7 + 1 / 4
    )


def test_what_cannot_be_is_refused() -> None:
    for steps in (0, 11):
        with pytest.raises(ValueError, match="steps in 10 dimensions"):
            lanczos(diagonal, jnp.ones(10), steps, ONE_TO_TEN)
    krylov = Krylov(jnp.zeros(1), jnp.zeros(1), jnp.zeros((1, 3)))
    assert ritz_pairs(krylov, 2).values.size == 0
