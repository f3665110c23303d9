"""Texts of any lengths share rows: the same logits, with few tokens of padding."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from marks import slow_except
from small_decoder import decoder, weights_of

import jes
from jes import train
from jes.core.members import unperturbed
from jes.core.noise import Noise
from jes.core.population import perturb_members
from jes.sampling.generate import Sampling, decode, generate, unrolled
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.packing import (
    Packed,
    Shape,
    Tree,
    computed_tokens,
    first_fit,
    pack,
    pack_prompts,
    reads_of_choices,
    reads_of_prompts,
    shape_of,
    text_tokens,
)
from jes.sampling.prompts import PromptBatch, pad

MODEL = decoder()
RNG = np.random.default_rng(0)
LENGTHS = (3, 17, 5, 9, 30, 4, 6, 2, 11, 1)
PROMPTS = [RNG.integers(1, 50, n).tolist() for n in LENGTHS]
SAMPLING = Sampling(max_new_tokens=6, eos_ids=(7,))


@pytest.fixture(scope="module")
def params() -> dict:
    return weights_of(MODEL)


def packed(prompts: list[list[int]], shape: Shape, asks: int = 1) -> Packed:
    batch = pack_prompts(prompts, (64,), (), asks=asks, shape=shape)
    assert isinstance(batch, Packed)
    return batch


ONE_BLOCK, BLOCKS = Shape(1, 4, 32, 4, 32), Shape(6, 1, 32, 4, 32)


def test_rows_hold_each_text_once() -> None:
    batch = packed(PROMPTS, BLOCKS)
    rows = batch.rows
    assert text_tokens(batch) == sum(LENGTHS)
    assert computed_tokens(batch) == int(batch.blocks) * 32 < 6 * 32
    for number, prompt in enumerate(PROMPTS):
        slots = batch.slots[number][batch.slots[number] >= 0]
        assert rows.tokens.ravel()[slots].tolist() == prompt
        assert rows.positions.ravel()[slots].tolist() == list(range(len(prompt)))
        assert len({*rows.segments.ravel()[slots]}) == 1
        (place,) = np.argwhere(rows.number.ravel() == number)[0]
        row = place // rows.at.shape[-1]
        assert 32 * row + rows.at.ravel()[place] == slots[-1]
    assert batch.next_position.ravel().tolist() == list(LENGTHS)


def test_the_longest_come_first_where_there_is_room() -> None:
    assert first_fit([4, 9, 6, 5, 1], [1] * 5, 10, 5).tolist() == [1, 0, 1, 2, 0]
    assert first_fit([1] * 5, [1] * 5, 10, 2).tolist() == [0, 0, 1, 1, 2]
    assert first_fit([3, 3], [2, 5], 10, 6).tolist() == [0, 1]


def test_a_shape_holds_every_batch_that_it_is_made_for() -> None:
    rng = np.random.default_rng(1)
    batches = [(rng.integers(20, 200, 64).tolist(), [1] * 64) for _ in range(8)]
    shape = shape_of(batches, longest=200, width=200)
    computed, text = 0, 0
    for sizes, reads in batches:
        rows = first_fit(sizes, reads, shape.length, shape.reads)
        used = -(-(rows.max() + 1) // shape.rows)
        assert used <= shape.blocks
        computed += used * shape.rows * shape.length
        text += sum(sizes)
    assert computed <= 1.1 * text
    # Prompts of one length are padded, as is little text.
    assert shape_of([([24] * 64, [1] * 64)], longest=24, width=24, padded=24 * 64) == (
        Shape(0)
    )
    assert isinstance(pack_prompts([[1] * 5, [1] * 64], (64,)), PromptBatch)
    # Other batches need few shapes where nothing is known before.
    many = {
        shape_of(
            [(rng.integers(20, 200, 64), [1] * 64)], longest=200, width=200, coarse=True
        )
        for _ in range(16)
    }
    assert len(many) <= 3


def test_more_than_the_shape_holds_is_packed_too(params: dict) -> None:
    tight = packed(PROMPTS, Shape(1, 1, 8, 1, 32))
    assert tight.rows.tokens.shape[0] > 1
    assert answers(params, tight) == answers(params, pad(PROMPTS, (32,)))


def answers(params: dict, batch: Packed | PromptBatch) -> list:
    weights = MODEL.unrolled_params(params)
    return decode(MODEL.unrolled(), unperturbed(weights), batch, SAMPLING).tolist()


@pytest.mark.parametrize("shape", [ONE_BLOCK, BLOCKS])
def test_greedy_answers_are_those_of_padded_prompts(params: dict, shape: Shape) -> None:
    found = answers(params, packed(PROMPTS, shape))
    assert found == answers(params, pad(PROMPTS, (32,)))
    assert len({tuple(row) for row in found[0]}) > 5


@pytest.mark.parametrize("rank", slow_except({0}, [0, 1]))
def test_members_sample_the_same_answers(params: dict, rank: int) -> None:
    noise, key = Noise(sigma=0.05, rank=rank), jax.random.key(2)
    members = perturb_members(params, key, jnp.arange(3), noise)
    if rank:
        members = members.replace(params=MODEL.unrolled_params(params))
    run = partial(decode, MODEL.unrolled(), unrolled(MODEL, members))
    sampling = dataclasses.replace(SAMPLING, temperature=1.0)
    found = run(packed(PROMPTS, BLOCKS), sampling)
    assert found.tolist() == run(pad(PROMPTS, (32,)), sampling).tolist()


def test_two_questions_share_how_they_begin(params: dict) -> None:
    """The second prompt of each branches off where it differs from the first."""
    common = [RNG.integers(1, 50, n).tolist() for n in (12, 7, 20)]
    tails = [[[3], [4, 5, 6]], [[9, 8], [8]], [[], [2, 2]]]
    pairs = zip(common, tails, strict=True)
    prompts = [[text + tail for tail in two] for text, two in pairs]
    both = [*(one for one, _ in prompts), *(two for _, two in prompts)]
    batch = packed(both, ONE_BLOCK, asks=2)
    assert text_tokens(batch) == 12 + 4 + 7 + 3 + 20 + 2
    assert answers(params, batch) == answers(params, pad(both, (32,)))


def test_the_public_function_packs_many_prompts(params: dict) -> None:
    rng = np.random.default_rng(4)
    lengths = rng.integers(5, 120, 40)
    prompts = [rng.integers(1, 50, n).tolist() for n in lengths]
    batch = pack_prompts(prompts, (128,))
    assert isinstance(batch, Packed)
    assert len(batch.rows.tokens) > 4
    found = generate(MODEL, params, prompts, 3, buckets=(128,))
    one_by_one = generate(MODEL, params, prompts, 3, buckets=(128,), batch_size=1)
    assert found == one_by_one


CHOICES = [[[4], [5, 6, 7]], [[8, 9], [1], [2]], [[3, 3, 3, 3]]]


@pytest.mark.parametrize("shape", [Shape(1, 2, 24, 8, 0), Shape(4, 1, 24, 8, 0)])
def test_likelihoods_of_choices_are_those_of_whole_texts(
    params: dict, shape: Shape
) -> None:
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[2]]
    noise = Noise(sigma=0.05)
    members = perturb_members(params, jax.random.key(2), jnp.arange(2), noise)
    batch = pack_choices(prompts, CHOICES, (64,), shape=shape)
    # A prompt once, and of each choice all but the last token.
    assert text_tokens(batch.texts) == 3 + 9 + 5 + 0 + 2 + 1 + 3
    found = log_likelihoods(MODEL, members, batch)
    apply = jax.jit(MODEL.apply)
    for member in range(2):
        for i, (prompt, choices) in enumerate(zip(prompts, CHOICES, strict=True)):
            for j, choice in enumerate(choices):
                logits, _ = apply(members[member], jnp.array([[*prompt, *choice]]))
                log_p = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
                expected = sum(float(log_p[k, t]) for k, t in enumerate(choice))
                assert found[member, i, j] == pytest.approx(expected, rel=2e-5)
    assert np.isinf(found).tolist() == 2 * [[[0, 0, 1], [0, 0, 0], [0, 1, 1]]]


def test_branches_do_not_see_each_other(params: dict) -> None:
    tree = Tree([5, 6], [[7, 8], [9]])
    shape = Shape(1, 1, 8, 4, 0)
    one = pack([tree], [reads_of_choices(tree, [[7, 8, 1], [9, 1]], 0)], shape).rows
    assert one.positions[0, 0].tolist() == [0, 1, 2, 3, 2, -1, -1, -1]
    assert one.segments[0, 0, :5].tolist() == [0, 0, 1, 1, 2]
    tokens, positions, *segments = (jnp.asarray(array)[0] for array in one[:4])
    logits, _ = MODEL.apply({"params": params}, tokens, positions, segments=segments)
    alone, _ = MODEL.apply({"params": params}, jnp.array([[5, 6, 9]]))
    np.testing.assert_allclose(logits[0, 4], alone[0, 2], atol=1e-5)


def test_reads_come_after_the_last_tokens() -> None:
    tree = Tree([1, 2, 3], [[], [4, 5]])
    assert [tuple(read) for read in reads_of_prompts(tree, 1, 10)] == [
        (2, 1, 0),
        (4, 11, 0),
    ]
    choices = [[7], [8, 9]]
    tree = Tree([1, 2, 3], [choice[:-1] for choice in choices])
    reads = [tuple(read) for read in reads_of_choices(tree, choices, 4)]
    assert reads == [(2, 4, 7), (2, 5, 8), (3, 5, 9)]


def test_a_run_on_ragged_prompts_compiles_once_and_counts_its_tokens(
    small_model: Path, tmp_path: Path
) -> None:
    asked = [{"question": "x" * (3 + 37 * i % 60), "n": i} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "ragged.py").write_text(
        "def prompt(row):\n    return row['question']\n"
        "def reward(answer, row):\n    return len(answer) + row['n'] % 3\n"
    )
    config = small_run.get_config(str(small_model))
    config.task, config.buckets = str(tmp_path / "ragged.py"), (64,)
    config.data.train = config.data.test = str(tmp_path / "rows.jsonl")
    config.prompts, config.generations, config.population, config.chunk = 40, 4, 4, 2
    config.eval_every, config.max_new_tokens = 4, 4
    sizes = []
    for name in ("run", "again"):
        config.unlock()
        train.run(config, tmp_path / name)
        sizes.append(decode._cache_size())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert sizes[0] == sizes[1]
    assert len({row["prompt_tokens"] for row in rows}) > 1
    for row in rows:
        assert row["prompt_tokens"] <= row["computed_tokens"]
        assert row["computed_tokens"] < 0.8 * 4 * 40 * 64


def test_jes_generates_from_packed_prompts_in_any_order() -> None:
    pretrained = jes.load("tiny")
    texts = ["1+1=", "sort dcba:", "max a)12 b)4 c)9:", "reverse abcdefgh:"] * 8
    tokens = [pretrained.tokenizer.encode(text) for text in texts]
    found = jes.generate(
        pretrained.model, pretrained.params, tokens, 6, eos_ids=pretrained.eos_ids
    )
    assert found[:4] * 8 == found
    assert pretrained.tokenizer.decode(found[0]).startswith("2")
