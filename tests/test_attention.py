"""Attention in blocks is attention at once; what it holds; prompts read by parts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoder import decoder, weights_of

import jes
from jes.models import attention
from jes.models.attention import Attended, Place, attend, attend_at_once, sees
from jes.sampling import generate


def case(
    rows: int, queries: int, slots: int, heads: tuple[int, int] = (2, 3)
) -> tuple[Any, ...]:
    """Random arrays; the last `queries` of `slots` tokens ask, of two texts a row."""
    rng = np.random.default_rng(queries)
    shared, grouped = heads
    q = rng.normal(size=(rows, queries, shared, grouped, 8)) * 8**-0.5
    keys = rng.normal(size=(rows, shared, 8, slots))
    values = rng.normal(size=(rows, shared, slots, 8))
    positions = np.tile(np.arange(slots), (rows, 1))
    positions[0, :3] = -1  # padding
    # A trunk, two branches of it, and another text.
    segments = np.sort(rng.integers(0, 4, (rows, slots)))
    trunks = np.where(segments == 2, 0, segments)
    trunks = np.where(segments == 1, 0, trunks)
    places = [jnp.asarray(x) for x in (positions, segments, trunks)]
    own = Place(*(x[:, -queries:] for x in places))
    return *map(jnp.float32, (q, keys, values)), own, Place(*places)


@pytest.mark.parametrize("sizes", [(2, 50, 50), (1, 33, 50), (2, 64, 64), (1, 1, 40)])
def test_blocks_give_what_all_scores_give(sizes: tuple[int, int, int]) -> None:
    q, keys, values, own, seen = case(*sizes)
    expected = attend_at_once(q, keys, values, sees(own, seen))
    for causal in {False, sizes[1] == sizes[2]}:
        found = attention.attend_in_blocks(
            q, keys, values, own, seen, causal=causal, block=16
        )
        known = np.asarray(sees(own, seen).any(-1))  # a row of padding sees nothing
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[known], other[known], atol=2e-6)


def test_gradients_go_through_blocks() -> None:
    q, *rest = case(1, 48, 48)

    def total(function: Any, q: jax.Array) -> jax.Array:
        return (function(q, *rest).values[:, 8:] ** 2).sum()

    blocks = partial(attention.attend_in_blocks, causal=True, block=16)

    def plain(q: jax.Array, keys: Any, values: Any, *places: Place) -> Attended:
        return attend_at_once(q, keys, values, sees(*places))

    found, expected = (jax.grad(partial(total, f))(q) for f in (blocks, plain))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_prefix_is_more_keys(queries: int) -> None:
    q, keys, values, own, seen = case(2, queries, 40)
    shared = jnp.float32(np.random.default_rng(1).normal(size=(2, 1, 2, 8, 5)))
    before = jnp.arange(5)[None]
    after = [Place(place.position + 5) for place in (own, seen)]
    prefix = shared[0], shared[1].swapaxes(2, 3), before
    found = attend(q, keys, values, *after, prefix)
    both = [jnp.broadcast_to(x, (2, *x.shape[1:])) for x in prefix]
    expected = attend(
        q,
        jnp.concatenate([both[0], keys], -1),
        jnp.concatenate([both[1], values], -2),
        after[0],
        Place(jnp.concatenate([both[2], after[1].position], 1)),
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_memory_is_linear_in_length() -> None:
    """By the compiler: what 8 heads hold beside queries, keys, values and sums."""

    def held(length: int) -> int:
        heads = jax.ShapeDtypeStruct((1, length, 2, 4, 64), jnp.float32)
        keys = jax.ShapeDtypeStruct((1, 2, 64, length), jnp.float32)
        values = jax.ShapeDtypeStruct((1, 2, length, 64), jnp.float32)
        place = Place(jax.ShapeDtypeStruct((1, length), jnp.int32))
        run = jax.jit(partial(attend, causal=True))
        lowered = run.lower(heads, keys, values, place, place)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one, four = held(1024), held(4096)
    assert four < 4.5 * one
    assert four < 8 * 4096 * 4096 * 4 / 8  # an eighth of the scores


def test_long_texts_are_read_in_blocks_as_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the whole model: 400 tokens, with padding, from a cache, and in the layers."""
    model = decoder()
    params = weights_of(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 400)))
    positions = jnp.stack([jnp.arange(400), jnp.maximum(jnp.arange(400) - 30, -1)])
    apply = partial(model.apply, {"params": params})
    logits, _ = apply(tokens, positions)
    _, cache = apply(tokens[:, :100], positions[:, :100])
    later, _ = apply(tokens[:, 100:], positions[:, 100:], cache.extended(300))
    monkeypatch.setattr(attention, "CPU_BLOCK", 4096)
    expected, _ = model.clone().apply({"params": params}, tokens, positions)
    np.testing.assert_allclose(logits[0], expected[0], atol=3e-5)
    np.testing.assert_allclose(logits[1, 30:], expected[1, 30:], atol=3e-5)
    np.testing.assert_allclose(later[0], expected[0, 100:], atol=3e-5)


@pytest.mark.parametrize("prompts", [6, 7])
def test_prompts_are_read_by_parts_as_at_once(
    prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = jes.load("tiny")
    rng = np.random.default_rng(3)
    texts = [rng.integers(4, 60, n).tolist() for n in rng.integers(3, 16, prompts)]
    run = partial(jes.generate, pretrained.model, pretrained.params, texts, 6)
    expected = run()
    monkeypatch.setattr(generate, "AT_ONCE", 32)
    generate.decode.clear_cache()
    assert run() == expected
    generate.decode.clear_cache()
