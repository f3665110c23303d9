"""Padding, cached decoding, stopping, sampling, likelihoods, compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from small_decoder import decoder, weights_of

import jes
from jes.core.members import Members, unperturbed
from jes.sampling.generate import (
    Sampling,
    decode,
    restrict,
    trim,
    unrolled,
    unrolled_params,
)
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.sampling.prompts import encode, pad

MODEL = decoder()
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in (3, 9, 1, 6, 6, 12, 2)]


@pytest.fixture(scope="module")
def params() -> dict:
    return weights_of(MODEL)


def full_forward(params: dict, prompt: list[int], new: int) -> list[int]:
    """Greedy answer without padding, batch or cache: the readable reference."""
    tokens = list(prompt)
    for _ in range(new):
        logits, _ = jax.jit(MODEL.apply)({"params": params}, jnp.array([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def reference(params: dict) -> list[list[int]]:
    return [full_forward(params, prompt, 5) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", slow_except({3}, [1, 3, 256]))
def test_greedy_is_the_full_forward_pass(
    params: dict, reference: list[list[int]], batch_size: int
) -> None:
    answers = jes.generate(
        MODEL, params, PROMPTS, 5, batch_size=batch_size, buckets=(4, 16)
    )
    assert answers == reference


def test_answers_end_before_an_end_token(params: dict) -> None:
    free = jes.generate(MODEL, params, PROMPTS, 8, buckets=(16,))
    eos = (free[0][2], free[3][4])
    stopped = jes.generate(MODEL, params, PROMPTS, 8, eos_ids=eos, buckets=(16,))
    for answer, whole in zip(stopped, free, strict=True):
        ends = [i for i, token in enumerate(whole) if token in eos]
        assert answer == (whole[: ends[0]] if ends else whole)
    assert len(stopped[0]) <= 2


class CountingModel:
    """A decoder that counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    def apply(self, *args: jax.Array, **settings: int) -> tuple:
        jax.debug.callback(self.count)
        return MODEL.unrolled().apply(*args, **settings)

    def count(self) -> None:
        self.runs += 1


def test_decoding_stops_when_every_row_has_ended(params: dict) -> None:
    free = jes.generate(MODEL, params, PROMPTS, 20, buckets=(16,))
    eos = tuple({answer[3] for answer in free})
    longest = max(
        next(i for i, token in enumerate(answer) if token in eos) for answer in free
    )
    model = CountingModel()
    itself = unperturbed(unrolled_params(MODEL, params))
    sampling = Sampling(max_new_tokens=20, eos_ids=eos)
    answers = decode(model, itself, pad(PROMPTS, (16,)), sampling)
    jax.effects_barrier()
    assert answers.shape == (1, len(PROMPTS), 20)
    # The prompts, and one run a token after the first, up to the last end token.
    assert model.runs == 1 + longest <= 4


def test_members_answer_as_each_does_alone(params: dict) -> None:
    members = [jes.perturb(params, jax.random.key(i), 0.05) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    keys = jax.random.split(jax.random.key(0), 3)
    together = decode(
        MODEL.unrolled(),
        unrolled(MODEL, Members({"params": stack}, keys)),
        pad(PROMPTS, (16,)),
        Sampling(max_new_tokens=6),
    )
    for weights, answers in zip(members, together, strict=True):
        alone = jes.generate(MODEL, weights, PROMPTS, 6, buckets=(16,))
        assert trim(np.asarray(answers), ()) == alone


def test_each_shape_compiles_once(params: dict) -> None:
    settings = {"eos_ids": (7,), "buckets": (8, 32), "batch_size": 4}
    start = decode._cache_size()
    for seed in range(4):
        weights = jes.perturb(params, jax.random.key(seed), 0.1)
        rng = np.random.default_rng(seed)
        lengths = [*rng.integers(1, 9, 4), *rng.integers(9, 33, 4)]
        prompts = [rng.integers(0, 50, n).tolist() for n in lengths]
        jes.generate(MODEL, weights, prompts, 3, **settings)
    assert decode._cache_size() - start == 2


def test_sampling_follows_the_distribution(params: dict) -> None:
    """Chi-square of 4000 draws of the first token against the softmax."""
    prompt, draws = PROMPTS[1], 4000
    logits, _ = MODEL.apply({"params": params}, jnp.array([prompt]))
    expected = np.asarray(jax.nn.softmax(logits[0, -1] / 1.5)) * draws
    answers = jes.generate(
        MODEL,
        params,
        [prompt] * draws,
        1,
        temperature=1.5,
        key=jax.random.key(3),
        batch_size=draws,
        buckets=(16,),
    )
    seen = np.bincount([answer[0] for answer in answers], minlength=50)
    chi2 = ((seen - expected) ** 2 / expected).sum()
    # 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert chi2 < 49 + 5 * 9.9


def test_sampled_rows_do_not_depend_on_their_batch_companions(params: dict) -> None:
    def sample(prompts: list[list[int]]) -> list[list[int]]:
        return jes.generate(
            MODEL,
            params,
            prompts,
            4,
            temperature=1.0,
            key=jax.random.key(5),
            buckets=(16,),
        )

    same_length = [PROMPTS[3], PROMPTS[4]]
    assert sample(same_length)[0] == sample([PROMPTS[3], PROMPTS[3]])[0]
    assert sample(same_length) == sample(same_length)


def test_top_k_and_top_p() -> None:
    logits = jnp.log(jnp.array([0.5, 0.05, 0.3, 0.15]))
    kept = restrict(logits, Sampling(temperature=1.0, top_k=2))
    assert np.isfinite(kept).tolist() == [True, False, True, False]
    # 0.5 and 0.3 hold less than 0.85: the next likeliest is kept too.
    kept = restrict(logits, Sampling(temperature=1.0, top_p=0.85))
    assert np.isfinite(kept).tolist() == [True, False, True, True]
    kept = restrict(logits, Sampling(temperature=1.0, top_p=1e-6))
    assert np.isfinite(kept).tolist() == [True, False, False, False]
    np.testing.assert_allclose(
        restrict(logits, Sampling(temperature=2.0)), logits / 2, rtol=1e-6
    )


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_sampling_settings_are_checked(settings: dict) -> None:
    with pytest.raises(ValueError, match="top_p <= 1"):
        Sampling(**settings)


def test_generate_says_what_is_wrong(params: dict) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        jes.generate(MODEL, params, [[1], []], 3)
    with pytest.raises(ValueError, match=r"12 tokens, more than the longest .* \(8\)"):
        jes.generate(MODEL, params, PROMPTS, 3, buckets=(4, 8))
    with pytest.raises(ValueError, match="needs a key"):
        jes.generate(MODEL, params, PROMPTS, 3, temperature=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        jes.generate(MODEL, params, PROMPTS, 0)
    assert jes.generate(MODEL, params, [], 3) == []


def test_left_padding() -> None:
    batch = pad([[5, 6], [7]], (4,))
    assert batch.tokens.tolist() == [[0, 0, 5, 6], [0, 0, 0, 7]]
    assert batch.positions.tolist() == [[-1, -1, 0, 1], [-1, -1, -1, 0]]


def test_choice_likelihoods_are_sums_of_log_softmax(params: dict) -> None:
    prompts = [PROMPTS[0], PROMPTS[3]]
    choices = [[[4], [5, 6, 7]], [[8, 9], [1], [2]]]
    batch = pack_choices(prompts, choices, (16,))
    (got,) = log_likelihoods(MODEL, unperturbed(params), batch)
    expected = []
    for prompt, some in zip(prompts, choices, strict=True):
        for choice in some:
            logits, _ = MODEL.apply({"params": params}, jnp.array([prompt + choice]))
            log_p = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
            expected.append(sum(float(log_p[i, t]) for i, t in enumerate(choice)))
    assert batch.lengths.tolist() == [[1, 3, 0], [2, 1, 1]]
    assert got[0, 2] == -np.inf
    np.testing.assert_allclose(got[batch.lengths > 0], expected, rtol=2e-5)


def test_prompts_are_encoded_as_text_or_through_the_chat_template() -> None:
    tokenizer = jes.load("tiny").tokenizer
    assert tokenizer.decode(encode(tokenizer, "12+7=")) == "12+7="
    asked = encode(tokenizer, [{"role": "user", "content": "hi"}])
    begun = encode(
        tokenizer,
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}],
    )
    assert begun[: len(asked)] == asked
    assert tokenizer.decode(begun[len(asked) :]) == "so"
