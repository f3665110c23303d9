"""Updates in place: the bits of the whole update, with little memory."""

import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from marks import slow_except

import jes.config
from jes.config import freeze
from jes.core.anchor import keep_anchor
from jes.core.codes import pack
from jes.core.evolution import Evolution
from jes.core.mesh import make_mesh, mesh_of, replicated
from jes.core.noise import PyTree, leaf_noise
from jes.errors import InputError
from jes.transforms import count_parts
from jes.update import _tell, compiled_form, first_state, make_optimizer, tell

REPLAY = {"rounding": "replay", "window": 3}
DECAY = {"decay": "l2", "decay_coefficient": 0.5}
SCALES = {"scale_sigma": 0.01, "scale_alpha": 0.01}


def evolution_of(**changes: Any) -> Evolution:
    return Evolution(**{"population": 4, "sigma": 0.1, "alpha": 0.2} | changes)


def model(seed: int, scales: bool) -> PyTree:
    """A stack and a matrix alone, with codes at the ends of the range too."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> PyTree:
        codes = {"codes": pack(jnp.array(rng.integers(0, 16, shape)), bits=4)}
        drawn = rng.uniform(0.01, 0.02, (*shape[:-2], 2, shape[-1]))
        return codes | ({"scales": jnp.float32(drawn)} if scales else {})

    return {"layers": {"up": matrix(3, 32, 24)}, "head": matrix(32, 16)}


@pytest.mark.parametrize(
    "changes",
    [
        REPLAY | {"initial_residual": "uniform", "residual_clip": 1.5},
        {"rounding": "residual"} | DECAY,
        {"rounding": "naive"} | SCALES,
        *slow_except((), [REPLAY | DECAY, REPLAY | SCALES]),
    ],
)
def test_what_moves_in_place_is_what_the_updates_say(changes: dict[str, Any]) -> None:
    """`tell`, bit for bit, is the update of the whole tree, added afterwards."""
    evolution = evolution_of(**changes)
    scales = evolution.scale_sigma > 0
    params, anchor = model(0, scales), model(1, scales)
    state = first_state(evolution, params)

    @jax.jit
    def whole(state: Any, params: PyTree, key: jax.Array, fitness: jax.Array) -> Any:
        zeros = optax.tree.zeros_like(params)
        return make_optimizer(evolution).update(
            zeros, state, params, key=key, fitness=fitness, anchor=anchor
        )

    moved = 0.0
    for generation in range(5):
        key = jes.generation_key(jax.random.key(0), generation)
        fitness = jax.random.normal(key, (4,))
        updates, next_state = whole(state, params, key, fitness)
        expected = optax.apply_updates(params, updates), next_state
        expected = jax.tree.map(np.array, expected)
        params, state = tell(evolution, params, state, key, fitness, anchor)
        jax.tree.map(np.testing.assert_array_equal, (params, state), expected)
        moved += float(optax.tree.get(state, "changed"))
    assert moved > 100


def compiled(evolution: Evolution, params: PyTree, share: bool) -> Any:
    """The program of an update whose weights are donated."""
    mesh, state = mesh_of(params), first_state(evolution, params)
    key, fitness = jax.random.key(0), jnp.ones(4)
    form, rates = compiled_form(evolution)
    arguments = form, mesh, share, (), params, state, rates, key, fitness, None
    return _tell.lower(*arguments).compile()


def beside_weights(program: Any) -> int:
    """Bytes that a program takes beside the arrays that are donated to it."""
    found = program.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return new + found.temp_size_in_bytes


def test_an_update_takes_no_more_memory_for_more_layers() -> None:
    """By the compiler's analysis, of two stacks of 32 matrices over two of 2."""

    def beside(layers: int) -> int:
        stack = {"codes": pack(jnp.full((layers, 256, 256), 8), bits=4)}
        params = {"up": stack, "down": stack}
        return beside_weights(compiled(evolution_of(**REPLAY), params, share=False))

    one_matrix = 256 * 256 // 2
    assert beside(32) < beside(2) + one_matrix


def floats(seed: int, layers: int = 4) -> PyTree:
    """A stack that moves a layer at a time, a matrix in two parts, and vectors."""
    shapes = {
        "embed": {"embedding": (6000, 400)},
        "layers": {"up": {"kernel": (layers, 1024, 1024), "bias": (layers, 7)}},
        "final_norm": {"scale": (9,)},
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.float32(rng.normal(size=shape)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def small_floats(seed: int) -> PyTree:
    """Matrices, of which a stack and one alone, and vectors."""
    rng = np.random.default_rng(seed)
    shapes = {"up": (3, 8, 6), "bias": (3, 7), "scale": (9,)}
    drawn = {name: jnp.float32(rng.normal(size=shapes[name])) for name in shapes}
    return {
        "embed": {"embedding": jnp.float32(rng.normal(size=(12, 8)))},
        "layers": {"up": {"kernel": drawn["up"], "bias": drawn["bias"]}},
        "final_norm": {"scale": drawn["scale"]},
    }


@pytest.mark.parametrize(
    ("law", "decay"),
    [
        ("normal", DECAY),
        ("table", {}),
        *slow_except((), [("normal", {}), ("table", DECAY)]),
    ],
)
def test_floats_that_move_in_parts_are_those_that_move_at_once(
    law: str, decay: dict[str, Any]
) -> None:
    """`tell`, bit for bit, is the update of the whole tree, added afterwards."""
    evolution = evolution_of(distribution=law, **decay)
    params, anchor = floats(0), floats(1) if decay else None
    assert [count_parts((), leaf) for leaf in jax.tree.leaves(params)] == [2, 1, 1, 4]
    state = first_state(evolution, params)
    key, fitness = jes.generation_key(jax.random.key(0), 0), jnp.arange(4.0) ** 2

    @jax.jit
    def whole(params: PyTree, state: Any) -> Any:
        zeros = optax.tree.zeros_like(params)
        updates, state = make_optimizer(evolution).update(
            zeros, state, params, key=key, fitness=fitness, anchor=anchor
        )
        return optax.apply_updates(params, updates), state

    expected = whole(params, state)
    found = tell(evolution, params, state, key, fitness, anchor)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("place", "rank"),
    slow_except(
        {("device", 0), ("host", 1)}, itertools.product(["device", "host"], [0, 1])
    ),
)
def test_what_devices_share_is_what_each_would_compute(
    rank: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with parts that two devices share evenly, and three that not."""
    monkeypatch.setattr("jes.transforms._in_place.PART", 16)
    evolution = evolution_of(rank=rank, **DECAY)
    key, fitness = jes.generation_key(jax.random.key(0), 0), jnp.arange(4.0) ** 2

    def moved(mesh: Mesh | None, share: bool) -> PyTree:
        params = replicated(small_floats(0), mesh)
        anchor = keep_anchor(replicated(small_floats(1), mesh), place)
        state = first_state(evolution, params)
        for _ in range(2):
            params, state = tell(
                evolution, params, state, key, fitness, anchor, share=share
            )
        assert mesh_of(params) == mesh
        return params

    expected = moved(None, share=False)
    jax.tree.map(np.testing.assert_array_equal, moved(None, share=True), expected)
    mesh = make_mesh(1, jax.devices()[:2])
    for share in (False, True):
        found = moved(mesh, share)
        for leaf, right in zip(
            jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
        ):
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, right)


def on_two(layers: int) -> PyTree:
    """A stack on two devices."""
    mesh = make_mesh(1, jax.devices()[:2])
    return {"layers": replicated(jnp.ones((layers, 1024, 1024)), mesh)}


def test_an_anchor_in_the_memory_of_the_host_is_there_once() -> None:
    """Whatever the number of devices, but for vectors that do not divide."""
    mesh = make_mesh(1, jax.devices()[:2])
    params = replicated(small_floats(0) | {"odd": jnp.ones(9)}, mesh)
    anchor = keep_anchor(params, "host")
    for path, leaf in jax.tree_util.tree_leaves_with_path(anchor):
        assert leaf.sharding.memory_kind == "pinned_host"
        held = sum(shard.data.nbytes for shard in leaf.addressable_shards)
        whole = leaf.nbytes * (1 + all(size % 2 for size in leaf.shape))
        assert held == whole, path
    jax.tree.map(np.testing.assert_array_equal, anchor, params)


def test_devices_that_share_send_what_they_have_moved() -> None:
    """And hold a part of each device for a while; without sharing nothing is sent."""
    evolution = evolution_of()
    assert "all-gather" not in compiled(evolution, on_two(4), share=False).as_text()
    shared = compiled(evolution, on_two(4), share=True).as_text()
    gathers = re.findall(r"= f32\[([0-9,]+)\]\S* all-gather\(", shared)
    assert gathers == ["2,1,1024,1024"]

    def beside(layers: int) -> int:
        return beside_weights(compiled(evolution, on_two(layers), share=True))

    assert beside(8) < beside(2) + 1000
    assert beside(8) < 2 * (2 + 3) * 4 * 1024 * 1024  # both devices are in one process


def test_devices_that_share_draw_each_part_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []

    def counted(*args: Any) -> jax.Array:
        jax.debug.callback(lambda number: drawn.append(int(number)), args[-1])
        return leaf_noise(*args)

    monkeypatch.setattr("jes.transforms._es_gradient.leaf_noise", counted)
    evolution, params = evolution_of(sigma=0.123), on_two(3)  # compiled here alone
    state = first_state(evolution, params)
    tell(evolution, params, state, jax.random.key(0), jnp.arange(4.0), share=True)
    jax.effects_barrier()
    # Of four members; the third part has a device to spare, which draws it too.
    assert sorted(drawn) == [0] * 4 + [1] * 4 + [2] * 8


@pytest.mark.parametrize("law", ["normal", "table"])
def test_an_update_of_floats_takes_no_more_memory_for_more_layers(law: str) -> None:
    """By the compiler's analysis: some numbers for each weight of a part."""

    evolution, one_part = evolution_of(distribution=law), 4 * 6000 * 400 // 2

    def beside(layers: int) -> int:
        return beside_weights(compiled(evolution, floats(0, layers), share=False))

    assert beside(8) < beside(2) + 1000
    assert beside(8) < 5 * one_part


@pytest.mark.parametrize("distribution", jes.core.noise.DISTRIBUTIONS)
def test_parts_with_rows_of_each_device_are_the_same(distribution: str) -> None:
    """Bit for bit: parts of three rows, one of each of three pieces."""
    noise = jes.Noise(sigma=0.1, distribution=distribution)
    chain = optax.chain(
        jes.es_gradient(noise),
        optax.scale_by_learning_rate(0.2),
        jes.anchored_weight_decay(0.2, 0.5, None),
    )
    params, anchor = (
        {"embed": jax.random.normal(jax.random.key(n), (12, 5))} for n in (1, 2)
    )
    key, fitness = jax.random.key(0), jnp.arange(4.0)
    found = [
        jes.update_in_place(
            chain,
            params,
            chain.init(params),
            key=key,
            fitness=fitness,
            anchor=anchor,
            parts=lambda path, leaf, parts=parts: parts,
            pieces=lambda path, leaf, pieces=pieces: pieces,
        )[0]["embed"]
        for parts, pieces in ((1, 1), (4, 3))
    ]
    np.testing.assert_array_equal(*found)
    assert (found[0] != params["embed"]).all()


def test_a_chain_of_ones_own_takes_no_more_memory_than_that_of_a_run() -> None:
    """`jes.update_in_place`, jitted by a user of the library, beside `tell`."""
    evolution, params = evolution_of(**DECAY), floats(0)
    anchor, key, fitness = floats(1), jax.random.key(0), jnp.arange(4.0)
    optimizer = optax.chain(
        jes.es_gradient(jes.Noise(sigma=0.1)),
        optax.scale_by_learning_rate(0.2),
        jes.anchored_weight_decay(0.2, 0.5, None),
    )
    own = jax.jit(partial(jes.update_in_place, optimizer), donate_argnums=(0, 1))
    inputs = params, optimizer.init(params)
    program = own.lower(*inputs, key=key, fitness=fitness, anchor=anchor).compile()
    state = first_state(evolution, params)
    form, rates = compiled_form(evolution)
    arguments = form, None, False, (), params, state, rates, key, fitness, anchor
    assert beside_weights(program) <= beside_weights(_tell.lower(*arguments).compile())
    found, _ = own(*inputs, key=key, fitness=fitness, anchor=anchor)
    expected, _ = tell(evolution, floats(0), state, key, fitness, anchor)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "other", [{"rounding": "naive"}, {"model_parallel": 2}, {"method": "grpo"}]
)
def test_settings_that_share_nothing(other: dict[str, Any]) -> None:
    config = jes.config.default()
    config.share_update = True
    freeze(config)
    config.update(other)
    with pytest.raises(InputError, match="share_update"):
        freeze(config)
