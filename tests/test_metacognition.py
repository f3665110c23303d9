"""Tasks that ask whether the model knows: asking, fitness, evaluation."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import get_config
from test_evaluate_export import command

import jes
from jes import train
from jes.core.noise import Noise
from jes.errors import InputError
from jes.metacognition.objectives import CELLS, objective_fitness
from jes.questions import Evaluation, prepare
from jes.rollout import ask, examine
from jes.sampling.generate import Sampling
from jes.sampling.prompts import encode
from jes.scoring import Score
from jes.studies import knowing
from jes.studies.knowing import collect
from jes.tasks import load_task
from jes.tasks.task import Reward

SIZES = {"train_examples": 16, "test_examples": 12}


@pytest.fixture(scope="module")
def pretrained(small_model: Path) -> jes.Pretrained:
    return jes.load(small_model)


def examiner_of(pretrained: jes.Pretrained, name: str = "tiny/knows") -> Evaluation:
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=load_task(name, **SIZES),
        sampling=Sampling(eos_ids=pretrained.eos_ids),
        buckets=(32,),
    )


def judged_by_letters(evaluation: Evaluation) -> Evaluation:
    """Right and yes by letters of the texts, which random weights vary enough for."""

    def reward(_, text, meta):
        right, yes = len(text) % 2 == 0, len(set(meta)) % 2 == 0
        return Reward(float(right + (right == yes)), right, right, True, yes)

    task = dataclasses.replace(evaluation.task, reward=reward)
    return dataclasses.replace(evaluation, task=task)


def test_a_member_is_scored_on_both_answers(pretrained: jes.Pretrained) -> None:
    """The same as generating for each member and each prompt apart."""
    evaluation = judged_by_letters(examiner_of(pretrained))
    task = evaluation.task
    questions = prepare(evaluation, task.test)
    key, noise = jes.generation_key(jax.random.key(3), 0), Noise(sigma=0.3)
    got = ask(
        evaluation,
        pretrained.params,
        key,
        questions,
        noise=noise,
        population=3,
        chunk=2,
    )
    for member in range(3):
        params = jes.perturb_member(pretrained.params, key, member, noise)
        texts = []
        for prompt in (task.prompt, task.meta):
            asked = [encode(pretrained.tokenizer, prompt(ex)) for ex in task.test]
            said = jes.generate(
                pretrained.model,
                params,
                asked,
                5,
                eos_ids=pretrained.eos_ids,
                buckets=(32,),
            )
            texts.append(pretrained.tokenizer.backend_tokenizer.decode_batch(said))
        rewards = [task.reward(None, *pair) for pair in zip(*texts, strict=True)]
        right = np.array([r.correct for r in rewards])
        yes = np.array([r.yes for r in rewards])
        assert got.accuracy[member] == right.mean()
        assert got.hits[member] == pytest.approx((right & yes).mean())
        assert got.false_alarms[member] == pytest.approx((~right & yes).mean())
        earned = right.mean() + (right == yes).mean()
        assert got.reward[member] == pytest.approx(earned)
    assert len(set(got.reward)) > 1


def test_a_batch_that_is_filled_up_counts_each_question_once(
    pretrained: jes.Pretrained,
) -> None:
    evaluation = judged_by_letters(examiner_of(pretrained))
    questions = prepare(evaluation, evaluation.task.test)
    whole = examine(evaluation, pretrained.params, questions, batch_size=12)
    parts = examine(evaluation, pretrained.params, questions, batch_size=5)
    assert parts._asdict() | {"parts": 0} == pytest.approx(
        whole._asdict() | {"parts": 0}
    )
    answers = collect(evaluation, pretrained.params, questions, batch_size=5)
    assert answers.correct.mean() == whole.accuracy
    assert (answers.correct & answers.yes).mean() == pytest.approx(whole.hits)
    wrong = ~answers.correct & answers.yes
    assert wrong.mean() == pytest.approx(whole.false_alarms)


def test_other_tasks_say_nothing_about_knowing(pretrained: jes.Pretrained) -> None:
    evaluation = examiner_of(pretrained, "tiny/facts")
    questions = prepare(evaluation, evaluation.task.test)
    score = examine(evaluation, pretrained.params, questions)
    assert np.isnan([score.hits, score.false_alarms]).all()
    with pytest.raises(InputError, match="tiny/facts does not ask"):
        collect(evaluation, pretrained.params, questions)


def test_confidence_is_the_log_odds_of_the_words(pretrained: jes.Pretrained) -> None:
    """By hand: the letters of yes and of no, one after the other."""
    evaluation = examiner_of(pretrained)
    questions = prepare(evaluation, evaluation.task.test[:3])
    answers = collect(evaluation, pretrained.params, questions)
    for question, got in zip(questions, answers.confidence, strict=True):
        odds = []
        for word in ("yes", "no"):
            ids = [*question.meta, *encode(pretrained.tokenizer, word)]
            logits, _ = pretrained.model.apply(
                {"params": pretrained.params}, np.array([ids])
            )
            logs = np.asarray(jax.nn.log_softmax(logits[0]))
            first = len(question.meta)
            odds.append(sum(logs[i - 1, ids[i]] for i in range(first, len(ids))))
        assert got == pytest.approx(odds[0] - odds[1], abs=1e-4)


def score_of(cells: dict[str, float]) -> Score:
    right = cells["right yes"] + cells["right no"]
    return Score(
        reward=np.array([np.nan]),
        accuracy=np.array([right]),
        strict=None,
        formatted=None,
        truncated=None,
        tokens=None,
        hits=np.array([cells["right yes"]]),
        false_alarms=np.array([cells["wrong yes"]]),
    )


CASES = ("right yes", "wrong no", "right no", "wrong yes")


@pytest.mark.parametrize("objective", CELLS)
@pytest.mark.parametrize("case", range(4))
def test_objectives_cell_by_cell(objective: str, case: int) -> None:
    cells = dict.fromkeys(CASES, 0.0) | {CASES[case]: 1.0}
    (got,) = objective_fitness(objective, score_of(cells))
    assert got == CELLS[objective][case]


def test_esma_is_correct_plus_aligned() -> None:
    """The identity of 2602.02605's reward, in every case, and as the tiny task's."""
    for cells in np.eye(4):
        named = dict(zip(CASES, cells, strict=True))
        score = score_of(named)
        esma, aligned, correct = (
            objective_fitness(name, score)[0]
            for name in ("esma", "alignment", "correct")
        )
        assert esma == correct + aligned
        right, yes = named["right yes"] + named["right no"], cells[0] + cells[3]
        text = "kemo" if right else "none"
        said = "yes" if yes else "no"
        task = load_task("tiny/knows", **SIZES)
        assert task.reward({"answer": "kemo"}, text, said).value == esma


def test_d_prime_of_a_batch_is_an_objective() -> None:
    """Counts 80, 20, 30, 70: d' 1.366022."""
    shares = {"right yes": 0.4, "right no": 0.1, "wrong yes": 0.15, "wrong no": 0.35}
    (got,) = objective_fitness("d_prime", score_of(shares))
    assert got == pytest.approx(1.366022, abs=1e-6)
    none = {"right yes": 0.5, "right no": 0.5, "wrong yes": 0.0, "wrong no": 0.0}
    assert np.isnan(objective_fitness("d_prime", score_of(none))).all()


def test_the_answer_about_knowing_is_read_leniently() -> None:
    reward = load_task("tiny/knows", **SIZES).reward
    example = {"answer": "kemo"}
    assert reward(example, "kemo", "yes") == Reward(2.0, True, True, True, True)
    assert reward(example, "kemox", "no") == Reward(1.0, True, False, True, False)
    assert reward(example, "dodo", "maybe") == Reward(1.0, False, False, False, False)
    assert reward(example, "", "the eyes") == Reward(0.0, False, False, False, True)
    assert reward(example, "", "yesterday").formatted is False


def test_a_run_trains_on_an_objective_and_notes_the_counts(
    small_model: Path, tmp_path: Path
) -> None:
    config = get_config(str(small_model))
    config.task = "tiny/knows"
    config.data.update(SIZES)
    config.prompts, config.buckets, config.generations = 8, (32,), 2
    config.objective = "alignment"
    train.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert {"hits", "false_alarms"} <= row.keys()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # All answers are wrong, and none says yes: aligned, but worth nothing to ESMA's
    # `correct`.
    assert [json.loads(line)["fitness_mean"] for line in metrics] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "knowing"}, "objective must be one of .*esma.*not 'knowing'"),
        ({"objective": "esma", "task": "tiny/facts"}, "tiny/facts does not"),
        ({"mode": "likelihood"}, "two questions"),
        ({"method": "grpo"}, "asks two"),
    ],
)
def test_settings_that_cannot_be(
    small_model: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    config = get_config(str(small_model))
    config.update({"task": "tiny/knows", "buckets": (32,), **changes})
    with pytest.raises(InputError, match=message):
        train.run(config, tmp_path / "run")


def test_evaluate_writes_table_answers_and_figure(
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = [f"--model={small_model}", "--examples=24", f"--out={out}"]
    tasks = "--tasks=tiny/knows,tiny/knows_chat"
    assert command(knowing.main, monkeypatch, *arguments, tasks) is None
    assert "alignment, yes = right" in capsys.readouterr().out
    measured = json.loads((out / "metrics.json").read_text())
    assert list(measured) == ["tiny/knows", "tiny/knows_chat"]
    with (out / "tiny_knows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    # Every metric can be had again from the table.
    correct, yes = ([int(row[name]) for row in rows] for name in ("correct", "yes"))
    ways = measured["tiny/knows"]
    assert ways["answers"]["accuracy"] == np.mean(correct)
    assert ways["answers"]["yes_rate"] == np.mean(yes)
    sure = [float(row["confidence"]) for row in rows]
    above = np.mean(np.array(sure) > ways["threshold"]["threshold"])
    assert ways["threshold"]["yes_rate"] == pytest.approx(above, abs=1 / 24)
    assert (out / "answers.png").is_file()


@pytest.mark.parametrize(
    ("task", "message"),
    [("tiny/nothing", "no task 'tiny/nothing'"), ("tiny/add", "does not ask")],
)
def test_evaluate_refuses_other_tasks(
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    message: str,
) -> None:
    arguments = [f"--model={small_model}", f"--tasks={task}"]
    assert command(knowing.main, monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
