"""Noise of low rank: its law, its estimates, members of the model, and runs with it."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow_except
from random_checkpoint import write_checkpoint
from small_run import SHAPE, get_config, outcome, rows

import jes
from jes import train
from jes.config import default, freeze
from jes.core import ledger as ledgers
from jes.core.codes import pack
from jes.core.evolution import Evolution
from jes.core.low_rank import LowRank, draw_low_rank
from jes.core.members import Members
from jes.core.mesh import make_mesh, replicated
from jes.core.noise import (
    DISTRIBUTIONS,
    PyTree,
    generation_key,
    leaf_noise,
    perturb_member,
)
from jes.core.population import (
    draw_factors,
    draw_members,
    draw_overlays,
    perturb_members,
)
from jes.core.stack import has_matrices
from jes.errors import InputError
from jes.export import evolution_of, rebuild
from jes.models.member_layers import thin_product
from jes.models.shapes import QWEN2, QWEN3
from jes.models.weights import Pretrained, fingerprint
from jes.sampling.generate import Sampling, decode, unrolled, unrolled_params
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.prompts import share
from jes.update import first_state, tell

KEY = jax.random.key(11)
ROWS, COLUMNS = 6, 5
DRAWS = 100_000


@pytest.fixture(scope="module", params=[(1, "normal"), (4, "normal"), (2, "table")])
def drawn(request: pytest.FixtureRequest) -> tuple[int, np.ndarray]:
    """A rank, and many matrices [DRAWS, ROWS, COLUMNS] of it."""
    rank, law = request.param

    def one(key: jax.Array) -> jax.Array:
        return draw_low_rank(key, (ROWS, COLUMNS), rank, DISTRIBUTIONS[law]).full()

    keys = jax.random.split(KEY, DRAWS)
    return rank, np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


def check_mean(samples: np.ndarray, expected: float) -> None:
    """Five standard errors, over independent draws on the first axis."""
    means = samples.reshape(DRAWS, -1).mean(1)
    error = means.std(ddof=1) / DRAWS**0.5
    assert abs(means.mean() - expected) < 5 * error
    assert 5 * error < 0.25 * max(1, expected)  # or it would say little


def test_entries_have_mean_0_variance_1_and_no_correlation(
    drawn: tuple[int, np.ndarray],
) -> None:
    _, noise = drawn
    check_mean(noise, 0)
    check_mean(noise**2, 1)
    flat = noise.reshape(DRAWS, -1)
    correlation = flat.T @ flat / DRAWS
    off = correlation[~np.eye(ROWS * COLUMNS, dtype=bool)]
    # The variance of a product of two entries is at most 1 + 2/r.
    assert np.abs(off).max() < 5 * (3 / DRAWS) ** 0.5


def test_fourth_moments(drawn: tuple[int, np.ndarray]) -> None:
    """Of an entry 3 + 6/r, of two in a row or column 1 + 2/r, of any others 1."""
    rank, e = drawn
    check_mean(e**4, 3 + 6 / rank)
    check_mean(e[:, 0, :1] ** 2 * e[:, 0, 1:] ** 2, 1 + 2 / rank)
    check_mean(e[:, :1, 0] ** 2 * e[:, 1:, 0] ** 2, 1 + 2 / rank)
    check_mean(e[:, 0, :1] ** 2 * e[:, 1, 1:] ** 2, 1)
    check_mean(e[:, 0, :-1] * e[:, 0, 1:] * e[:, 1, :-1] * e[:, 1, 1:], 1 / rank)
    # Symmetric: no third moments, or a quadratic's estimate would have a bias.
    check_mean(e[:, 0, 0] * e[:, 0, 1] * e[:, 1, 0], 0)


def pairs() -> dict[str, tuple[PyTree, PyTree]]:
    """Factors that could depend on each other."""
    shape = (2, 300, 200)
    params = {"layers": {"up": jnp.zeros(shape), "down": jnp.zeros(shape)}}

    def member(number: int, generation: int = 0) -> PyTree:
        key, noise = generation_key(KEY, generation), jes.Noise(sigma=1.0, rank=4)
        drawn = draw_factors(params, key, jnp.array([number]), noise, "float32")
        return drawn["layers"]

    first, layer = member(0), member(0)["up"]
    return {
        "leaves": (first["up"], first["down"]),
        "members": (first["up"], member(1)["up"]),
        "generations": (first["up"], member(0, 1)["up"]),
        "layers": tuple(
            jax.tree.map(lambda leaf, i=i: leaf[:, i], layer) for i in (0, 1)
        ),
    }


def test_leaves_members_generations_and_layers_are_independent() -> None:
    for name, (left, right) in pairs().items():
        for one, other in zip(
            jax.tree.leaves(left), jax.tree.leaves(right), strict=True
        ):
            x, y = (np.asarray(each, np.float64).ravel() for each in (one, other))
            for power in (1, 2):
                correlation = np.corrcoef(x**power, y**power)[0, 1]
                assert abs(correlation) < 5 / x.size**0.5, name
    own = jax.tree.leaves(pairs()["leaves"][0])
    a, b = (np.asarray(each)[..., :200].ravel() for each in own)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / a.size**0.5


def test_the_key_contract_holds() -> None:
    """Factors by their definition; a stack's matrices, and vectors, by theirs."""
    noise = jes.Noise(sigma=0.1, rank=2, distribution="table")
    params = {
        "layers": {"up": jnp.zeros((3, 7, 4)), "norm": jnp.zeros((3, 7))},
        "head": jnp.zeros((7, 9)),
    }
    key = generation_key(jax.random.key(0), 3)
    found = draw_factors(params, key, jnp.array([5]), noise, "float32")
    member = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 3), 5)
    scale = np.float32(0.1)

    def of(path: str) -> jax.Array:
        return jax.random.fold_in(member, zlib.crc32(path.encode()))

    for layer in range(3):
        numbers = DISTRIBUTIONS["table"](
            jax.random.fold_in(of("layers/up"), layer), (2, 11)
        )
        own = found["layers"]["up"]
        np.testing.assert_array_equal(own.a[0, layer], numbers[:, :7])
        expected = scale * numbers[:, 7:] / 2**0.5
        np.testing.assert_allclose(own.b[0, layer], expected, rtol=1e-6)
    numbers = DISTRIBUTIONS["table"](jax.random.fold_in(of("head"), 0), (2, 16))
    np.testing.assert_array_equal(found["head"].a[0], numbers[:, :7])
    full = scale * DISTRIBUTIONS["table"](of("layers/norm"), (3, 7))
    np.testing.assert_array_equal(found["layers"]["norm"][0], full)
    member_weights = perturb_member(params, key, jnp.int32(5), noise)
    for path in (("layers", "up"), ("layers", "norm"), ("head",)):
        own, weights = found, member_weights
        for name in path:
            own, weights = own[name], weights[name]
        dense = own.full() if isinstance(own, LowRank) else own
        np.testing.assert_allclose(dense[0], weights, rtol=1e-5, atol=1e-7)


def test_what_is_a_matrix() -> None:
    def path(name: str) -> tuple[Any, ...]:
        return tuple(map(jax.tree_util.DictKey, name.split("/")))

    assert has_matrices(path("layers/up/kernel"), (3, 4, 5))
    assert not has_matrices(path("layers/up/bias"), (3, 5))
    assert has_matrices(path("embed/embedding"), (9, 4))
    assert not has_matrices(path("final_norm/scale"), (4,))


SEEDS, MEMBERS, SIGMA = 4000, 16, 0.3
SLOPE = jnp.linspace(-1.0, 1.0, ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 0.1
CURVATURE = jnp.linspace(0.5, 2.0, ROWS * COLUMNS).reshape(ROWS, COLUMNS)


def linear(weights: jax.Array) -> jax.Array:
    return (SLOPE * weights).sum()


def quadratic(weights: jax.Array) -> jax.Array:
    """With products of neighbours in a row and in a column too."""
    mixed = (weights[:, 1:] * weights[:, :-1]).sum() + weights[0, 0] * weights[1, 0]
    return -0.5 * (CURVATURE * (weights - SLOPE) ** 2).sum() + 0.3 * mixed


def estimates(reward: Any, noise: jes.Noise, at: float = 0.0) -> np.ndarray:
    """Descent directions at a matrix of equal entries: float64 [SEEDS, ...]."""
    transform = jes.es_gradient(noise, shaping="none")
    params = {"w": jnp.full((ROWS, COLUMNS), at)}

    def one(seed: jax.Array) -> jax.Array:
        key = generation_key(jax.random.key(7), seed)
        draw = jax.vmap(perturb_member, in_axes=(None, None, 0, None))
        members = draw(params, key, jnp.arange(MEMBERS), noise)
        values = jax.vmap(reward)(members["w"])
        zeros = optax.tree.zeros_like(params)
        return transform.update(zeros, None, key=key, fitness=values)[0]["w"]

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(SEEDS)), np.float64)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("reward", [linear, quadratic])
@pytest.mark.parametrize("rank", [1, 3])
def test_mean_of_the_estimate_is_that_of_full_rank(
    reward: Any, antithetic: bool, rank: int
) -> None:
    """E[g] = -σ∇J, of a quadratic too: third moments are 0, and E[E_ij E_kl] δ."""
    noise = jes.Noise(sigma=SIGMA, rank=rank, antithetic=antithetic)
    found = estimates(reward, noise, 0.2)
    expected = -SIGMA * np.asarray(jax.grad(reward)(jnp.full((ROWS, COLUMNS), 0.2)))
    z = (found.mean(0) - expected) / (found.std(0, ddof=1) / SEEDS**0.5)
    # 30 coordinates: max |z| of 30 standard normals exceeds 4.2 once in 1200 seeds.
    assert np.abs(z).max() < 4.2
    assert 0.5 < z.std() < 1.5


def test_length_and_cosine_of_the_estimate() -> None:
    r"""On a linear reward, against theory and against full rank.

    :math:`E|g|^2 = \sigma^2 |G|^2 (1 + (d + 1 + 2 (I + O + 1) / r) / N)`, from the
    fourth moments; of full rank without the last term. The cosine falls with it.
    """
    gradient = np.asarray(SLOPE, np.float64)
    cosines = {}
    for rank in (0, 1, 4):
        found = estimates(linear, jes.Noise(sigma=SIGMA, rank=rank))
        lengths = (found**2).sum((1, 2))
        extra = 2 * (ROWS + COLUMNS + 1) / rank if rank else 0
        theory = 1 + (ROWS * COLUMNS + 1 + extra) / MEMBERS
        theory *= SIGMA**2 * (gradient**2).sum()
        error = lengths.std(ddof=1) / SEEDS**0.5
        assert abs(lengths.mean() - theory) < 5 * error, rank
        along = -(found * gradient).sum((1, 2)) / (gradient**2).sum() ** 0.5
        cosines[rank] = (along / lengths**0.5).mean()
    assert cosines[1] < cosines[4] < cosines[0]
    # 30 entries are few: the terms of rank 1 are 24 / 16 beside 1 + 31 / 16.
    assert cosines[1] > 0.8 * cosines[0]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_estimate_is_of_the_noise_that_members_have(
    antithetic: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever blocks the members are summed in, of which the last is not full."""
    from jes.transforms import _es_gradient as module

    noise = jes.Noise(sigma=0.1, antithetic=antithetic, rank=2)
    params = {
        "layers": {"w": jnp.zeros((3, 4, 5)), "scale": jnp.zeros((3, 4))},
        "head": jnp.zeros((4, 5)),
    }
    monkeypatch.setattr(module, "AT_ONCE", at_once * 2 * 9)
    values = jnp.array([0.3, 0.1, 0.7, 0.4, jnp.nan, 0.2])
    transform = jes.es_gradient(noise, shaping="centered_rank")
    found, _ = transform.update(params, None, key=KEY, fitness=values)
    shaped = np.asarray(jes.shape_fitness(values, "centered_rank"))
    members = [perturb_member(params, KEY, jnp.int32(m), noise) for m in range(6)]
    expected = jax.tree.map(
        lambda *each: -sum(v * e for v, e in zip(shaped, each, strict=True)) / 5 / 0.1,
        *members,
    )
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_ties_change_nothing_at_all() -> None:
    evolution = Evolution(population=8, sigma=0.1, alpha=0.5, rank=2)
    params = {"layers": {"w": jnp.ones((2, 30, 20))}}
    before = jax.tree.map(np.array, params)
    state = first_state(evolution, params)
    after, _ = tell(evolution, params, state, KEY, jnp.full(8, 0.1))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("decay", ["none", "l2"])
def test_updates_have_the_same_bits_on_several_devices(decay: str) -> None:
    evolution = Evolution(
        population=12,
        sigma=0.1,
        alpha=0.1,
        rank=3,
        decay=decay,
        decay_coefficient=0.5 if decay == "l2" else 0.0,
    )
    rng = np.random.default_rng(0)
    start = {
        "layers": {"w": rng.normal(size=(2, 96, 160)), "b": rng.normal(size=(2, 7))},
        "head": rng.normal(size=(96, 300)),
    }
    start = jax.tree.map(np.float32, start)
    fitness = jnp.float32(rng.normal(size=12))

    def moved(mesh: Any) -> PyTree:
        params = replicated(jax.tree.map(jnp.array, start), mesh)
        anchor = jax.tree.map(lambda leaf: 0.9 * leaf, params)
        if decay == "none":
            anchor = None
        state = first_state(evolution, params)
        return tell(evolution, params, state, KEY, fitness, anchor)[0]

    alone, apart = moved(None), moved(make_mesh(devices=jax.devices()[:2]))
    jax.tree.map(np.testing.assert_array_equal, apart, alone)


def test_an_update_holds_no_matrix_a_member() -> None:
    """Temporary memory: factors, and single matrices; not more for more members."""
    leaves = {"layers": {"w": jnp.zeros((8, 512, 512))}}

    def temporary(n: int) -> int:
        transform = jes.es_gradient(jes.Noise(sigma=0.1, rank=4))

        def update(key: jax.Array, values: jax.Array) -> PyTree:
            return transform.update(leaves, None, key=key, fitness=values)[0]

        compiled = jax.jit(update).lower(jax.random.key(0), jnp.ones(n)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1024) <= temporary(256) + 16 * 1024
    assert temporary(1024) <= 8 * 512 * 512 * 4


def model_of(folder: Path, base: dict[str, Any], tied: bool) -> Pretrained:
    shape = base | SHAPE | {"vocab_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    shape["tie_word_embeddings"] = tied
    write_checkpoint(folder, shape, dtype="float32", seed=0)
    return jes.load(folder)


COMMON = list(range(3, 51))
PROMPTS = [[*COMMON, 8, 9, 10], [*COMMON, 11], [*COMMON, 12, 13]]


BASES = {"qwen2": (QWEN2, True, 1), "qwen3": (QWEN3, False, 3)}
Materialised = tuple[Pretrained, Members, Members]


@pytest.fixture(
    scope="module",
    params=slow_except({"qwen2"}, BASES),
)
def materialised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Materialised:
    """A model, members with factors, and the same members with weights of their own."""
    base, tied, rank = BASES[request.param]
    pretrained = model_of(tmp_path_factory.mktemp("model"), base, tied)
    noise, numbers = jes.Noise(sigma=0.05, rank=rank), jnp.arange(3)
    thin = perturb_members(pretrained.params, KEY, numbers, noise)
    weights = draw_members(pretrained.params, KEY, numbers, noise, "float32")
    return pretrained, thin, Members({"params": weights}, thin.keys)


@pytest.mark.parametrize("cached", slow_except({False}, [False, True]))
def test_logits_of_members_are_the_materialised_ones(
    cached: bool, materialised: Materialised
) -> None:
    pretrained, thin, full = materialised
    model = pretrained.model
    tokens = jax.random.randint(KEY, (2, 7), 0, 64)

    def apply(variables: PyTree) -> jax.Array:
        if not cached:
            return model.apply(variables, tokens)[0]
        _, cache = model.apply(variables, tokens[:, :6])
        return model.apply(variables, tokens[:, 6:], cache=cache.extended(1))[0]

    low, dense = (
        np.asarray(jax.jit(jax.vmap(apply, (each.axes,)))(each.variables))
        for each in (thin, full)
    )
    centre = np.asarray(apply({"params": pretrained.params}))
    assert np.abs(dense - centre).max() > 0.3
    np.testing.assert_allclose(low, dense, rtol=1e-4, atol=2e-5)


def test_answers_of_members_are_the_materialised_ones(
    materialised: Materialised,
) -> None:
    pretrained, thin, full = materialised
    model, params = pretrained.model, pretrained.params
    batch = share(PROMPTS, (64,), parts=(4, 48))
    assert batch.prefix is not None
    shared = thin.replace(params=unrolled_params(model, params))
    low, dense = (
        decode(
            model.unrolled(), unrolled(model, each), batch, Sampling(max_new_tokens=8)
        )
        for each in (shared, full)
    )
    np.testing.assert_array_equal(low, dense)
    assert len(np.unique(np.asarray(low).reshape(3, -1), axis=0)) == 3


@pytest.mark.slow
def test_likelihoods_of_members_are_the_materialised_ones(
    materialised: Materialised,
) -> None:
    pretrained, thin, full = materialised
    choices = pack_choices(PROMPTS, [[[3], [4, 5]]] * 3, (64,), (16, 48))
    assert choices.texts.prefix is not None
    low, dense = (
        log_likelihoods(pretrained.model, each, choices) for each in (thin, full)
    )
    np.testing.assert_allclose(low, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_members_answer_in_bfloat16(tmp_path: Path) -> None:
    """The thin products too, with sums in float32."""
    pretrained = model_of(tmp_path, QWEN2, tied=True)
    noise = jes.Noise(sigma=0.05, rank=2)
    own = draw_factors(pretrained.params, KEY, jnp.arange(2), noise, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype("bfloat16")}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pretrained.params)
    tokens = jax.random.randint(KEY, (2, 7), 0, 64)

    def logits(params: PyTree, own: PyTree) -> jax.Array:
        variables = {"params": params, "noise": own}
        return jax.vmap(
            lambda own: pretrained.model.apply(variables | {"noise": own}, tokens)[0]
        )(own)

    exact = logits(
        pretrained.params, jax.tree.map(lambda leaf: leaf.astype("float32"), own)
    )
    rounded = logits(half, own)
    assert rounded.dtype == jnp.float32
    spread = float(jnp.abs(exact).max())
    # Two layers of products rounded to 8 bits, 2^-9 each.
    assert float(jnp.abs(rounded - exact).max()) < 0.03 * spread


def test_settings_that_no_run_can_have(small_model: Path) -> None:
    config = get_config(str(small_model))
    assert freeze(config).evolution.noise.rank == 0
    config.rank = -1
    with pytest.raises(InputError, match="rank cannot be negative: -1"):
        freeze(config)
    config.rank, config.rounding = 1, "replay"
    with pytest.raises(InputError, match="rank=1 is for float models"):
        freeze(config)
    codes = {"w": pack(jnp.full((4, 6), 8), bits=4)}
    noise = jes.Noise(sigma=0.1, rank=1)
    with pytest.raises(ValueError, match="low rank is for weights of floats"):
        draw_overlays(codes, KEY, jnp.arange(2), noise)


def test_noise_of_a_leaf_has_the_rank_that_it_should() -> None:
    path = (jax.tree_util.DictKey("layers"), jax.tree_util.DictKey("w"))
    for rank in (0, 1):
        drawn = leaf_noise(KEY, path, (2, 4, 5), jes.Noise(sigma=1.0, rank=rank))
        ranks = np.linalg.matrix_rank(np.asarray(drawn))
        assert ranks.tolist() == [rank or 4] * 2


@pytest.fixture(scope="module")
def low_rank_run(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path
) -> tuple[Any, Path]:
    config = get_config(str(small_model))
    config.rank = 2
    workdir = tmp_path_factory.mktemp("runs") / "low"
    train.run(config, workdir)
    return config, workdir


def test_a_run_trains_and_replays(
    low_rank_run: tuple[Any, Path], finished_run: Path
) -> None:
    _, workdir = low_rank_run
    ledger = ledgers.read(workdir / "ledger.jsonl")
    assert ledger.header["evolution"]["rank"] == 2
    assert fingerprint(rebuild(ledger).params) == outcome(workdir).fingerprint
    assert outcome(workdir).fingerprint != outcome(finished_run).fingerprint
    last = rows(workdir / "metrics.jsonl")[-1]
    # Variance 1, so the same law of drift. Entries share factors: of 12,000 weights
    # less is averaged out than of independent ones.
    law = last["displacement_norm_drift"]
    assert last["displacement_norm"] == pytest.approx(law, rel=0.1)
    del ledger.header["evolution"]["rank"]
    assert evolution_of(ledger).noise.rank == 0


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_it_learns(tmp_path: Path) -> None:
    """Twelve generations of the embedded model on `tiny/min`, from 18 %."""
    config = tiny_min()
    train.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["evaluations"]["tiny/min"]
    # Of 512 examples a share has a standard error of 2 %.
    assert found["examples"] == 512
    assert found["after"] > found["before"] + 0.06


def tiny_min() -> Any:
    config = default()
    config.task = "tiny/min"
    config.rank = 1
    config.population = 16
    config.prompts = 64
    config.generations = 12
    config.sigma = config.alpha = 0.02
    config.eval_every = 100
    config.data.test_examples = 512
    return config


@pytest.mark.parametrize("width", [16, 48, 896])
def test_the_product_of_one_token_with_a_factor(width: int) -> None:
    """Summed by halves on CPUs, as far as halves are even."""
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=s) for s in ((2, 1, width), (1, width), (1, 5)))
    found = jax.jit(thin_product)(*map(jnp.float32, (x, a, b)))
    np.testing.assert_allclose(found, x @ a.T @ b, rtol=1e-5, atol=1e-4)
