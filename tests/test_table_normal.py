"""Normal numbers from a table: their law, their independence, and runs with them."""

import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_run import get_config, outcome, rows

import jes
from jes import train
from jes.config import freeze
from jes.core import ledger as ledgers
from jes.core.mesh import make_mesh, replicated
from jes.core.noise import (
    DISTRIBUTIONS,
    generation_key,
    leaf_noise,
    perturb_member,
)
from jes.core.population import draw_members
from jes.core.random import positive_values, table
from jes.errors import InputError
from jes.export import evolution_of, rebuild
from jes.models.weights import fingerprint

KEY = jax.random.key(11)
N = 2_000_000
TABLE = jes.Noise(sigma=1.0, distribution="table")
MOMENTS = {2: 1.0, 4: 2.99983, 6: 14.9912}
"""Of the table, to the digits that its docstring states."""


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    return np.asarray(table(KEY, (N,)), np.float64)


def table_values() -> np.ndarray:
    half = positive_values().astype(np.float64)
    return np.concatenate([-half[::-1], half])


def test_the_table_is_the_means_of_equal_shares_of_the_normal() -> None:
    """Against scipy's quantiles: means are between those of the edges of a share."""
    values = table_values()
    edges = stats.norm.ppf(np.arange(1, 2**16) / 2**16)
    assert (values[1:] > edges).all()
    assert (values[:-1] < edges).all()
    middle = slice(2**15, 2**16 - 1)
    a, b = edges[2**15 - 1 : -1], edges[2**15 :]
    # By Simpson's rule, good to 1e-9 but in the widest shares, far out.
    m = (a + b) / 2
    weights = [stats.norm.pdf(x) * f for x, f in ((a, 1), (m, 4), (b, 1))]
    means = sum(w * x for w, x in zip(weights, (a, m, b), strict=True)) / sum(weights)
    # Scaled by 1 + 7.4e-7, and rounded to float32: 6e-8.
    np.testing.assert_allclose(values[middle][:-100], means[:-100], rtol=9e-7)
    tail = stats.norm.pdf(edges[-1]) * 2**16
    assert values[-1] == pytest.approx(tail, rel=9e-7)


def test_moments_of_the_table_are_what_its_docstring_says() -> None:
    values = table_values()
    for power, moment in MOMENTS.items():
        digits = {2: 1e-8, 4: 5e-6, 6: 5e-5}[power]
        assert np.mean(values**power) == pytest.approx(moment, abs=digits)
    assert values.max() == pytest.approx(4.3875, abs=5e-5)
    for sigmas in (2, 3, 4):  # to half a value on each side
        share = np.mean(np.abs(values) > sigmas)
        assert abs(share - 2 * stats.norm.sf(sigmas)) <= 2 * 2**-16


def test_the_table_has_the_same_bits_everywhere() -> None:
    """Other bits, of another libm say, would be other noise for the same ledger."""
    assert zlib.crc32(positive_values().tobytes()) == 1194649171
    with pytest.raises(ValueError, match="read-only"):
        positive_values()[0] = 0


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (1000, 37), (3, 41, 501)])
def test_two_numbers_a_word_sign_first(shape: tuple[int, ...]) -> None:
    """The definition, in numpy: low half before high half, the top bit the sign."""
    size = math.prod(shape)
    words = np.asarray(jax.random.bits(KEY, (-(-size // 2),), jnp.uint32))
    halves = np.stack([words & 0xFFFF, words >> 16], -1).ravel()[:size]
    values = positive_values()[halves & 0x7FFF]
    expected = np.where(halves >> 15, -values, values).reshape(shape)
    for draw in (table, jax.jit(table, static_argnums=1)):
        drawn = draw(KEY, shape)
        assert drawn.dtype == jnp.float32
        np.testing.assert_array_equal(drawn, expected)


def test_numbers_do_not_depend_on_what_is_computed_beside_them() -> None:
    whole = np.asarray(table(KEY, (60, 51)))
    part = jax.jit(lambda key: table(key, (60, 51))[7:30, 3::5])(KEY)
    np.testing.assert_array_equal(part, whole[7:30, 3::5])
    np.testing.assert_array_equal(table(KEY, (1001,)), whole.ravel()[:1001])
    keys = jax.random.split(KEY, 3)
    stacked = jax.jit(jax.vmap(lambda key: table(key, (60, 51))))(keys)
    for key, drawn in zip(keys, stacked, strict=True):
        np.testing.assert_array_equal(drawn, table(key, (60, 51)))


def test_members_on_other_devices_are_the_same() -> None:
    noise = jes.Noise(sigma=0.1, distribution="table")
    params = {"a": jnp.ones((30, 7)), "b": jnp.zeros(5)}

    members = jnp.arange(6)
    expected = draw_members(params, KEY, members, noise, "float32")
    mesh = make_mesh(devices=jax.devices()[:2])
    apart = replicated(params, mesh)
    spread = draw_members(apart, KEY, members, noise, "float32", mesh=mesh)
    assert len(spread["a"].sharding.device_set) == 2
    for ours, alone in zip(
        jax.tree.leaves(spread), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(ours, alone)


def test_other_generators_will_do() -> None:
    drawn = table(jax.random.key(0, impl="rbg"), (100_000,))
    assert abs(float(drawn.var()) - 1) < 5 * (2 / 100_000) ** 0.5


def test_the_key_contract_holds() -> None:
    noise = jes.Noise(sigma=0.1, distribution="table")
    params = {"a": {"kernel": jnp.zeros((30, 20))}}
    drawn = perturb_member(
        params, generation_key(jax.random.key(0), 3), jnp.int32(5), noise
    )
    member = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 3), 5)
    leaf = jax.random.fold_in(member, zlib.crc32(b"a/kernel"))
    expected = np.float32(0.1) * np.asarray(table(leaf, (30, 20)))
    np.testing.assert_array_equal(drawn["a"]["kernel"], expected)


def test_moments_of_the_numbers(numbers: np.ndarray) -> None:
    """Five standard errors, from the table's own moments."""
    values = table_values()
    for power in (1, 2, 3, 4, 5, 6):
        expected = np.mean(values**power)
        error = np.std(values**power) / N**0.5
        assert abs(np.mean(numbers**power) - expected) < 5 * error


def test_tails_of_the_numbers(numbers: np.ndarray) -> None:
    for sigmas in (2, 3, 4):
        share = 2 * stats.norm.sf(sigmas)
        # The table's resolution, and five standard errors.
        bound = 2 * 2**-16 + 5 * (share / N) ** 0.5
        assert abs(np.mean(np.abs(numbers) > sigmas) - share) < bound
        above, below = (numbers > sigmas).sum(), (numbers < -sigmas).sum()
        assert abs(above - below) < 5 * (above + below) ** 0.5


def pairs(numbers: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numbers that could depend on each other, in pairs."""
    size = N // 4
    leaves = [leaf_noise(KEY, (name,), (size,), TABLE) for name in ("a", "b")]
    members = [table(jax.random.fold_in(KEY, m), (size,)) for m in (0, 1)]
    generations = [
        table(jax.random.fold_in(generation_key(KEY, g), 0), (size,)) for g in (0, 1)
    ]
    found = {
        "halves of a word": (numbers[0::2], numbers[1::2]),
        "a word and the next": (numbers[1:-1:2], numbers[2::2]),
        "low halves of two words": (numbers[0:-2:2], numbers[2::2]),
        "leaves": leaves,
        "members": members,
        "generations": generations,
    }
    return {name: tuple(map(np.asarray, pair)) for name, pair in found.items()}


def test_pairs_are_independent(numbers: np.ndarray) -> None:
    """Correlations, also of squares, and the counts of 16 x 16 equal shares."""
    edges = stats.norm.ppf(np.arange(1, 16) / 16)
    for name, (left, right) in pairs(numbers).items():
        n = left.size
        for power in (1, 2):
            correlation = np.corrcoef(left**power, right**power)[0, 1]
            assert abs(correlation) < 4.5 / n**0.5, name
        cells = np.digitize(left, edges) * 16 + np.digitize(right, edges)
        counts = np.bincount(cells, minlength=256)
        square = ((counts - n / 256) ** 2).sum() / (n / 256)
        # Chi-square with 255 degrees of freedom, five standard deviations to each side.
        assert abs(square - 255) < 5 * 510**0.5, name


D = 20
CURVATURE = jnp.linspace(0.5, 2.0, D)
OPTIMUM = jnp.linspace(-1.0, 1.0, D)
SEEDS, MEMBERS = 4000, 16


def fitness(weights: jax.Array) -> jax.Array:
    return -0.5 * (CURVATURE * (weights - OPTIMUM) ** 2).sum()


def estimates(law: str) -> np.ndarray:
    """Estimates of the gradient at 0 of a quadratic: float64 [SEEDS, D]."""
    noise = jes.Noise(sigma=0.3, distribution=law)
    transform = jes.es_gradient(noise, shaping="none")
    zeros = {"w": jnp.zeros(D)}

    def one(seed: jax.Array) -> jax.Array:
        key = generation_key(jax.random.key(7), seed)
        draw = jax.vmap(perturb_member, in_axes=(None, None, 0, None))
        members = draw(zeros, key, jnp.arange(MEMBERS), noise)
        values = jax.vmap(fitness)(members["w"])
        state = transform.init(zeros)
        return transform.update(zeros, state, key=key, fitness=values)[0]["w"]

    drawn = jax.jit(jax.vmap(one))(jnp.arange(SEEDS))
    return np.asarray(drawn, np.float64)


def test_gradient_estimates_are_those_of_normal_noise() -> None:
    """Mean -σ∇J, by z-tests of all coordinates, and the variance of exact noise."""
    drawn = {law: estimates(law) for law in DISTRIBUTIONS}
    expected = -0.3 * np.asarray(jax.grad(fitness)(jnp.zeros(D)))
    z = (drawn["table"].mean(0) - expected) / (
        drawn["table"].std(0, ddof=1) / SEEDS**0.5
    )
    # 20 coordinates: max |z| of 20 standard normals exceeds 4 once in 800 seeds.
    assert np.abs(z).max() < 4
    assert 0.4 < z.std() < 1.6
    assert not np.array_equal(drawn["table"], drawn["normal"])
    squares = {law: ((g - expected) ** 2).sum(1) for law, g in drawn.items()}
    difference = squares["table"].mean() - squares["normal"].mean()
    error = sum(each.var(ddof=1) / SEEDS for each in squares.values()) ** 0.5
    assert abs(difference) < 4 * error
    # Else the comparison would say little: 4 standard errors are a fifth at most.
    assert 4 * error < 0.2 * squares["normal"].mean()


def test_estimate_is_of_the_noise_that_members_have() -> None:
    noise = jes.Noise(sigma=0.1, antithetic=True, distribution="table")
    params = {"a": {"w": jnp.zeros((3, 5))}, "b": jnp.zeros(7)}
    values = jnp.array([0.3, 0.1, 0.7, 0.4])
    transform = jes.es_gradient(noise, shaping="none")
    found, _ = transform.update(params, transform.init(params), key=KEY, fitness=values)
    members = [perturb_member(params, KEY, jnp.int32(m), noise) for m in range(4)]
    expected = jax.tree.map(
        lambda *each: -sum(v * e for v, e in zip(values, each, strict=True)) / 4 / 0.1,
        *members,
    )
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_laws_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"one of \('normal', 'table', 'sign'\), not 'cauchy'"
    ):
        jes.Noise(sigma=1.0, distribution="cauchy")


def test_settings_that_no_run_can_have(small_model: Path) -> None:
    config = get_config(str(small_model))
    assert freeze(config).evolution.noise.distribution == "normal"
    config.noise = "cauchy"
    with pytest.raises(
        InputError, match=r"\('normal', 'table', 'sign'\), not 'cauchy'"
    ):
        freeze(config)
    config.noise, config.rounding = "table", "replay"
    with pytest.raises(InputError, match="'table' is for float models"):
        freeze(config)


@pytest.mark.slow
def test_a_run_with_the_table_trains_and_replays(
    tmp_path: Path, small_model: Path, finished_run: Path
) -> None:
    config = get_config(str(small_model))
    config.noise = "table"
    workdir = tmp_path / "run"
    train.run(config, workdir)
    ledger = ledgers.read(workdir / "ledger.jsonl")
    assert ledger.header["evolution"]["distribution"] == "table"
    assert fingerprint(rebuild(ledger).params) == outcome(workdir).fingerprint
    assert outcome(workdir).fingerprint != outcome(finished_run).fingerprint
    last = rows(workdir / "metrics.jsonl")[-1]
    # Variance 1, so the same law of drift: 12,000 weights make the norm sharp.
    law = last["displacement_norm_drift"]
    assert last["displacement_norm"] == pytest.approx(law, rel=0.05)


def test_ledgers_that_do_not_say_have_normal_noise(finished_run: Path) -> None:
    ledger = ledgers.read(finished_run / "ledger.jsonl")
    del ledger.header["evolution"]["distribution"]
    assert evolution_of(ledger).noise.distribution == "normal"
    assert fingerprint(rebuild(ledger).params) == outcome(finished_run).fingerprint
