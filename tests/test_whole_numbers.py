"""Noise of one bit a weight, and updates in whole numbers: exact, the same anywhere."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

import jes
from jes import train
from jes.config import freeze
from jes.core import random, signs, whole_numbers
from jes.core.evolution import Evolution
from jes.core.noise import Noise, generation_key, leaf_key
from jes.errors import InputError
from jes.export import read_ledger, rebuild
from jes.transforms import anchored_weight_decay, es_gradient, whole_number_es
from jes.update import first_centre, first_state, replay, tell, weights_of

KEY = jax.random.key(3)


def defined(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """The definition: 32 rows share a word a column, which is that of the first row."""
    width = shape[-1] if len(shape) > 1 else 1
    words = np.asarray(jax.random.bits(key, (math.prod(shape) // width, width)))
    rows = [(words[r - r % 32] >> r % 32) & 1 for r in range(len(words))]
    return np.where(rows, 1.0, -1.0).astype(np.float32).reshape(shape)


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize(
    "shape", [(), (35,), (5, 7), (95, 3), (3, 64, 5), (3, 33, 5), (2, 2, 32, 4)]
)
def test_signs_are_the_bits_of_words(shape: tuple[int, ...], partitioned: bool) -> None:
    """Whole, and in parts of the first axis, of any size."""
    expected = defined(KEY, shape)
    place = random.places(shape, partitioned=partitioned)
    for found in (signs.sign(KEY, shape), signs.sign(KEY, shape, place)):
        np.testing.assert_array_equal(found, expected)
    for parts in (n for n in range(2, 1 + sum(shape[:1])) if shape[0] % n == 0):
        cut = (shape[0] // parts, *shape[1:])
        for i, part in enumerate(np.split(expected, parts)):
            place = random.places(cut, i, partitioned=partitioned)
            np.testing.assert_array_equal(signs.sign(KEY, cut, place), part)


def test_signs_of_rows_and_of_blocks() -> None:
    expected, rows = defined(KEY, (70, 6)), np.array([[3, 40], [69, 0]])
    place = random.places((6,), jnp.asarray(rows)[..., None])
    found = signs.sign(KEY, (2, 2, 6), place)
    np.testing.assert_array_equal(found, expected[rows])
    place = random.places((3,), jnp.arange(9, 41)[:, None], 6, start=2)
    found = signs.sign(KEY, (32, 3), place)
    np.testing.assert_array_equal(found, expected[9:41, 2:5])


def test_arrays_beyond_32_bits_are_drawn_by_parts() -> None:
    """Traced alone: 2^32 numbers are 17 GB."""
    shape = (2**9, 2**13, 2**10)
    found = jax.eval_shape(lambda: signs.sign(KEY, shape))
    assert found.shape == shape
    part = (2**13, 2**10)

    def last(rows: int) -> jax.Array:
        place = random.places(part, shape[0] - 1)
        words, _ = signs.layout(part, place)
        return random.bits_at(KEY, words)[-1, 0, :rows]

    # The place of the first row of the last group, counted in 64 bits.
    place = math.prod(shape) - 32 * part[1] + np.arange(4)
    high, low = (np.uint32(x) for x in (place >> 32, place & 0xFFFFFFFF))
    expected = random.bits_at(KEY, random.Place(jnp.asarray(high), jnp.asarray(low)))
    np.testing.assert_array_equal(last(4), expected)


def test_signs_are_independent() -> None:
    """Between rows of a group, columns, leaves and members; z-scores of 160 sums."""
    noise = Noise(sigma=1.0, distribution="sign")
    params = {"a": jnp.zeros((64, 4000)), "b": jnp.zeros((64, 4000))}
    one, two = (jes.perturb(params, jax.random.key(n), 1.0, noise) for n in (0, 1))
    rows = np.stack([one["a"], one["b"], two["a"]]).reshape(-1, 4000)[::5]
    products = rows @ rows.T / math.sqrt(rows.shape[1])
    others = products[~np.eye(len(rows), dtype=bool)]
    assert np.abs(others).max() < 5
    assert abs(others.std() - 1) < 0.05
    means = rows.mean(1) * math.sqrt(rows.shape[1])
    assert np.abs(means).max() < 4.5
    assert {-1.0, 1.0} == {*np.unique(rows)}


@pytest.mark.parametrize("population", [2, 5, 30, 1000])
@pytest.mark.parametrize("alpha", [5e-4, 0.02, 2.0**-9])
def test_the_unit_is_the_least_that_16_bits_have_room_for(
    alpha: float, population: int
) -> None:
    unit = whole_numbers.unit_for(alpha, population)
    assert math.frexp(unit)[0] == 0.5
    largest = alpha / (population * unit) * math.sqrt(population)
    assert 2**14 < largest <= 2**15
    one = np.zeros(population, np.float32)
    one[0] = 1
    found = whole_numbers.whole_fitness(one, "zscore", alpha / unit)
    assert found[0] == pytest.approx(largest * math.sqrt(1 - 1 / population), rel=1e-3)


@pytest.mark.parametrize("shaping", ["zscore", "centered_rank", "pair_zscore", "none"])
def test_whole_fitness_is_shaped_fitness_rounded(shaping: str) -> None:
    rewards = np.random.default_rng(0).normal(size=64).astype(np.float32)
    rewards[[3, 9]] = np.nan, np.inf
    found = whole_numbers.whole_fitness(rewards, shaping, 62 * 1000.0)
    assert found.dtype == np.int32
    assert not found[[3, 9]].any()
    expected = 1000 * np.asarray(jes.shape_fitness(rewards, shaping))
    np.testing.assert_allclose(found, expected, atol=0.51)
    again = whole_numbers.whole_fitness(rewards[::-1], shaping, 62 * 1000.0)
    np.testing.assert_array_equal(again, found[::-1])
    tied = whole_numbers.whole_fitness(np.full(4, 0.1, np.float32), shaping, 1e6)
    assert not tied.any()
    huge = whole_numbers.whole_fitness(np.float32([1e9, -1e9, 0, 0]), "none", 1e6)
    assert huge.tolist() == [32767, -32767, 0, 0]


def test_decays_are_exact() -> None:
    rng = np.random.default_rng(1)
    displacement = rng.integers(-(2**31), 2**31, 1000)
    displacement[:4] = -(2**31), 2**31 - 1, 0, -1
    strength = rng.integers(0, 2**32, 1000, dtype=np.uint64)
    strength[4:6] = 0, 2**32 - 1
    given = jnp.asarray(displacement, jnp.int32), jnp.asarray(strength, jnp.uint32)
    size, sign = [abs(int(d)) for d in displacement], np.sign(displacement)
    pairs = list(zip(size, map(int, strength), strict=True))
    taken = {
        "l2": [(d * m + 2**31) >> 32 for d, m in pairs],
        "l1": [min(d, m) for d, m in pairs],
    }
    for kind, taken_off in taken.items():
        found = whole_numbers.pulled(*given, kind)
        expected = sign * (np.array(size) - np.array(taken_off))
        np.testing.assert_array_equal(found, expected)
    # α λ = 0.001 takes off a thousandth, to 2^-32.
    strength = whole_numbers.strength_of("l2", 0.001, 1.0)
    assert int(whole_numbers.pulled(jnp.int32(10**9), strength, "l2")) == 999_000_000
    assert int(whole_numbers.strength_of("l1", 0.5, 2.0**-10)) == 512


def test_displacements_saturate() -> None:
    most, least = 2**31 - 1, -(2**31)
    given = jnp.int32([most, most, least, least, 5, most])
    moves = jnp.int32([1, -1, -1, 1, -7, most])
    found = whole_numbers.add(given, moves).tolist()
    assert found == [most, most - 1, least, least + 1, -2, most]


def base() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    shapes = {"kernel": (2, 64, 24), "bias": (2, 7)}
    layers = {n: jnp.float32(rng.normal(size=shapes[n])) for n in shapes}
    table = jnp.float32(rng.normal(size=(50, 12)))
    return {"embed": {"embedding": table}, "layers": {"up": layers}}


def evolution(**changes: Any) -> Evolution:
    given = {"population": 6, "sigma": 0.1, "alpha": 0.05, "distribution": "sign"}
    return Evolution(**given | changes)


@pytest.mark.parametrize("antithetic", [False, True])
def test_an_update_is_the_sum_of_whole_numbers_in_any_order(antithetic: bool) -> None:
    chosen = evolution(antithetic=antithetic)
    fitness = np.float32([0.3, 0.1, 0.7, 0.2, 0.9, 0.4])
    centre, state = first_centre(chosen, base()), first_state(chosen, base())
    centre, _ = tell(chosen, centre, state, KEY, fitness)
    weights = whole_numbers.whole_fitness(
        fitness, "zscore", chosen.alpha / chosen.whole_unit
    )
    for path, found in jax.tree_util.tree_leaves_with_path(centre):
        total = np.zeros(found.shape, np.int64)
        for member in reversed(range(6)):
            key, sign = chosen.noise.direction(KEY, jnp.int32(member))
            drawn = defined(leaf_key(key, path), found.shape).astype(int)
            total += int(weights[member]) * int(sign) * drawn
        np.testing.assert_array_equal(found, total, strict=False)


@pytest.mark.parametrize(
    ("decay", "coefficient"), [("none", 0.0), ("l2", 0.5), ("l1", 0.02)]
)
def test_it_is_the_update_of_floats_but_for_rounding(
    decay: str, coefficient: float
) -> None:
    """After ten generations with a falling α, to 2e-5 of a step of 0.02."""
    chosen = evolution(
        alpha_half_life=4, decay=decay, decay_coefficient=coefficient, population=6
    )
    centre, state = first_centre(chosen, base()), first_state(chosen, base())
    params = base()
    rewards = np.random.default_rng(5).normal(size=(10, 6)).astype(np.float32)
    centre, _ = replay(chosen, centre, state, KEY, rewards)
    for number, fitness in enumerate(rewards):
        now = chosen.at(number)
        links = [es_gradient(now.noise), optax.scale_by_learning_rate(now.alpha)]
        if decay != "none":
            links.append(anchored_weight_decay(now.alpha, coefficient, base(), decay))
        optimizer = optax.chain(*links)
        updates, _ = optimizer.update(
            optax.tree.zeros_like(params),
            optimizer.init(params),
            params,
            key=generation_key(KEY, number),
            fitness=jnp.asarray(fitness),
        )
        params = optax.apply_updates(params, updates)
    found = weights_of(chosen, centre, base())
    for one, other in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    norm = whole_numbers.norm(centre, chosen.whole_unit)
    away = optax.tree.norm(jax.tree.map(jnp.subtract, params, base()))
    assert float(norm) == pytest.approx(float(away), rel=1e-4)


def test_the_base_is_what_has_not_moved() -> None:
    """Also the smallest floats, which some devices take for 0; in any dtype."""
    tiny = np.float32([1e-44, -1e-40, 0.1, -3.0])
    params, none = {"a": jnp.asarray(tiny)}, {"a": jnp.zeros(4, jnp.int32)}
    found = whole_numbers.displaced(params, none, 2.0**-20)["a"]
    assert np.asarray(found).tobytes() == tiny.tobytes()
    half = {"a": jnp.asarray(tiny, jnp.bfloat16)}
    moved = {"a": jnp.int32([2**20, 0, -(2**20), 0])}
    found = whole_numbers.displaced(half, moved, 2.0**-20)["a"]
    expected = np.asarray(half["a"], np.float32) + np.float32([1, 0, -1, 0])
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="noise 'sign' of full rank"):
        whole_number_es(Noise(sigma=1.0))
    with pytest.raises(ValueError, match="decay must be one of"):
        whole_number_es(Noise(sigma=1.0, distribution="sign"), "l3")
    chosen, fitness = evolution(), np.ones(6, np.float32)
    state = first_state(chosen, base())
    with pytest.raises(TypeError, match="a displacement is int32, not float32"):
        tell(chosen, base(), state, KEY, fitness)


HASHES = {
    "none": "bb9bfac7f3de41cb962a24ff8f5b8025569cce5555371a318f688fa5a88e2d4d",
    "l2": "bb35ea6bd0c55897b711bbd8afc9e09fa6ea02b31160ad47408bcb8fb9fb4f35",
    "l1": "f97b8403984640b78a841bba9d2d8c5c84bf3558540af754513c47b624540506",
}
"""Of weights after three updates: on any machine, by any version of JAX."""


@pytest.mark.parametrize(
    ("layouts", "flags"),
    [
        (["1/1/1048576/0", "1/1/64/0", "2/1/64/1"], ""),
        (["1/1/64/0"], "--xla_cpu_max_isa=SSE4_2"),
        pytest.param(
            ["4/1/256/1", "8/1/64/1", "4/2/64/0", "8/4/1048576/0"],
            "",
            marks=pytest.mark.slow,
        ),
        pytest.param(["1/1/64/0"], "--xla_cpu_max_isa=AVX512", marks=pytest.mark.slow),
    ],
)
def test_the_bits_are_the_same_anywhere(layouts: list[str], flags: str) -> None:
    folder = Path(__file__).parent
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, str(folder / "whole_number_updates.py"), *layouts],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [HASHES] * len(layouts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_model(tmp_path_factory.mktemp("whole") / "model")


def settings(model: Path, **changes: Any) -> Any:
    config = small_run.get_config(str(model))
    config.update({"noise": "sign", "decay": "l2", "decay_coefficient": 0.5})
    config.update(changes)
    return config


def test_a_run_goes_on_and_is_rebuilt(model: Path, tmp_path: Path) -> None:
    """From its checkpoint, from its ledger alone, and by `jes.export`."""
    whole = tmp_path / "whole"
    summary = train.run(settings(model), whole)
    rows = small_run.rows(whole / "ledger.jsonl")
    parts = tmp_path / "parts"
    train.run(settings(model, generations=3), parts)
    (parts / "summary.json").unlink()
    train.run(settings(model), parts)
    assert small_run.rows(parts / "ledger.jsonl")[-1] == rows[-1]
    rebuilt = rebuild(read_ledger(whole))
    saved = jes.load(whole / "model").params
    for one, other in zip(*map(jax.tree.leaves, (rebuilt.params, saved)), strict=True):
        np.testing.assert_array_equal(one, other)
    last = small_run.rows(whole / "metrics.jsonl")[-1]
    away = jes.distance(saved, jes.load(model).params).norm
    assert last["displacement_norm"] == pytest.approx(away, rel=1e-5)
    distances = small_run.rows(whole / "distances.jsonl")
    assert distances[-1]["norm"] == pytest.approx(away, rel=1e-5)
    assert summary["generations"] == 6


def test_layers_draw_the_same_signs(model: Path, tmp_path: Path) -> None:
    fitness = []
    for draw in ("member", "layer"):
        folder = tmp_path / draw
        train.run(settings(model, draw=draw, generations=2, anchor="host"), folder)
        rows = small_run.rows(folder / "ledger.jsonl")[1:]
        fitness.append([row["fitness"] for row in rows if "fitness" in row])
    assert fitness[0] == fitness[1]


def test_settings_that_do_not_go_together(model: Path) -> None:
    for changes, message in (
        ({"rank": 1}, "noise 'sign' is for method 'es' and full rank"),
        ({"method": "grpo", "decay": "none", "decay_coefficient": 0.0}, "for method"),
        ({"anchor": "none"}, "anchor='none' cannot"),
        ({"anchor": "bfloat16"}, "noise 'sign' moves whole numbers from an exact"),
    ):
        with pytest.raises(InputError, match=message):
            freeze(settings(model, **changes))
