"""Integer noise: the definition, its sparse form, gates, pairs and members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jes
from jes.core.codes import Codes, allowed, difference, moved, pack, pick, unpack
from jes.core.integer_noise import (
    _running_sum,
    dense_noise,
    entries,
    integer_noise,
    outcomes,
    sparse_noise,
    variance,
)
from jes.core.noise import PyTree, codes_noise
from jes.core.population import draw_overlays

KEY = jax.random.key(11)


def dense_of(key: jax.Array, size: int, sigma: float, rounds: int = 1) -> np.ndarray:
    """A sparse draw written out, [rounds, size]."""
    draw = jax.jit(integer_noise, static_argnums=(1, 2, 3))
    positions, values = draw(key, size, sigma, rounds)
    if positions is None:
        return np.asarray(values)
    positions, values = np.asarray(positions), np.asarray(values)
    out = np.zeros((rounds, size), int)
    inside = positions < size
    out[:, positions[inside]] = values[:, inside]
    return out


def test_stochastic_rounding_is_unbiased() -> None:
    """E[δ | ε] = σε, and δ is one of the two integers around it."""
    sigma, size = 0.7, 2_000_000
    delta = np.asarray(dense_noise(KEY, (size,), sigma))
    normal_key, _ = jax.random.split(KEY)
    scaled = sigma * np.asarray(jax.random.normal(normal_key, (size,)))
    assert set(np.unique(delta - np.floor(scaled))) == {0, 1}
    near = np.abs(scaled - 0.3) < 0.005
    assert abs(delta[near].mean() - scaled[near].mean()) < 5 * 0.46 / near.sum() ** 0.5
    below = np.abs(scaled + 0.3) < 0.005
    assert set(np.unique(delta[below])) == {-1, 0}
    assert abs((delta[below] == -1).mean() - 0.3) < 5 * 0.46 / below.sum() ** 0.5


@pytest.mark.parametrize("sigma", [0.001, 0.005, 0.01])
def test_share_of_entries_that_are_not_zero(sigma: float) -> None:
    """0.798 σ of them, all of them 1 or -1."""
    size = 4_000_000
    drawn = dense_of(KEY, size, sigma)[0]
    expected = sigma * (2 / np.pi) ** 0.5
    assert outcomes(sigma).nonzero == pytest.approx(expected, rel=1e-6)
    # Five standard deviations of a binomial number.
    bound = 5 * (size * expected) ** 0.5
    assert abs(np.count_nonzero(drawn) - size * expected) < bound
    assert set(np.unique(drawn)) == {-1, 0, 1}


@pytest.mark.parametrize("sigma", [0.01, 0.15, 0.3, 1.0, 4.0])
def test_sparse_and_dense_draws_have_one_distribution(sigma: float) -> None:
    """Counts of every value, of |δ| >= 2 too, against exact probabilities (χ²)."""
    size, seeds = 200_000, 10
    possible = outcomes(sigma)
    expected = {0: 1 - possible.nonzero}
    for value, p in zip(possible.values[:, 0], possible.probabilities, strict=True):
        expected[value] = expected[-value] = p * possible.nonzero / 2
    sparse = [dense_of(jax.random.key(s), size, sigma)[0] for s in range(seeds)]
    dense = [dense_noise(jax.random.key(s), (size,), sigma) for s in range(seeds)]
    for drawn in (np.concatenate(sparse), np.concatenate(dense).astype(int)):
        values, counts = np.unique(drawn, return_counts=True)
        found = dict(zip(values, counts, strict=True))
        assert set(found) <= set(expected)
        means = {v: p * drawn.size for v, p in expected.items()}
        common = [v for v in means if means[v] > 10]
        chi2 = sum((found.get(v, 0) - means[v]) ** 2 / means[v] for v in common)
        # Mean df, standard deviation sqrt(2 df): five of them.
        assert chi2 < len(common) + 5 * (2 * len(common)) ** 0.5
        assert drawn.var() == pytest.approx(variance(sigma), rel=0.03)
    if sigma >= 0.3:
        assert any(abs(v) >= 2 for v in common)


def test_entries_are_independent_of_their_places() -> None:
    """Every place is as likely, and neighbours are as if drawn apart."""
    size, seeds, sigma = 2000, 3000, 0.1
    draw = jax.vmap(lambda s: sparse_noise(jax.random.key(s), size, sigma)[0])
    positions = np.asarray(jax.jit(draw)(jnp.arange(seeds)))
    hits = np.zeros((seeds, size), bool)
    for row, places in zip(hits, positions, strict=True):
        row[places[places < size]] = True
    p = outcomes(sigma).nonzero
    z = (hits.sum(0) - seeds * p) / (seeds * p * (1 - p)) ** 0.5
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 4 / size**0.5
    assert 0.9 < z.std() < 1.1
    both = (hits[:, 1:] & hits[:, :-1]).mean()
    assert both == pytest.approx(p * p, rel=0.02)


def test_two_roundings_share_their_gaussian() -> None:
    """QuZO's pair: each has the law of one; E[u1 u2] is that of (σε)²."""
    sigma = 0.3
    first, second = dense_of(KEY, 2_000_000, sigma, rounds=2)
    one = outcomes(sigma)
    for drawn in (first, second):
        assert np.count_nonzero(drawn) / drawn.size == pytest.approx(
            one.nonzero, rel=0.01
        )
        assert drawn.var() == pytest.approx(variance(sigma), rel=0.01)
    assert (first * second).mean() == pytest.approx(sigma**2, rel=0.02)
    assert (first * second).min() >= 0


@pytest.mark.parametrize("p", [0.5, 0.01, 1e-4, 1e-6])
def test_running_sums_are_those_of_cumsum(p: float) -> None:
    gaps = jax.random.geometric(KEY, p, (1024,)).astype(jnp.int32)
    np.testing.assert_array_equal(_running_sum(gaps, p), np.cumsum(gaps))


def test_as_many_entries_as_ever_needed() -> None:
    """Eight standard deviations above the mean, and never more than there are."""
    assert entries(100, 4.0) == 100
    size, sigma = 896 * 4864, 0.01
    mean = size * outcomes(sigma).nonzero
    assert entries(size, sigma) >= mean + 8 * (mean * 0.99) ** 0.5
    assert entries(size, sigma) < 1.06 * mean


@pytest.mark.parametrize(("bits", "signed"), [(4, False), (8, False), (8, True)])
def test_packing_and_picking(bits: int, signed: bool) -> None:
    low = -128 if signed else 0
    rng = np.random.default_rng(0)
    values = rng.integers(low, low + 2**bits, (3, 6, 5))
    codes = pack(jnp.array(values), bits, signed)
    assert codes.data.nbytes == values.size * bits // 8
    assert codes.shape == values.shape
    np.testing.assert_array_equal(unpack(codes), values)
    one = Codes(codes.data[1], bits, signed)
    places = jnp.array([0, 7, 29, 30, 100])
    np.testing.assert_array_equal(
        pick(one, places)[:3], values[1].reshape(-1)[[0, 7, 29]]
    )


def test_codes_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="one of \\(4, 8\\), not 3"):
        pack(jnp.zeros((2, 2)), 3)
    with pytest.raises(ValueError, match="3 rows cannot be packed in pairs"):
        pack(jnp.zeros((3, 2)), 4)
    with pytest.raises(ValueError, match="4 bits are unsigned"):
        pack(jnp.zeros((2, 2)), 4, signed=True)


def test_the_gate_skips_and_does_not_clip() -> None:
    codes = pack(jnp.array([[15, 14], [0, 7]]), 4)
    moves = jnp.array([[1.0, 2.0], [-1.0, 2.0]])
    np.testing.assert_array_equal(
        allowed(codes, unpack(codes), moves), [[0, 0], [0, 2]]
    )
    after = codes.data + difference(codes, allowed(codes, unpack(codes), moves)).data
    np.testing.assert_array_equal(unpack(Codes(after, 4)), [[15, 14], [0, 9]])


@pytest.mark.parametrize(("bits", "signed"), [(4, False), (8, False), (8, True)])
@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_members_are_perturbed_in_pairs_within_the_range(
    bits: int, signed: bool, sigma: float
) -> None:
    """Against the noise written out; + and - differ at the ends of the range only."""
    rng = np.random.default_rng(1)
    low = -128 if signed else 0
    values = rng.integers(low, low + 2**bits, (2, 40, 30))
    values[0, :10], values[0, 10:20] = low, low + 2**bits - 1
    params: PyTree = {"kernel": {"codes": pack(jnp.array(values), bits, signed)}}
    noise = jes.Noise(sigma=sigma, antithetic=True)
    overlays = draw_overlays(params, KEY, jnp.arange(4), noise)["kernel"]["codes"]
    path = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, Codes)
    )[0][0]
    for member in range(4):
        direction = jax.random.fold_in(KEY, member // 2)
        for matrix in range(2):
            one = Codes(params["kernel"]["codes"].data[matrix], bits, signed)
            overlay = jax.tree.map(lambda x, m=member, i=matrix: x[m, i], overlays)
            got = np.asarray(moved(one, overlay)).astype(int)
            positions, drawn = codes_noise(direction, path, matrix, 1200, noise)
            delta = np.asarray(drawn)[0]
            if positions is not None:
                inside = np.asarray(positions) < 1200
                delta = np.zeros(1200, int)
                delta[np.asarray(positions)[inside]] = np.asarray(drawn)[0, inside]
            wanted = values[matrix] + (1 - 2 * (member % 2)) * delta.reshape(40, 30)
            stays = (wanted < low) | (wanted >= low + 2**bits)
            assert stays.any() or matrix
            np.testing.assert_array_equal(got, np.where(stays, values[matrix], wanted))


def test_leaves_and_matrices_have_noise_of_their_own() -> None:
    codes = pack(jnp.full((2, 64, 64), 8), 4)
    params = {"a": {"codes": codes}, "b": {"codes": codes}}
    noise = jes.Noise(sigma=0.05)
    drawn = draw_overlays(params, KEY, jnp.arange(2), noise)
    rows = [
        np.asarray(drawn[name]["codes"].positions)[member, matrix]
        for name in "ab"
        for member in (0, 1)
        for matrix in (0, 1)
    ]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert (row != other).mean() > 0.9
