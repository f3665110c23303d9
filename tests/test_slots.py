"""Rollouts in slots: the answers of the plain loop, with few rows at a time."""

import dataclasses
import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from marks import slow_except
from small_decoder import decoder, weights_of

import jes
from jes import rollout as asking
from jes import train
from jes.bench.cases import long_tailed
from jes.config import freeze
from jes.core.members import Members
from jes.core.mesh import make_mesh
from jes.core.noise import Noise
from jes.core.population import perturb_members
from jes.errors import InputError
from jes.models.cache import PADDING, Cache
from jes.quantize import quantize
from jes.questions import Evaluation, prepare
from jes.rollout import ask, examine
from jes.sampling import continuous_batching
from jes.sampling.continuous_batching import (
    Batching,
    Scheduler,
    decode_in_slots,
    read_in_slots,
)
from jes.sampling.generate import Sampling, decode, trim, unrolled
from jes.sampling.prompts import PromptBatch, pad, share
from jes.tasks.task import Reward, Task

MODEL = decoder()
RNG = np.random.default_rng(0)
SHOTS = RNG.integers(0, 50, 33).tolist()
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in RNG.integers(1, 9, 23)]
LONGEST = 40
LIMITS = np.stack([long_tailed(23, 4, 10, seed) for seed in range(2)])
KEYS = jax.random.split(jax.random.key(5), 2)


SAMPLING = Sampling(max_new_tokens=LONGEST, eos_ids=(7,))


@pytest.fixture(scope="module")
def members() -> Members:
    noise = Noise(sigma=0.05)
    drawn = perturb_members(weights_of(MODEL), jax.random.key(2), jnp.arange(2), noise)
    return unrolled(MODEL, dataclasses.replace(drawn, keys=KEYS))


def both(
    members: Members,
    prompts: PromptBatch,
    *,
    sampling: Sampling = SAMPLING,
    limits: Any = None,
    **batching: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Answers by continuous batching and by the plain loop."""
    plain = decode(MODEL.unrolled(), members, prompts, sampling, limits)
    few = decode_in_slots(
        MODEL.unrolled(),
        members,
        prompts,
        Batching(sampling=sampling, **batching),
        limits,
    )
    assert few.shape == plain.shape
    assert few.dtype == plain.dtype
    return few, np.asarray(plain)


@pytest.mark.parametrize(("slots", "slice_tokens"), [(1, 40), (5, 1), (22, 16)])
def test_answers_are_those_of_the_plain_loop(
    members: Members, slots: int, slice_tokens: int
) -> None:
    prompts = pad(PROMPTS, (8,))
    got, expected = both(
        members, prompts, slots=slots, slice_tokens=slice_tokens, limits=LIMITS
    )
    np.testing.assert_array_equal(got, expected)
    lengths = [len(row) for member in got for row in trim(member, (7,))]
    assert len(set(lengths)) > 5
    assert (got[0] != got[1]).any()


@pytest.mark.parametrize("common", [0, 33])
def test_prompts_of_like_length_are_read_together(
    members: Members, monkeypatch: pytest.MonkeyPatch, common: int
) -> None:
    """The longest first; what is read is what is said, and the answers are the same."""
    lengths = RNG.integers(3, 96, 21)
    texts = [
        [*SHOTS[:common], *RNG.integers(0, 50, n).tolist()] for n in (*lengths, 96)
    ]
    prompts, read = share(texts, (160,), parts=(40, 104)), []
    assert (prompts.prefix is None) == (common == 0)

    def counted(model: Any, members: Any, admitted: Any, *rest: Any) -> Any:
        read.append(admitted[0].shape[1:])
        return prefill(model, members, admitted, *rest)

    prefill = continuous_batching._prefill
    monkeypatch.setattr(continuous_batching, "_prefill", counted)
    one = dataclasses.replace(
        members, variables={"params": members.variables["params"]}, keys=KEYS[:1]
    )
    one = one.replace(params=jax.tree.map(lambda x: x[:1], one.variables["params"]))
    got, expected = both(one, prompts, slots=8, slice_tokens=9)
    np.testing.assert_array_equal(got, expected)
    widths = [width for _, width in read]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3
    rest = 0 if prompts.prefix is None else prompts.prefix.tokens.size
    tokens = read_in_slots(prompts, 8)
    assert sum(map(np.prod, read)) == tokens - rest
    assert tokens < 0.8 * prompts.tokens.size


def test_one_program_for_all_that_waits(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every limit on lengths, drawn answers, and as few programs as there are sizes."""
    reads = []

    def counted(scheduler: Scheduler) -> tuple:
        reads.append(scheduler.started.copy())
        return admit(scheduler)

    admit = Scheduler.admit
    monkeypatch.setattr(Scheduler, "admit", counted)
    programs = [
        getattr(continuous_batching, name)
        for name in ("_prefill", "_insert", "_decode_slice", "_take")
    ]
    for program in programs:
        program.clear_cache()
    sampling = dataclasses.replace(SAMPLING, temperature=1.3, top_k=20)
    run = partial(both, members, pad(PROMPTS, (8,)), slots=4, slice_tokens=3)
    run = partial(run, sampling=sampling)
    got, expected = run(limits=LIMITS)
    np.testing.assert_array_equal(got, expected)
    assert len(reads) > 23
    assert Scheduler(2, 23, 4).sizes == [4, 1]
    compiled = [program._cache_size() for program in programs]
    assert compiled == [1, 1, 2, 1]
    for limits in (
        [[LONGEST] * 23, [1] * 23],  # a member that ends early idles
        [[1] * 23] * 2,
        [[6] * 23, [1] * 23],
        LIMITS[:, ::-1],
        [[1] * 22 + [LONGEST], [2] * 23],
        [[LONGEST] + [2] * 22] * 2,
        [[3] * 23, [LONGEST] * 23],
    ):
        got, expected = run(limits=np.array(limits, np.int32))
        np.testing.assert_array_equal(got, expected)
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.parametrize("kind", slow_except({"full"}, ["full", "int4", "itself"]))
def test_a_prefix_is_read_once_per_member(kind: str) -> None:
    """And members may share params, of codes, and be all the same."""
    params = weights_of(MODEL)
    if kind != "full":
        params = quantize(params, bits=4, group_size=16)
    noise = Noise(sigma=0.05 if kind == "full" else 0.5)
    members = perturb_members(
        params, KEYS[0], jnp.arange(2), None if kind == "itself" else noise
    )
    batch = share([SHOTS + prompt for prompt in PROMPTS], (8, 16, 32, 48))
    assert batch.prefix is not None
    got, expected = both(
        unrolled(MODEL, members),
        batch,
        slots=3,
        slice_tokens=10,
        sampling=dataclasses.replace(SAMPLING, max_new_tokens=12),
        limits=LIMITS[[0, 0]],
    )
    np.testing.assert_array_equal(got, expected)
    assert (got[0] != got[1]).any() == (kind != "itself")


def test_no_slots_are_refused() -> None:
    for slots, slice_tokens in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Batching(sampling=SAMPLING, slots=slots, slice_tokens=slice_tokens)


def test_the_plain_loop_keeps_limits(members: Members) -> None:
    run = partial(decode, MODEL.unrolled(), members, pad(PROMPTS, (8,)), SAMPLING)
    free, cut = run(), np.asarray(run(LIMITS))
    kept = np.arange(LONGEST) < LIMITS[..., None]
    np.testing.assert_array_equal(cut, np.where(kept, free, 7))
    assert (cut != free).any()


def ring(rows: int, slots: int, fill: float) -> Cache:
    """Of one layer, with one key-value head of dimension 2."""
    return Cache(
        (jnp.full((rows, 1, 2, slots), fill),),
        (jnp.full((rows, 1, slots, 2), fill),),
        jnp.full((rows, slots), 3),
        jnp.int32(4),
    )


def test_new_rows_end_before_the_next_slot_and_leave_nothing_of_the_old() -> None:
    old, new = ring(3, 6, jnp.nan), ring(2, 2, 5.0)
    new = new._replace(positions=jnp.array([[PADDING, 0], [0, 1]]))
    got = jax.jit(Cache.with_rows)(old, new, jnp.array([2, 3]))
    assert got.positions[2].tolist() == [PADDING, PADDING, PADDING, 0, PADDING, PADDING]
    assert got.keys[0][2, 0].tolist() == [[0, 0, 5, 5, 0, 0]] * 2
    assert got.values[0][2, 0, :, 0].tolist() == [0, 0, 5, 5, 0, 0]
    assert np.isnan(got.keys[0][:2]).all()
    assert (got.positions[:2] == 3).all()
    assert int(got.length) == 4


def test_the_cache_is_not_copied(members: Members) -> None:
    """A slice works in the memory that it is given."""
    model, two = MODEL.unrolled(), np.zeros((2, 2), np.int32)
    prompts = pad(PROMPTS, (8,))
    admitted = prompts.tokens[two], prompts.positions[two], two + LONGEST, two
    new = continuous_batching._prefill(model, members, admitted, None, SAMPLING)
    rows = continuous_batching._empty(new, slots=16, ring=4096)
    bytes_of = sum(leaf.nbytes for leaf in (*rows.cache.keys, *rows.cache.values))
    batching = Batching(sampling=SAMPLING, slots=16, slice_tokens=8)
    stop = np.zeros(2, np.int32), np.zeros(2, np.int32)
    needed = (
        continuous_batching._decode_slice.lower(
            model, members, rows, None, stop, batching
        )
        .compile()
        .memory_analysis()
    )
    assert needed.alias_size_in_bytes > bytes_of
    # The scores of one layer, and no second cache.
    assert needed.temp_size_in_bytes < 0.4 * bytes_of


def counting(folder: Path, **settings: Any) -> tuple[Evaluation, dict]:
    """A task whose answers differ in length, and the weights."""
    loaded = jes.load(folder)
    task = Task(
        name="counting",
        train=tuple({"n": n} for n in range(14)),
        test=(),
        prompt=lambda row: f"sort {row['n'] * 7919}",
        reward=lambda example, text: Reward(
            len(text) + example["n"], "1" in text, False, False
        ),
        max_new_tokens=24,
    )
    evaluation = Evaluation(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        task=task,
        sampling=Sampling(eos_ids=loaded.eos_ids),
        **settings,
    )
    return evaluation, loaded.params


POPULATION = {"noise": Noise(sigma=0.05), "population": 4, "chunk": 2}


def test_members_score_the_same(small_model: Path) -> None:
    """On one device, on two, and with the model spread over two."""
    evaluation, params = counting(small_model)
    questions = prepare(evaluation, evaluation.task.train)
    few = dataclasses.replace(evaluation, slots=3, slice_tokens=5)
    key = jax.random.key(3)
    expected = ask(evaluation, params, key, questions, **POPULATION)
    assert len(set(expected.tokens)) > 1
    got = ask(few, params, key, questions, **POPULATION)
    np.testing.assert_equal(got, expected)
    for model_parallel in (1, 2):
        spread = jes.load(small_model, mesh=make_mesh(model_parallel)).params
        got = ask(few, spread, key, questions, **POPULATION)
        np.testing.assert_equal(got, expected)


def test_the_centre_is_examined_in_slots(small_model: Path) -> None:
    evaluation, params = counting(small_model)
    questions = prepare(evaluation, evaluation.task.train)
    few = dataclasses.replace(evaluation, slots=3, slice_tokens=5)
    got, expected = (examine(each, params, questions) for each in (few, evaluation))
    np.testing.assert_equal(got, expected)


@pytest.mark.parametrize("slots", [0, 3])
def test_rewards_are_computed_while_the_next_members_answer(
    slots: int, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two waits for the other, with the second chunk half-way."""
    evaluation, params = counting(small_model, slots=slots, slice_tokens=5)
    scoring, decoding = threading.Event(), threading.Event()
    chunks_begun = []

    def meet() -> None:
        if len(chunks_begun) == 2:
            decoding.set()
            assert scoring.wait(60)

    def reward(example: Any, text: str) -> Reward:
        scoring.set()
        assert decoding.wait(60)
        return Reward(1.0, False, False, False)

    collect = Scheduler.collect

    def collected(scheduler: Scheduler, *args: Any) -> None:
        meet()
        collect(scheduler, *args)

    def waited(answers: np.ndarray) -> np.ndarray:
        meet()
        return answers

    @jax.jit
    def on_the_device(answers: jax.Array) -> jax.Array:
        return jax.pure_callback(waited, answers, answers)

    monkeypatch.setattr(Scheduler, "collect", collected)
    monkeypatch.setattr(
        asking,
        "decode",
        lambda *args: on_the_device(decode(*args)),
    )
    evaluation = dataclasses.replace(
        evaluation, task=dataclasses.replace(evaluation.task, reward=reward)
    )
    questions = prepare(evaluation, evaluation.task.train)
    scores = ask(
        evaluation,
        params,
        jax.random.key(3),
        questions,
        before_chunk=lambda doing: doing and chunks_begun.append(1),
        **POPULATION,
    )
    assert scores.reward.tolist() == [1.0] * 4
    assert scoring.is_set()
    assert decoding.is_set()


def test_an_error_in_a_reward_stops_the_generation(small_model: Path) -> None:
    def reward(example: Any, text: str) -> Reward:
        raise ZeroDivisionError

    evaluation, params = counting(small_model)
    evaluation = dataclasses.replace(
        evaluation, task=dataclasses.replace(evaluation.task, reward=reward)
    )
    questions = prepare(evaluation, evaluation.task.train)
    begun = []
    with pytest.raises(ZeroDivisionError):
        ask(
            evaluation,
            params,
            jax.random.key(3),
            questions,
            before_chunk=lambda doing: doing and begun.append(1),
            noise=POPULATION["noise"],
            population=8,
            chunk=2,
        )
    assert len(begun) == 2


def test_a_run_in_slots_is_the_run(
    finished_run: Path, small_model: Path, tmp_path: Path
) -> None:
    config = small_run.get_config(str(small_model))
    config.slots, config.generations = 10, 2
    train.run(config, tmp_path / "run")
    resolved = small_run.json.loads((tmp_path / "run/config.json").read_text())
    assert resolved["resolved"] == {"chunk": 2, "slots": 10}
    got, expected = (
        [row["fitness"] for row in small_run.rows(folder / "ledger.jsonl")[1:3]]
        for folder in (tmp_path / "run", finished_run)
    )
    assert got == expected


def test_settings_that_slots_cannot_have() -> None:
    for name, value, message in (
        ("slots", -1, "slots must be at least 0"),
        ("slice_tokens", 0, "slice_tokens must be at least 1"),
        ("mode", "likelihood", "slots are for"),
        ("method", "grpo", "slots=4 is not for method"),
    ):
        config = jes.config.default()
        config.slots = 4
        freeze(config)
        config[name] = value
        with pytest.raises(InputError, match=message):
            freeze(config)
