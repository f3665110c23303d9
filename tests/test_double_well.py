"""Hopping between two wells: closed forms against simulation."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy.integrate import dblquad

from jes.errors import InputError
from jes.landscape import double_well
from jes.landscape.double_well import DoubleWell

pytestmark = pytest.mark.usefixtures("optimised")

WELL = DoubleWell(stiffness=1.0, minimum=1.0, alpha=0.05, kappa=2.0)
COLD = dataclasses.replace(WELL, kappa=1.0)


@pytest.mark.parametrize(
    ("well", "temperature", "ratio", "escape", "digit"),
    [(WELL, 0.05, 5.0, 1.3188e4, 1), (COLD, 0.025, 10.0, 1.957e6, 1e3)],
)
def test_kramers(
    well: DoubleWell, temperature: float, ratio: float, escape: float, digit: float
) -> None:
    assert double_well.temperature(well) == pytest.approx(temperature, rel=1e-12)
    assert double_well.barrier_ratio(well) == pytest.approx(ratio, rel=1e-12)
    assert double_well.escape_generations(well) == pytest.approx(escape, abs=digit)


def test_the_shape_of_the_wells() -> None:
    """Height and curvatures, by differences, for other wells than the unit one."""
    well = DoubleWell(stiffness=2.5, minimum=0.7, alpha=0.01, kappa=0.3)
    a, h = well.minimum, 1e-4
    temperature = double_well.temperature(well)
    height = float(double_well.loss(well, 0.0) - double_well.loss(well, a))
    ratio = double_well.barrier_ratio(well)
    assert ratio == pytest.approx(height / temperature, rel=1e-12)

    def bend(x: float) -> float:
        values = double_well.loss(well, np.array([x - h, x, x + h]))
        return float(values[0] - 2 * values[1] + values[2]) / h**2

    variance = double_well.well_variance(well)
    assert variance == pytest.approx(temperature / bend(a), rel=1e-4)
    time = 2 * math.pi / math.sqrt(bend(a) * abs(bend(0.0))) * math.exp(ratio)
    escape = double_well.escape_generations(well)
    assert escape == pytest.approx(time / well.alpha, rel=1e-4)


def test_simulated_hops() -> None:
    """4000 runs, censored at 20,000: the passage integral, and Kramers within 10 %."""
    times = double_well.first_passages(WELL, 20_000, key=jax.random.key(0), runs=4000)
    mean, error = double_well.mean_passage(times, 20_000)
    assert mean == pytest.approx(double_well.escape_generations(WELL), rel=0.1)
    assert abs(mean - double_well.passage_generations(WELL)) < 3 * error
    # The share that has hopped is exponential in time.
    times = np.asarray(times)
    for generations in (2_000, 10_000):
        share = double_well.hop_probability(generations, mean)
        spread = (share * (1 - share) / len(times)) ** 0.5
        assert abs((times <= generations).mean() - share) < 4 * spread


def test_the_passage_integral() -> None:
    """Against adaptive quadrature, and against Kramers where the barrier is high."""
    epsilon = double_well.temperature(WELL)

    def integrand(z: float, y: float) -> float:
        below, above = double_well.loss(WELL, z), double_well.loss(WELL, y)
        return math.exp(float(above - below) / epsilon)

    integral, _ = dblquad(integrand, -1, 1, -3, lambda y: y)
    assert double_well.passage_generations(WELL) == pytest.approx(
        integral / (epsilon * WELL.alpha), rel=1e-5
    )
    for ratio, within in ((5, 0.11), (10, 0.05), (40, 0.011)):
        well = dataclasses.replace(WELL, kappa=10 / ratio)
        passage = double_well.passage_generations(well)
        assert passage == pytest.approx(
            double_well.escape_generations(well), rel=within
        )


def test_variance_in_a_well() -> None:
    """At a high barrier; the step of 0.05 and the quartic add some percent."""
    assert double_well.well_variance(COLD) == pytest.approx(0.0125, rel=1e-12)
    well = dataclasses.replace(WELL, alpha=0.02, kappa=0.25)
    states = double_well.simulate(well, 600, key=jax.random.key(1), runs=500)
    assert states.shape == (500, 601)
    assert (states[:, 0] == -1).all()
    measured = float(np.asarray(states[:, 300:], float).var())
    assert measured == pytest.approx(double_well.well_variance(well), rel=0.05)


@pytest.mark.slow
def test_hops_by_regime() -> None:
    """None far above log T, some near it, all where there is no barrier to speak of."""
    generations, runs = 1000, 200
    shares = []
    for ratio in (2 * math.log(1000), 3.0, 0.5):
        well = dataclasses.replace(WELL, kappa=10 / ratio)
        times = double_well.first_passages(
            well, generations, key=jax.random.key(2), runs=runs
        )
        shares.append(float(np.isfinite(np.asarray(times)).mean()))
    assert shares[0] == 0
    assert 0.2 < shares[1] < 0.7
    assert shares[2] == 1


def test_censored_times() -> None:
    """Two passages in 3 + 5 + 10 generations."""
    mean, error = double_well.mean_passage([3.0, 5.0, np.inf], 10)
    assert mean == 9
    assert error == pytest.approx(9 / 2**0.5)
    with pytest.raises(InputError, match="no run of 2"):
        double_well.mean_passage([np.inf, np.inf], 10)
    with pytest.raises(InputError, match="alpha must be positive"):
        dataclasses.replace(WELL, alpha=0.0)
