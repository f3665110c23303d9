"""Noise drawn in the layers: the same members, one layer of them at a time."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from small_decoder import decoder, weights_of
from small_run import get_config, outcome

import jes
from jes import train
from jes.core.lazy_noise import LazyNoise, MemberWeight
from jes.core.members import Members, unperturbed
from jes.core.mesh import make_mesh
from jes.core.noise import DISTRIBUTIONS, Noise, PyTree
from jes.core.population import perturb_members
from jes.core.random import Place, bits_at, places
from jes.errors import InputError
from jes.models.member_layers import member_weight
from jes.models.qwen import Decoder
from jes.questions import Evaluation, prepare
from jes.rollout import ask, examine
from jes.sampling.generate import Sampling, decode, unrolled
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.prompts import pad

KEY = jax.random.key(5)
MEMBERS = jnp.array([0, 1, 6])
PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]


def both(params: PyTree, noise: Noise, dtype: str = "float32") -> list[Members]:
    """Members whose noise is drawn before they answer, and in the layers."""
    return [
        perturb_members(params, KEY, MEMBERS, noise, dtype=dtype, draw=draw)
        for draw in ("member", "layer")
    ]


def decoder_of(**changes: object) -> tuple[Decoder, PyTree]:
    model = decoder(**{"num_hidden_layers": 3, "vocab_size": 48} | changes)
    return model, weights_of(model)


@pytest.mark.parametrize("law", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 6, 5), (5, 3, 7)])
def test_a_number_depends_on_its_place_alone(law: str, shape: tuple[int, ...]) -> None:
    whole = DISTRIBUTIONS[law](KEY, shape)
    one = (1, *shape[1:])  # signs of a row are not those of a vector
    for number, part in enumerate(whole):
        found = DISTRIBUTIONS[law](KEY, one, places(one, number))
        np.testing.assert_array_equal(found[0], part)


def test_places_beyond_32_bits() -> None:
    """Of a stack of 80 matrices 8192 x 29568, as in a model of 72B."""
    size, part = 8192 * 29568, np.array([1, 17, 18, 79])
    place = places((3,), part[:, None], size, size - 2)
    exact = part[:, None] * size + size - 2 + np.arange(3)
    assert exact.max() > 2**34
    found = np.asarray(place.high).astype(np.uint64) << np.uint64(32)
    found += np.asarray(place.low)
    np.testing.assert_array_equal(found, exact)


def test_places_are_those_of_jax_beyond_32_bits() -> None:
    """jax's own counters have a high and a low word, of which it hashes both."""
    first, second = jax.random.key_data(KEY)
    high, low = jnp.uint32([0, 1, 3]), jnp.uint32([7, 7, 2**32 - 1])
    pair = jnp.stack([first, second])
    expected = [
        np.bitwise_xor(*jax.extend.random.threefry_2x32(pair, jnp.stack([h, w])))
        for h, w in zip(high, low, strict=True)
    ]
    np.testing.assert_array_equal(bits_at(KEY, Place(high, low)), expected)


def test_other_generators_have_no_places() -> None:
    with pytest.raises(TypeError, match="threefry"):
        bits_at(jax.random.key(0, impl="rbg"), places((3,)))


@pytest.mark.parametrize(
    ("law", "dtype"),
    slow_except(
        {("normal", "float32"), ("table", "bfloat16")},
        itertools.product(DISTRIBUTIONS, ["float32", "bfloat16"]),
    ),
)
def test_members_are_those_of_the_default(law: str, dtype: str) -> None:
    """Bit for bit, of the embedded model."""
    params = jes.load("tiny").params
    noise = Noise(sigma=0.02, antithetic=True, distribution=law)
    members, lazy = both(params, noise, dtype)
    lazy_noise = lazy.variables["noise"]
    kinds = jax.tree.map(
        type, lazy_noise, is_leaf=lambda x: isinstance(x, LazyNoise | MemberWeight)
    )
    assert (
        kinds["embed"]["embedding"]
        is kinds["layers"]["mlp"]["up"]["kernel"]
        is LazyNoise
    )
    assert kinds["layers"]["attention"]["q"]["bias"] is MemberWeight
    assert kinds["final_norm"]["scale"] is MemberWeight

    def full(
        path: tuple, weight: jax.Array, noise: LazyNoise | MemberWeight
    ) -> jax.Array:
        stacked = path[0].key == "layers"
        one = jax.vmap(member_weight) if stacked else member_weight
        return jax.vmap(lambda noise: one(weight, noise))(noise)

    found = jax.jit(jax.tree_util.Partial(jax.tree_util.tree_map_with_path, full))(
        params, lazy_noise
    )
    jax.tree.map(np.testing.assert_array_equal, found, members.variables["params"])


KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "vocab_size": 47},
}


@pytest.mark.parametrize(
    "kind",
    slow_except({"tied"}, KINDS),
)
def test_likelihoods_are_those_of_members(kind: str) -> None:
    """With a number of words that no number of blocks divides, too."""
    model, params = decoder_of(**KINDS[kind])
    batch = pack_choices(PROMPTS, [[[1], [2, 3]]] * 3, (16,))
    members, lazy = both(params, Noise(sigma=0.1))
    np.testing.assert_allclose(
        log_likelihoods(model, lazy, batch),
        log_likelihoods(model, members, batch),
        rtol=1e-5,  # in blocks, products are summed in another order
    )


@pytest.mark.slow
def test_answers_are_those_of_members() -> None:
    model, params = decoder_of(num_hidden_layers=2)
    members, lazy = both(params, Noise(sigma=0.1))
    batch, sampling = pad(PROMPTS, (8,)), Sampling(max_new_tokens=5)
    expected = decode(model.unrolled(), unrolled(model, members), batch, sampling)
    found = decode(model, lazy, batch, sampling)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def evaluations() -> dict[str, Evaluation]:
    pretrained = jes.load("tiny")
    task = jes.tasks.load_task(
        "tiny/max", root="", seed=0, train_examples=8, test_examples=4
    )
    return {
        draw: Evaluation(
            model=pretrained.model,
            tokenizer=pretrained.tokenizer,
            task=task,
            sampling=Sampling(eos_ids=pretrained.eos_ids),
            buckets=(24,),
            draw=draw,
        )
        for draw in ("member", "layer")
    }


@pytest.mark.parametrize(
    ("mode", "devices"),
    slow_except(
        {("likelihood", 1)}, [("generate", 1), ("likelihood", 1), ("likelihood", 2)]
    ),
)
def test_members_earn_the_same(
    mode: str, devices: int, evaluations: dict[str, Evaluation]
) -> None:
    params = jes.load("tiny", mesh=make_mesh(1, jax.devices()[:devices])).params
    scores = []
    for each in evaluations.values():
        each = dataclasses.replace(each, mode=mode)
        asked = prepare(each, each.task.train)
        settings = {"noise": Noise(sigma=0.03), "population": 5, "chunk": 2}
        scores.append(ask(each, params, KEY, asked, **settings))
        # The centre itself, which has no noise to draw.
        assert examine(each, params, asked).accuracy == 1
    expected, found = scores
    assert len(np.unique(expected.reward)) > 1
    np.testing.assert_equal(found, expected)


@pytest.mark.slow
def test_one_layer_is_there_at_a_time() -> None:
    """What the compiler sets aside, over what it does for the centre alone."""
    model, params = decoder_of(
        num_hidden_layers=24, hidden_size=64, intermediate_size=512
    )
    batch = pack_choices(PROMPTS, [[[1], [2]]] * 3, (16,))
    _, lazy = both(params, Noise(sigma=0.1))

    def scratch(members: Members) -> int:
        program = log_likelihoods.lower(model, members, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"])) / 24
    alone = scratch(unperturbed(params))
    found = scratch(lazy)
    # Three members' layer, and as much again beside it; not 24 layers of each.
    assert found < alone + 2 * 3 * layer


@pytest.mark.slow
def test_a_run_is_the_same(
    tmp_path: Path, small_model: Path, finished_run: Path
) -> None:
    config = get_config(str(small_model))
    config.draw = "layer"
    train.run(config, tmp_path)
    assert outcome(tmp_path).fingerprint == outcome(finished_run).fingerprint


def test_settings_that_no_run_can_have(tmp_path: Path, small_model: Path) -> None:
    config = get_config(str(small_model))
    config.draw = "token"
    with pytest.raises(InputError, match="draw must be one of"):
        train.run(config, tmp_path / "one")
    config.update({"draw": "layer", "quantize": "w8a8", "rounding": "residual"})
    with pytest.raises(InputError, match="float models with noise of full rank"):
        train.run(config, tmp_path / "two")
