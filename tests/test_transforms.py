"""What every transformation does: one table of transformations and properties."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jes
from jes.core.noise import PyTree
from jes.io.checkpoints import restore_latest, save

NOISE = jes.Noise(sigma=0.3)
POPULATION = 4


def floats(seed: int, dtype: str = "float32") -> PyTree:
    """A stack, a matrix and a vector; the first two are cut where PART is 8."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"layers": (3, 4, 2), "embed": (6, 4), "scale": (5,)}
    return {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def codes(seed: int) -> PyTree:
    """A stack of three matrices of codes, and one alone."""
    values = np.random.default_rng(seed).integers(2, 14, (4, 4, 6))
    return {
        "layers": {"codes": jes.pack_codes(jnp.array(values[:3]), bits=4)},
        "head": {"codes": jes.pack_codes(jnp.array(values[3]), bits=8)},
    }


def chain(*last: Any, noise: jes.Noise = NOISE) -> Any:
    return optax.chain(jes.es_gradient(noise), optax.scale_by_learning_rate(0.6), *last)


CASES: dict[str, tuple[Callable[[], Any], Callable[[int], PyTree]]] = {
    "es_gradient": (chain, floats),
    "es_gradient, antithetic": (
        lambda: chain(noise=dataclasses.replace(NOISE, antithetic=True)),
        lambda seed: floats(seed, "bfloat16"),
    ),
    "anchored_weight_decay": (
        lambda: chain(jes.anchored_weight_decay(0.6, 0.5, None)),
        floats,
    ),
    "error_feedback, floats": (
        lambda: chain(jes.error_feedback()),
        lambda seed: floats(seed, "bfloat16"),
    ),
    "error_feedback, codes": (
        lambda: chain(jes.error_feedback(initial="uniform")),
        codes,
    ),
    "seed_replay": (
        lambda: jes.seed_replay(
            chain(jes.anchored_weight_decay(0.6, 0.5, None)),
            population=POPULATION,
            window=2,
            initial="uniform",
        ),
        codes,
    ),
    "stochastic_rounding": (
        lambda: chain(
            jes.stochastic_rounding(), noise=dataclasses.replace(NOISE, rounds=2)
        ),
        codes,
    ),
}
"""Name -> functions that make the optimizer, and parameters of a seed."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Callable[[int], PyTree]]:
    make_optimizer, make_params = CASES[request.param]
    return make_optimizer(), make_params


def inputs(generation: int, anchor: PyTree) -> dict[str, Any]:
    """What `update` is given, with an argument that no transformation knows."""
    key = jes.generation_key(jax.random.key(0), generation)
    fitness = jax.random.normal(key, (POPULATION,))
    return {"key": key, "fitness": fitness, "anchor": anchor, "unknown": 3}


def test_properties_of_every_transformation(
    case: tuple[Any, Callable[[int], PyTree]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Extra arguments, no recompilation, dtypes, checkpoints, and updates in place."""
    monkeypatch.setattr("jes.transforms._in_place.PART", 8)
    optimizer, make_params = case
    anchor, start = make_params(1), make_params(0)
    traced: list[str] = []

    @jax.jit
    def plain(params: PyTree, state: Any, **given: Any) -> Any:
        traced.append("plain")
        zeros = optax.tree.zeros_like(params)
        updates, state = optimizer.update(zeros, state, params, **given)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def in_place(params: PyTree, state: Any, **given: Any) -> Any:
        traced.append("in place")
        return jes.update_in_place(optimizer, params, state, **given)

    expected = found = start, optimizer.init(start)
    for generation in range(4):
        expected = plain(*expected, **inputs(generation, anchor))
        found = in_place(*found, **inputs(generation, anchor))
        chex.assert_trees_all_equal(found, expected)
    save(tmp_path, 4, found)
    saved = restore_latest(tmp_path, found, 4)
    assert saved is not None
    chex.assert_trees_all_equal(saved[1], found)
    assert traced == ["plain", "in place"]
    params, _ = found
    chex.assert_trees_all_equal_shapes_and_dtypes(params, start)
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True):
        assert (new != old).mean() > 0.1


def test_scalars_of_other_transformations_are_what_they_were() -> None:
    """A learning rate in the state is no sum over weights."""
    optimizer = optax.chain(
        jes.es_gradient(NOISE),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.25),
    )
    start = floats(0)
    given = {"key": jax.random.key(0), "fitness": jnp.arange(4.0)}
    _, state = jes.update_in_place(optimizer, start, optimizer.init(start), **given)
    assert optax.tree.get(state, "learning_rate") == 0.25


def test_an_anchor_that_cannot_be_cut_is_named() -> None:
    start = floats(0)
    optimizer = chain(jes.anchored_weight_decay(0.6, 0.5, start))
    given = {"key": jax.random.key(0), "fitness": jnp.arange(4.0)}
    with pytest.raises(ValueError, match="takes it as an argument, anchor="):
        jes.update_in_place(optimizer, start, optimizer.init(start), **given)
