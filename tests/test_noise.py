"""Keys, Gaussian noise and perturbed members."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jes.core.noise import Noise, generation_key, leaf_noise, perturb, perturb_member
from jes.core.population import chunks
from jes.core.random import normal

PARAMS = {
    "a": {"kernel": jnp.zeros((300, 200)), "other": jnp.ones((300, 200))},
    "b": jnp.zeros((7,)),
}
KEY = generation_key(jax.random.key(0), 3)


def test_the_key_contract() -> None:
    member = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 3), 5)
    leaf = jax.random.fold_in(member, zlib.crc32(b"a/kernel"))
    expected = 0.1 * jax.random.normal(leaf, (300, 200))
    drawn = perturb_member(PARAMS, KEY, jnp.int32(5), Noise(sigma=0.1))
    np.testing.assert_array_equal(drawn["a"]["kernel"], expected)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1000, 37), (3, 40, 500)])
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5])
def test_fused_normal_is_that_of_jax_bit_for_bit(
    shape: tuple[int, ...], seed: int
) -> None:
    key = jax.random.fold_in(jax.random.key(0), seed)
    expected = jax.random.normal(key, shape)
    fused = jax.jit(normal, static_argnums=1)(key, shape)
    np.testing.assert_array_equal(fused, expected)


def test_keys_of_another_generator_are_left_to_jax() -> None:
    key = jax.random.key(0, impl="rbg")
    drawn = normal(key, (5, 3))
    np.testing.assert_array_equal(drawn, jax.random.normal(key, (5, 3)))


def test_noise_is_standard_normal() -> None:
    noise = np.asarray(perturb(PARAMS, KEY, 1.0)["a"]["kernel"]).ravel()
    n = noise.size
    # Five standard errors of the mean, variance and fourth moment of n normals.
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / n) ** 0.5


def test_leaves_members_and_generations_are_independent() -> None:
    noise = Noise(sigma=1.0)
    centre = jax.tree.map(jnp.zeros_like, PARAMS)
    draw = [
        perturb_member(
            centre, generation_key(jax.random.key(0), g), jnp.int32(m), noise
        )
        for g, m in ((0, 0), (0, 1), (1, 0))
    ]
    flat = [draw[0]["a"]["other"], *(tree["a"]["kernel"] for tree in draw)]
    correlation = np.corrcoef([np.asarray(leaf).ravel() for leaf in flat])
    off_diagonal = correlation[~np.eye(4, dtype=bool)]
    assert np.abs(off_diagonal).max() < 4.5 / 60000**0.5


def test_noise_of_a_leaf_does_not_depend_on_the_tree_around_it() -> None:
    alone = perturb({"a": {"kernel": PARAMS["a"]["kernel"]}}, KEY, 0.5)
    together = perturb(PARAMS, KEY, 0.5)
    np.testing.assert_array_equal(alone["a"]["kernel"], together["a"]["kernel"])


def test_antithetic_pairs_are_mirrored() -> None:
    noise = Noise(sigma=0.3, antithetic=True)
    plus, minus = (
        perturb_member(PARAMS, KEY, jnp.int32(m), noise)["a"]["other"] for m in (4, 5)
    )
    np.testing.assert_allclose(plus + minus, 2 * jnp.ones_like(plus), atol=3e-7)


def test_perturb_keeps_dtype_and_the_centre() -> None:
    params = {"w": jnp.full((64, 64), 0.02, jnp.bfloat16)}
    before = np.asarray(params["w"]).copy()
    out = perturb(params, KEY, 0.01)
    assert out["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["w"], before)
    exact = 0.02 + 0.01 * leaf_noise(KEY, (jax.tree_util.DictKey("w"),), (64, 64))
    # One rounding, of the sum taken in float32: half an ulp, 2^-9 relative.
    error = jnp.abs(out["w"].astype(jnp.float32) - exact)
    assert bool((error <= 2**-9 * jnp.abs(exact) + 1e-4).all())


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_must_be_positive_and_finite(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        Noise(sigma=sigma)


def test_population_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Noise(sigma=1.0).check_population(0)
    with pytest.raises(ValueError, match="even population, not 5"):
        Noise(sigma=1.0, antithetic=True).check_population(5)


def test_chunks_cover_the_population_in_one_shape() -> None:
    parts = list(chunks(np.arange(10), 4))
    assert [part.tolist() for part in parts] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 9, 9],
    ]
