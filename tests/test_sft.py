"""SFT of what a model says that it knows: labels, loss, schedule, runs, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import get_config, outcome, rows

from jes import memory, train
from jes.baselines import sft
from jes.baselines.sft import (
    Batch,
    Sft,
    answer_directly,
    claims_of,
    improve,
    make_batch,
)
from jes.config import SftSettings, freeze
from jes.core.members import unperturbed
from jes.errors import InputError
from jes.experiment import Experiment, make_experiment
from jes.questions import Question
from jes.sampling.generate import generate
from jes.sampling.likelihood import log_likelihoods, pack_choices
from jes.tasks.task import Reward

slopes = jax.jit(
    jax.value_and_grad(Sft.loss, argnums=1, has_aux=True), static_argnums=0
)
BOTH = pytest.mark.parametrize("name", ["answer", "all"])


def config_of(model: Path, **changes: Any) -> ConfigDict:
    """Eight steps of 12 questions."""
    config = get_config(str(model))
    config.method = "sft"
    config.task = "tiny/knows"
    config.data.train_examples, config.data.test_examples = 24, 8
    config.prompts = 12
    config.buckets = (24,)
    config.generations = 8
    config.eval_every = 4
    config.sft.learning_rate = 1e-2
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def experiment(small_model: Path) -> Experiment:
    config = config_of(small_model)
    return make_experiment(freeze(config))


class Bigrams:
    """A model whose logits depend on the last token alone."""

    def apply(
        self, variables: dict, tokens: jax.Array, positions: jax.Array, *, last: int
    ) -> tuple[jax.Array, None]:
        return variables["params"]["table"][tokens][:, -last:], None


BIGRAMS = Bigrams()
WORDS = 7
METAS = [[3, 4], [5, 3, 4, 6], [4], [6, 6, 5]]
CORRECT = np.array([True, False, False, True])
YES, NO = [1, 2, 0], [2, 0]  # 0 ends


def written_out(
    table: np.ndarray, name: str
) -> tuple[float, np.ndarray, list[list[int]]]:
    """Loss and gradient, one token after another in float64; and the rows."""
    probabilities = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    texts, total, gradient, count = [], 0.0, np.zeros_like(table), 0
    for meta, correct in zip(METAS, CORRECT, strict=True):
        answer = YES if correct else NO
        text = meta + answer
        first = 1 if name == "all" else len(meta)
        for before, token in zip(text[first - 1 :], text[first:], strict=False):
            total -= np.log(probabilities[before, token])
            gradient[before] += probabilities[before]
            gradient[before, token] -= 1
            count += 1
        texts.append(text)
    return total / count, gradient / count, texts


def bigram_batch(settings: Sft) -> tuple[Batch, np.ndarray]:
    table = np.random.default_rng(5).normal(size=(WORDS, WORDS))
    return make_batch(settings, METAS, CORRECT, (YES, NO), 9), table


@BOTH
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    batch, table = bigram_batch(Sft(steps=1, loss_on=name))
    expected, expected_gradient, texts = written_out(table, name)
    for text, tokens, positions in zip(
        texts, batch.tokens, batch.positions, strict=True
    ):
        padding = 9 - len(text)
        assert tokens.tolist() == [0] * padding + text
        assert positions.tolist() == [-1] * padding + list(range(len(text)))
    (got, _), gradient = slopes(BIGRAMS, {"table": jnp.float32(table)}, batch)
    assert float(got) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient["table"], expected_gradient, atol=1e-7)
    assert abs(expected_gradient).max() > 0.05


@BOTH
def test_agreement_is_of_whole_answers(name: str) -> None:
    batch, _ = bigram_batch(Sft(steps=1, loss_on=name))
    table = np.zeros((WORDS, WORDS), np.float32)
    # After META `no`; then 2 is followed by 0, and 1 by 2: all of `no`, none of `yes`.
    for before, after in [(3, 2), (4, 2), (5, 2), (6, 2), (2, 0), (1, 2)]:
        table[before, after] = 1
    (_, metrics), _ = slopes(BIGRAMS, {"table": jnp.array(table)}, batch)
    assert metrics["agreement"] == 0.5
    table[5, 1] = 2  # the last META ends in 5
    (_, metrics), _ = slopes(BIGRAMS, {"table": jnp.array(table)}, batch)
    assert metrics["agreement"] == 0.75


def test_loss_is_the_likelihood_of_the_answers(experiment: Experiment) -> None:
    """Of a transformer, padded otherwise: as choices are scored, per token."""
    claims = claims_of(experiment.evaluation)
    metas = [list(q.meta) for q in experiment.train[:4]]
    metas[1] = metas[1][3:]
    batch = make_batch(Sft(steps=1), metas, CORRECT, claims, 29)
    model, params = experiment.pretrained.model, experiment.pretrained.params
    got, _ = jax.jit(Sft.loss, static_argnums=0)(model, params, batch)
    answers = [claims[0] if right else claims[1] for right in CORRECT]
    choices = pack_choices(metas, [[answer] for answer in answers], (24,))
    (logs,) = log_likelihoods(model, unperturbed(params), choices)
    lengths = np.array([len(answer) for answer in answers])
    # float32 sums in another order: some ulps of logits near 10.
    np.testing.assert_allclose(got, -logs.sum() / lengths.sum(), rtol=1e-5)


def test_claims_are_the_task_s_words_with_an_end(experiment: Experiment) -> None:
    evaluation = experiment.evaluation
    (end,) = evaluation.eos_ids
    for claim, word in zip(claims_of(evaluation), ("yes", "no"), strict=True):
        assert evaluation.tokenizer.decode(claim[:-1]) == word
        assert claim[-1] == end
    sampling = dataclasses.replace(evaluation.sampling, eos_ids=())
    endless = dataclasses.replace(evaluation, sampling=sampling)
    assert claims_of(endless)[1] == claims_of(evaluation)[1][:-1]


def test_labels_follow_what_the_weights_answer(experiment: Experiment) -> None:
    """Answers in batches of 5, the last one filled up, are those to each question."""
    params, questions = experiment.pretrained.params, experiment.train[:12]
    seen = {}

    def reward(example: dict, text: str, meta: str) -> Reward:
        assert meta == ""
        seen[example["key"]] = text
        correct = example["key"] < "m"
        return Reward(0.0, correct, example["key"] < "g", False, False)

    task = dataclasses.replace(experiment.evaluation.task, reward=reward)
    evaluation = dataclasses.replace(experiment.evaluation, task=task)
    checks: list[str] = []
    direct = answer_directly(evaluation, params, questions, 5, checks.append)
    said = generate(
        evaluation.model,
        params,
        [q.prompt for q in questions],
        5,
        eos_ids=evaluation.eos_ids,
        batch_size=5,
        buckets=evaluation.buckets,
    )
    keys = [q.example["key"] for q in questions]
    assert [seen[key] for key in keys] == [evaluation.tokenizer.decode(t) for t in said]
    assert direct.correct.tolist() == [key < "m" for key in keys]
    assert direct.strict.tolist() == [key < "g" for key in keys]
    assert direct.truncated.tolist() == [len(tokens) == 5 for tokens in said]
    assert direct.tokens == sum(min(len(tokens) + 1, 5) for tokens in said)
    assert len(checks) == 3
    assert 0 < direct.correct.sum() < 12
    texts = learned_texts(experiment, questions, direct.correct)
    for text, key in zip(texts, keys, strict=True):
        word = "yes" if key < "m" else "no"
        assert text.endswith(f"know city of {key}?{word}<eos>")


def learned_texts(
    experiment: Experiment, questions: list[Question], correct: np.ndarray
) -> list[str]:
    """Rows of the batch in characters, without padding."""
    claims = claims_of(experiment.evaluation)
    metas = [q.meta for q in questions]
    batch = make_batch(Sft(steps=1), metas, correct, claims, 30)
    tokenizer = experiment.evaluation.tokenizer
    return [
        tokenizer.decode(tokens[positions >= 0])
        for tokens, positions in zip(batch.tokens, batch.positions, strict=True)
    ]


def test_the_learning_rate_rises_and_falls() -> None:
    settings = Sft(steps=100, highest_rate=3.0)
    rates = [float(settings.learning_rate(step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[9] == rates[10] == max(rates) == 3.0
    assert rates[11] == pytest.approx(3 * 89 / 90)
    assert rates[99] == pytest.approx(3 / 90)
    assert rates[100] == 0
    np.testing.assert_allclose(np.diff(rates[:10]), 0.3, rtol=1e-5)
    np.testing.assert_allclose(np.diff(rates[10:]), -1 / 30, rtol=1e-3)
    assert [float(Sft(steps=1).learning_rate(step)) for step in (0, 1)] == [
        pytest.approx(2e-5),
        0,
    ]


@BOTH
def test_a_step_is_adamw_s_of_the_bounded_gradient(name: str) -> None:
    """At the rate of the schedule, whole or by microbatches."""
    settings = Sft(steps=20, highest_rate=0.1, loss_on=name)
    batch, table = bigram_batch(settings)
    table *= 4  # steep enough for the bound to bite
    weights, first, second = table.copy(), 0.0, 0.0
    norms = []
    for step in range(3):
        _, gradient, _ = written_out(weights, name)
        norms.append(np.linalg.norm(gradient))
        gradient /= max(1, norms[-1])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        top = first / (1 - 0.9 ** (step + 1))
        root = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        weights -= [0.05, 0.1, 0.1][step] * top / root
    for microbatch in (0, 2):
        held = dataclasses.replace(settings, microbatch=microbatch)
        params = {"table": jnp.float32(table)}
        after = params, held.optimizer.init(params)
        for norm in norms:
            after, metrics = improve(held, BIGRAMS, after, batch)
            assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        # Adam divides by √v: where gradients nearly vanish, rounding counts.
        np.testing.assert_allclose(after[0]["table"], weights, atol=1e-4)
    assert metrics.keys() == {"loss", "agreement", "gradient_norm"}


def test_diverged_weights_are_reported() -> None:
    settings = Sft(steps=20, highest_rate=0.1)
    batch, table = bigram_batch(settings)
    params = {"table": jnp.float32(table * np.nan)}
    before = params, settings.optimizer.init(params)
    with pytest.raises(InputError, match="learning_rate"):
        improve(settings, BIGRAMS, before, batch)


@pytest.fixture(scope="module")
def whole(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("sft") / "run"
    train.run(config_of(small_model), workdir)
    return workdir


def test_a_run_lowers_the_loss(whole: Path, experiment: Experiment) -> None:
    metrics = rows(whole / "metrics.jsonl")
    losses = [row["loss"] for row in metrics]
    assert losses[0] > 2
    assert losses[-1] < losses[0] / 2
    assert metrics[-1]["agreement"] == 1  # random weights know nothing: always no
    assert [row["learning_rate"] for row in metrics] == pytest.approx(
        [0.01 * (8 - step) / 7 if step else 0.01 for step in range(8)]
    )
    assert metrics[-1]["displacement_norm"] > metrics[0]["displacement_norm"] > 0
    assert "fitness_mean" not in metrics[0]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["answers"] == 8 * 12
    assert summary["tokens"] == sum(row["tokens"] for row in metrics)
    before, *_, after = rows(whole / "evaluations.jsonl")
    assert (before["formatted"], after["formatted"]) == (0, 1)
    assert (whole / "curves.png").stat().st_size > 10_000
    assert not (whole / "ledger.jsonl").exists()


def test_a_run_goes_on_in_its_order_of_sums_and_on_its_schedule(
    whole: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    with pytest.raises(InputError, match="generations: 8 there, 9 here"):
        train.run(config_of(small_model, generations=9), workdir)
    (workdir / "summary.json").unlink()  # it was left where it was
    shutil.rmtree(workdir / "checkpoints" / "8")
    # Less memory than the run began with.
    monkeypatch.setattr(memory, "rows_of_gradient", lambda *args, **kwargs: 4)
    train.run(config_of(small_model), workdir)
    assert outcome(workdir) == outcome(whole)


def test_without_an_anchor_nothing_is_measured(
    small_model: Path, tmp_path: Path
) -> None:
    config = config_of(small_model, anchor="none")
    summary = train.run(config, tmp_path / "run")
    assert summary["displacement_norm"] is None


def test_as_many_questions_at_once_as_fit_and_divide_them(
    experiment: Experiment,
) -> None:
    assert sft.resolve(experiment) == {"microbatch": 12}
    # What is left of this beside the optimizer holds so many, or a few more.
    for name, expected in (("answer", 6), ("all", 4)):
        settings = dataclasses.replace(
            experiment.settings, memory_gb=0.0006, sft=SftSettings(loss=name)
        )
        held = sft.resolve(experiment._replace(settings=settings))
        assert held == {"microbatch": expected}
