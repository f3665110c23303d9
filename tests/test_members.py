"""Members of every kind of noise: what they are, and where and how many are held."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from small_decoder import decoder
from small_decoder import weights_of as weights_of_decoder

import jes
from jes.core.mesh import make_mesh, replicated
from jes.core.noise import DISTRIBUTIONS, Noise
from jes.core.population import perturb_members
from jes.core.tree import is_quantized
from jes.models.partition import place
from jes.quantize import quantize
from jes.questions import Evaluation, prepare
from jes.rollout import ask
from jes.sampling.generate import Sampling

KEY = jax.random.key(7)
KINDS: dict[str, tuple[Noise, str]] = {
    "full": (Noise(sigma=0.1), "member"),
    "pairs of a table": (
        Noise(sigma=0.1, distribution="table", antithetic=True),
        "member",
    ),
    "low rank": (Noise(sigma=0.1, rank=2), "member"),
    "drawn by layers": (Noise(sigma=0.1), "layer"),
    "int4": (Noise(sigma=1.0), "member"),
}


def weights_of(kind: str, folder: Path) -> Any:
    params = jes.load(folder).params
    return quantize(params, bits=4, group_size=32) if kind == "int4" else params


@pytest.mark.parametrize("kind", slow_except({"full"}, KINDS))
def test_chunks_and_devices_change_nothing(kind: str, small_model: Path) -> None:
    """Neither scores nor the noise, whose bits depend on key and member alone."""
    loaded, params = jes.load(small_model), weights_of(kind, small_model)
    noise, draw = KINDS[kind]
    task = dataclasses.replace(
        jes.tasks.load_task("tiny/max", train_examples=6, test_examples=2),
        reward=lambda example, text: jes.tasks.task.Reward(
            len(text) + len(set(text)) / 7, "1" in text, False, False
        ),
    )
    evaluation = Evaluation(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        task=task,
        sampling=Sampling(eos_ids=loaded.eos_ids, temperature=0.5),
        buckets=(32,),
        draw=draw,
    )
    questions = prepare(evaluation, task.train)
    mesh = make_mesh(devices=jax.devices()[:2])
    apart = replicated(params, mesh)
    found, *others = (
        ask(evaluation, weights, KEY, questions, noise=noise, population=4, chunk=chunk)
        for weights, chunk in ((params, 4), (params, 3), (apart, 1))
    )
    assert len(set(found.reward)) > 1
    for other in others:
        np.testing.assert_equal(other, found)
    four, two = (
        perturb_members(params, KEY, members, noise, draw=draw)
        for members in (jnp.arange(4), jnp.array([3, 1]))
    )
    spread = perturb_members(apart, KEY, jnp.arange(4), noise, draw=draw, mesh=mesh)
    for name, axis in four.axes.items():
        for whole, some, other in zip(
            *(jax.tree.leaves(each.variables[name]) for each in (four, two, spread)),
            strict=True,
        ):
            part = whole if axis is None else whole[jnp.array([3, 1])]
            np.testing.assert_array_equal(some, part)
            np.testing.assert_array_equal(other, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_params_are_shared_but_with_noise_of_full_rank(
    kind: str, small_model: Path
) -> None:
    params = weights_of(kind, small_model)
    noise, draw = KINDS[kind]
    members = perturb_members(params, KEY, jnp.arange(2), noise, draw=draw)
    shared = is_quantized(params) or noise.rank > 0 or draw == "layer"
    assert members.share_params == shared
    assert members.count == 2
    if shared:
        assert members.variables["params"] is params
        itself = perturb_members(params, KEY, jnp.arange(2), None)
        assert itself.variables == {"params": params, "noise": {}}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("devices", slow_except({0}, [0, 1, 2]))
def test_layers_drawn_apart_are_those_of_the_stack(
    distribution: str, devices: int
) -> None:
    """Bit for bit: vectors and matrices, whose rows are no multiples of 32 too.

    By one device, by two that have a member each, or half of each.
    """
    model = decoder(hidden_size=40, qkv_bias=True)
    params = weights_of_decoder(model)
    noise = Noise(sigma=0.1, distribution=distribution, antithetic=True)
    mesh = make_mesh(devices, jax.devices()[:2]) if devices else None
    params = place(params, mesh)
    given = params, KEY, jnp.array([3, 1]), noise
    stacked, found = (
        perturb_members(*given, apart=apart, mesh=mesh).variables["params"]
        for apart in (False, True)
    )
    expected = jax.vmap(model.unrolled_params)(stacked)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
