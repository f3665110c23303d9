"""CLSS: the effective dimension from the plateaus of simulated runs."""

import dataclasses

import jax
import numpy as np
import pytest

from jes.errors import InputError
from jes.landscape import plateaus, quadratic, zscored
from jes.landscape.quadratic import Ascent

VALUES = np.array([1.0] * 4 + [0.3] * 20 + [0.0] * 8)
ASCENT = Ascent(
    eigenvalues=VALUES, start=0.3 * (VALUES > 0), alpha=0.2, sigma=0.5, population=30
)
TAIL = {"window": 100, "stationarity": 0.1}


def curves_of(
    populations: tuple[int, ...], method: str, runs: int = 24
) -> dict[int, np.ndarray]:
    curves = {}
    for population in populations:
        ascent = dataclasses.replace(ASCENT, population=population)
        key = jax.random.key(population)
        drawn = quadratic.simulate(ascent, 400, key=key, runs=runs, method=method)
        curves[population] = np.asarray(drawn.objective)
    return curves


def test_of_the_linear_model() -> None:
    """Within 3 standard errors, which are below 3 %: 24 modes, not 4 and not 32."""
    curves = curves_of((5, 10, 30, 100), "linear")
    kappa = {n: 0.25 / n for n in curves}
    found = plateaus.clss(curves, alpha=0.2, kappa=kappa, **TAIL)
    expected = quadratic.effective_dimension(VALUES, 0.2)
    assert found.standard_error < 0.03 * expected
    assert abs(found.effective_dimension - expected) < 3 * found.standard_error
    assert list(found.populations) == [5, 10, 30, 100]
    # Taking off the plateau of 100 members shifts the intercept.
    slope = found.effective_dimension * 0.2 / 4
    assert found.intercept == pytest.approx(-slope * 0.25 / 100, abs=2e-3)


@pytest.mark.slow
def test_the_standard_error_is_that_of_repetitions() -> None:
    """40 small studies: z-scores have unit variance (0.5 to 1.7: 4 of its errors)."""
    curves = curves_of((5, 20), "linear", runs=240)
    expected = quadratic.effective_dimension(VALUES, 0.2)
    z = []
    for part in range(40):
        some = {n: c[6 * part : 6 * part + 6] for n, c in curves.items()}
        kappa = {n: 0.25 / n for n in some}
        found = plateaus.clss(some, alpha=0.2, kappa=kappa, **TAIL)
        z.append((found.effective_dimension - expected) / found.standard_error)
    # Errors from 6 runs make Student's t of about 5 degrees: variance 5/3.
    assert 0.5 < np.var(z) < 4
    assert abs(np.mean(z)) < 4 * (5 / 3 / 40) ** 0.5


@pytest.mark.slow
def test_of_z_scored_runs() -> None:
    """With the deviation of rewards d_eff comes out; without, d_eff times S/σ."""
    populations = (20, 40, 80)
    curves = curves_of(populations, "zscore")
    spread = {}
    for n in populations:
        ascent = dataclasses.replace(ASCENT, population=n)
        spread[n] = zscored.stationary(ascent).reward_deviation
    kappa = {n: spread[n] / 0.5 / n for n in populations}
    found = plateaus.clss(curves, alpha=0.2, kappa=kappa, **TAIL)
    assert found.standard_error < 2.4
    assert found.effective_dimension == pytest.approx(24, rel=0.15)
    raw = plateaus.clss(curves, alpha=0.2, **TAIL)  # noise 1/N
    ratio = raw.effective_dimension / found.effective_dimension
    assert ratio == pytest.approx(spread[80] / 0.5, rel=0.15)
    assert ratio < 0.9 or ratio > 1.1


def test_what_is_rejected() -> None:
    """A run that still climbs, and a population with too few other runs."""
    random = np.random.default_rng(0)
    curves = {n: 1 - 3 / n + random.normal(0, 1e-3, (5, 200)) for n in (5, 10, 20, 40)}
    settings = {"alpha": 0.1, "window": 50, "stationarity": 0.01}
    clean = plateaus.clss(curves, **settings)
    assert clean.effective_dimension == pytest.approx(4 / 0.1 * 3, rel=0.01)
    curves[40][0] += np.linspace(-0.5, 0.5, 200)
    curves[5][:4, -50:] += 0.02
    found = plateaus.clss(curves, **settings)
    assert list(found.valid[40]) == [False, True, True, True, True]
    assert list(found.populations) == [10, 20, 40]
    assert found.effective_dimension == pytest.approx(4 / 0.1 * 3, rel=0.01)


def test_what_is_refused() -> None:
    climbing = {n: np.tile(np.linspace(0, 1, 200), (4, 1)) for n in (5, 10)}
    with pytest.raises(InputError, match=r"valid are \{5: 0, 10: 0\}"):
        plateaus.clss(climbing, alpha=0.1, window=50, stationarity=0.01)
    with pytest.raises(InputError, match="at least 300"):
        plateaus.clss(climbing, alpha=0.1, window=150, stationarity=0.01)
