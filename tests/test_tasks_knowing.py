"""Questions asked twice: prompts, what counts as right and as Yes, rows, the config."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import get_config
from test_errors import write_parquet
from test_tasks_suite import HOSTILE as LONG
from test_tiny_world import HOSTILE

import jes
from jes import evaluate
from jes.config import freeze
from jes.errors import InputError
from jes.experiment import make_experiment
from jes.metacognition.objectives import CELLS
from jes.sampling.prompts import encode
from jes.tasks import TASKS, Example, Reward, Task, knowing, load_task
from jes.tasks.open_questions import OPEN_TASKS, SETS

CONFIG = Path(__file__).parent.parent / "configs" / "esma_triviaqa.py"
PARIS = {"question": "What is the capital of France?", "answers": ["Paris"]}
LANGUAGES = tuple(knowing.CLAIMS)


def task_of(form: str, example: Example = PARIS) -> Task:
    return knowing.knowing_task("", knowing.FORMS[form], [], [example])


def form_of(language: str) -> str:
    return "" if language == "en" else language


# Cell by cell, in the order of `CELLS`.
CASES = [("paris", True), ("Rome", False), ("PARIS!", False), ("Rome", True)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_reward_is_that_of_the_table(language: str) -> None:
    task = task_of(form_of(language))
    for (text, yes), points in zip(CASES, CELLS["esma"], strict=True):
        correct = text != "Rome"
        meta = task.claims[0 if yes else 1]
        reward = task.reward(PARIS, text, meta)
        assert reward == Reward(points, correct, correct, True, yes)
        assert reward.value == correct + (correct == yes)


def test_the_reward_of_a_single_prompt() -> None:
    task = task_of("idk")
    assert task.meta is None
    for text, points in {
        "paris": 2,
        "I don't know.": 1,
        "Paris, or I DON'T KNOW": 1,
        "I don\u2019t know": 1,
        "Rome": 0,
        "": 0,
        "I do not know": 0,
    }.items():
        reward = task.reward(PARIS, text)
        correct, yes = "paris" in text.lower(), " know" not in text.lower()
        yes = yes or text == "I do not know"  # only the words that were asked for
        assert reward == Reward(points, correct, correct, True, yes), text


# Language, meta answer -> whether it counts as Yes, and how it begins.
META_ANSWERS = {
    ("en", "Yes"): (True, "yes"),
    ("en", '"Yes."'): (True, "yes"),
    ("en", "**YES**, I do"): (True, "yes"),
    ("en", "_yes_"): (True, "yes"),
    ("en", "No"): (False, "no"),
    ("en", " no.\n"): (False, "no"),
    ("en", "No, yes"): (True, "no"),
    ("en", "I don\u2019t know"): (False, "no"),
    ("en", "I'm not sure"): (False, "no"),
    ("en", "Not sure"): (False, "no"),
    ("en", "eyes"): (True, "other"),
    ("en", "yesterday"): (True, "other"),
    ("en", "The answer is yes"): (True, "other"),
    ("en", "nothing"): (False, "other"),
    ("en", "Paris"): (False, "other"),
    ("en", "As an AI, I cannot say"): (False, "other"),
    ("en", "はい"): (False, "other"),
    ("en", ""): (False, "other"),
    ("ko", "예"): (True, "yes"),
    ("ko", '"예."'): (True, "yes"),
    ("ko", "아니요"): (False, "no"),
    ("ko", "아니오"): (False, "no"),
    ("ko", "잘 모르겠습니다"): (False, "no"),
    ("ko", "저는 모릅니다"): (False, "no"),
    ("ko", "예를 들어"): (True, "other"),
    ("ko", "아니예요"): (True, "no"),
    ("ko", "네"): (False, "other"),
    ("ko", "Yes"): (False, "other"),
    ("zh", "是"): (True, "yes"),
    ("zh", "“是的。”"): (True, "yes"),
    ("zh", "否"): (False, "no"),
    ("zh", "不知道"): (False, "no"),
    ("zh", "我不知道"): (False, "no"),
    ("zh", "不是"): (True, "no"),
    ("zh", "没有"): (False, "no"),
    ("zh", "是否"): (True, "other"),
    ("zh", "巴黎"): (False, "other"),
    ("zh", "但是"): (True, "other"),
    ("es", "Sí"): (True, "yes"),
    ("es", "¡SÍ!"): (True, "yes"),
    ("es", "Si"): (False, "other"),
    ("es", "No lo sé"): (False, "no"),
    ("es", "Así es"): (True, "other"),
    ("es", "Noche"): (False, "other"),
}


@pytest.mark.parametrize(("language", "meta"), META_ANSWERS, ids=repr)
def test_meta_answers(language: str, meta: str) -> None:
    yes, label = META_ANSWERS[language, meta]
    reward = task_of(form_of(language)).reward(PARIS, "Rome", meta)
    assert (reward.yes, reward.formatted) == (yes, label != "other")
    assert knowing.label(language, meta) == label
    assert yes or label != "yes"  # a clear yes is Yes by the paper's rule too


# Aliases, answer -> right by the paper's rule, and in whole words too.
ANSWERED = {
    (("Paris",), "The capital is PARIS."): (True, True),
    ((), "The capital is PARIS."): (False, False),
    ((), ""): (False, False),
    (("Paris",), ""): (False, False),
    (("Paris",), "Par is"): (False, False),
    (("US",), "It is in the house"): (True, False),
    (("US",), "the US."): (True, True),
    (("a",), "cats"): (True, False),
    (("12",), "1912"): (True, False),
    (("12",), "12/1912"): (True, True),
    (("New York",), "new-york"): (False, False),
    (("New York", "york"), "new-york"): (True, True),
    (("The Beatles",), "the beatles"): (True, True),
    (("Beatle", "The Beatles"), "Beatles"): (True, True),  # without articles
    (("The Beatles",), "Beatles"): (False, False),  # right, but not for the paper
    (("Padm\u00e9",), "padm\u00c9 amidala"): (True, True),
    (("Padm\u00e9",), "Padme"): (False, False),
    (("Jose",), "Jose\u0301"): (True, False),  # an accent in a character of its own
    (("Amidala",), "Amidala's"): (True, True),
    (("AC/DC",), "(AC/DC)"): (True, True),
    (("A",), "A"): (True, True),
    (("A",), "The grade A"): (True, False),  # the price of leaving articles out
    (("\U0001f40e",), "\U0001f40e"): (True, True),
    (("---",), " --- "): (True, True),
    (("---",), "--- or so"): (True, False),
    (("파리",), "파리입니다"): (True, True),
    (("巴黎",), "答案是巴黎。"): (True, True),
    (("パリ",), "それはパリです"): (True, True),
}


@pytest.mark.parametrize(("aliases", "text"), ANSWERED, ids=repr)
def test_right_answers(aliases: tuple[str, ...], text: str) -> None:
    example = {"question": "", "answers": list(aliases)}
    correct, strict = ANSWERED[aliases, text]
    for form in knowing.FORMS:
        task = task_of(form, example)
        said = (text,) if task.meta is None else (text, "")
        reward = task.reward(example, *said)
        assert (reward.correct, reward.strict) == (correct, strict), form


MANY = {"question": "", "answers": [f"The Duke of Somewhere {n}" for n in range(182)]}
"""As many aliases as a question of TriviaQA has."""
SLOW = ("the duke of somewhere 181" + "\ufdfa" * 1_000_000, "\u0130" * 1_000_000)


@pytest.mark.parametrize("form", knowing.FORMS)
def test_hostile_answers_take_milliseconds(form: str) -> None:
    task = task_of(form)
    for text in (*HOSTILE, *LONG, *SLOW, "i am" * 300_000, "i" * 1_000_000):
        said = (text,) if task.meta is None else (text, text)
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            reward = task.reward(MANY, *said)
            taken.append(time.perf_counter() - start)
        assert reward.correct == (text == SLOW[0]), text[:40]
        assert 0 <= reward.value <= 2
        # 2 ms is the aim; the rest is for a busy machine.
        assert min(taken) < 0.02, text[:40]


def test_only_the_beginning_is_looked_at() -> None:
    late = "x " * knowing.READ
    reward = task_of("").reward(PARIS, late + "Paris", late + "yes")
    assert reward == Reward(1.0, False, False, False, False)


META_TEXT = (
    "Do you know the answer to the following question? If you know and are sure about "
    'the answer, just return "Yes". If you don\'t know the answer or are uncertain, '
    'just return "No".\nQuestion: What is the capital of France?\n'
)
DIRECT_TEXT = (
    "Answer the following question with keywords.\n"
    "Question: What is the capital of France?\n"
)


def test_what_is_templated_and_what_is_raw(small_model: Path) -> None:
    tokenizer = jes.load(small_model).tokenizer

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    ours, published, old = (task_of(form) for form in ("", "published", "old"))
    direct = ids(f"<|user|>{DIRECT_TEXT}<|assistant|>")
    for task in (ours, published):
        assert encode(tokenizer, task.prompt(PARIS)) == direct
    templated = ids(f"<|user|>{META_TEXT}<|assistant|>")
    assert encode(tokenizer, ours.meta(PARIS)) == templated
    assert encode(tokenizer, published.meta(PARIS)) == ids(META_TEXT)
    assert published.meta(PARIS) == META_TEXT
    assert old.prompt(PARIS) == [{"role": "user", "content": PARIS["question"]}]
    assert old.meta(PARIS) == (
        "Do you know the answer to the following question?\n"
        "Question: What is the capital of France?\n"
        'Answer: If you know the answer, return "Yes". If you don\'t know the answer, '
        'return "No".\n'
    )


@pytest.mark.parametrize("form", knowing.FORMS)
def test_prompts_hold_the_question_as_it_is(form: str) -> None:
    example = {"question": "Is {this} 100 % {question}?", "answers": []}
    task = task_of(form, example)
    for ask in filter(None, (task.prompt, task.meta)):
        asked = ask(example)
        text = asked if isinstance(asked, str) else asked[0]["content"]
        assert example["question"] in text
        assert text.endswith("\n") or form == "old"
    assert (task.claims is None) == (task.meta is None)
    for word, label in zip(task.claims or (), ("yes", "no"), strict=False):
        # The words that are counted are those asked for.
        assert any(f"{quote}{word}" in text for quote in '"“')
        assert knowing.label(knowing.FORMS[form].language, word) == label


def test_thinking_is_turned_off(small_model: Path) -> None:
    tokenizer = jes.load(small_model).tokenizer
    plain = encode(tokenizer, [{"role": "user", "content": "hi"}])
    off = "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
    tokenizer.chat_template += off
    thought = encode(tokenizer, [{"role": "user", "content": "hi"}])
    assert thought == plain + tokenizer.encode("off", add_special_tokens=False)


ALIASES = ["Paris", None, "", " ", "City of Light"]


def of_languages(english: Any, other: Any) -> dict[str, Any]:
    return {"en": english, "ko": other, "zh_cn": other, "es": other}


def row(data: str, number: int) -> dict[str, Any]:
    """A row in the schema of the hub; the third has no alias."""
    question = f"question {number}?"
    names: list[Any] = ALIASES if number != 2 else []
    if data == "trivia_qa":
        answer = {"aliases": names, "value": "Paris"}
        return {"question": question, "question_id": f"{number}", "answer": answer}
    if data == "nq_open":
        return {"question": question, "answer": names}
    if data == "web_questions":
        return {"url": "", "question": question, "answers": names}
    if data == "freebase_qa":
        answers = [{"AnswersMid": "m.1", "AnswersName": names}]
        parses = [{"Parse-Id": "P0", "InferentialChain": "c", "Answers": answers}] * 2
        return {"RawQuestion": question, "Parses": parses}
    text, *aliases = names or [None]
    answer = {"type": "entity", "text": text, "aliases": aliases or None}
    answers = of_languages(
        [answer], [{**answer, "text": "파리"}] if names else [answer]
    )
    queries = of_languages(question, f"질문 {number}")
    return {"queries": queries, "answers": answers}


def write_sets(root: Path) -> None:
    for data, source in SETS.items():
        table = [row(data, number) for number in range(4)]
        columns = {key: [each[key] for each in table] for key in table[0]}
        folder = root / source.repository.split("/")[-1] / source.config
        for split in filter(None, (source.train, source.test)):
            write_parquet(folder / f"{split}.parquet", columns)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with four rows in every split."""
    folder = tmp_path_factory.mktemp("data")
    write_sets(folder)
    return folder


def test_every_set_has_every_form() -> None:
    assert len(OPEN_TASKS) == len(SETS) * len(knowing.FORMS)
    assert set(OPEN_TASKS) <= set(TASKS)
    for name in ("trivia_qa", "nq_open/published", "mkqa/zh", "web_questions/idk"):
        assert name in OPEN_TASKS


@pytest.mark.parametrize("name", OPEN_TASKS)
def test_rows_become_examples(name: str, root: Path) -> None:
    data, _, form = name.partition("/")
    task = load_task(name, root=str(root))
    trained = data in ("trivia_qa", "web_questions")
    assert (len(task.train), len(task.test)) == (4 if trained else 0, 4)
    assert (task.name, task.max_new_tokens) == (name, 32)
    foreign = data == "mkqa" and form in ("ko", "zh", "es")
    copies = 2 if data == "freebase_qa" else 1
    first = "파리" if foreign else "Paris"
    assert task.test[1] == {
        "question": "질문 1" if foreign else "question 1?",
        "answers": [first, "City of Light"] * copies,
    }
    meta = () if form == "idk" else ("",)
    assert task.reward(task.test[1], f"In {first}.", *meta).strict
    assert task.test[2]["answers"] == []
    for text in ("", " ", "Paris"):
        assert not task.reward(task.test[2], text, *meta).correct


@pytest.mark.parametrize("data", SETS)
def test_missing_data_is_named(data: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        load_task(data, root=str(tmp_path))


def test_rows_that_are_not_as_expected_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mkqa" / "train.parquet"
    columns = {"queries": [{"en": "q"}], "answers": [{"en": None}]}
    write_parquet(path, columns)
    for name, error in {"mkqa": "TypeError", "mkqa/zh": "KeyError: 'zh_cn'"}.items():
        with pytest.raises(InputError, match=f"row 0 is not as expected: {error}"):
            load_task(name, root=str(tmp_path))
    write_parquet(path, {"queries": [{"en": "q"}], "answer": ["a"]})
    with pytest.raises(InputError, match="no column answers; the columns are queries"):
        load_task("mkqa", root=str(tmp_path))


def test_parquet_of_what_the_authors_publish(tmp_path: Path) -> None:
    """As the docstring of `open_questions` makes it."""
    import pandas

    lines = [json.dumps({"example_id": 5, **row("mkqa", n)}) for n in range(4)]
    (tmp_path / "mkqa.jsonl").write_text("\n".join(lines))
    for name in ("mkqa", "freebase_qa"):
        (tmp_path / name).mkdir()
    frame = pandas.read_json(tmp_path / "mkqa.jsonl", lines=True)
    frame.to_parquet(tmp_path / "mkqa" / "train.parquet")
    questions = [row("freebase_qa", n) for n in range(4)]
    frame = pandas.DataFrame(questions)
    frame.to_parquet(tmp_path / "freebase_qa" / "test.parquet")
    for name in ("mkqa", "mkqa/ko", "freebase_qa"):
        task = load_task(name, root=str(tmp_path))
        assert len(task.test) == 4
        assert task.test[1]["answers"][1] == "City of Light"
        assert task.test[2]["answers"] == []


def test_runs_train_on_one_and_watch_others(root: Path, small_model: Path) -> None:
    config = get_config(str(small_model))
    config.data.root = str(root)
    config.task = "trivia_qa"
    config.objective = "esma"
    config.eval_tasks = ("nq_open", "web_questions/published", "trivia_qa/idk")
    config.prompts = 2
    config.buckets = (512,)
    experiment = make_experiment(freeze(config))
    assert list(experiment.evaluations) == ["trivia_qa", *config.eval_tasks]
    for name, (_, questions) in experiment.evaluations.items():
        assert len(questions) == 4
        assert all(bool(q.meta) == (name != "trivia_qa/idk") for q in questions)
    config.task = "nq_open"
    with pytest.raises(InputError, match="task nq_open has no training examples"):
        make_experiment(freeze(config))


def test_evaluation_tells_how_often_it_says_yes(root: Path, small_model: Path) -> None:
    names = ["nq_open", "trivia_qa/idk"]
    scores = evaluate.evaluate(jes.load(small_model), names, data={"root": str(root)})
    said = "hits", "false_alarms"
    for score in scores.values():
        assert np.isfinite([score[name] for name in ("reward", *said)]).all()
    # Random letters do not say "I don't know", which counts as Yes.
    assert sum(scores["trivia_qa/idk"][name] for name in said) == 1


def load_config(variant: str | None) -> Any:
    spec = importlib.util.spec_from_file_location("esma_triviaqa", CONFIG)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def test_every_variant_of_the_config_is_valid() -> None:
    for variant in (None, "1.5b", "3b", "7b", "published", "tiny", "tiny_int4"):
        config = load_config(variant)
        freeze(config)
        assert {config.task, *config.eval_tasks} <= set(TASKS)
    with pytest.raises(ValueError, match="there is no variant 'huge'"):
        load_config("huge")


def test_published_steps_are_of_z_scores_with_ddof_1() -> None:
    config = load_config("published")
    fitness = np.random.default_rng(0).normal(size=config.population)
    published = 5e-4 * (fitness - fitness.mean()) / (fitness.std(ddof=1) + 1e-8)
    ours = config.alpha * np.asarray(jes.shape_fitness(fitness))
    np.testing.assert_allclose(ours, published, rtol=1e-5)
    vector = [1.0, 1.0, 1.0, 0.0]
    shaped = np.sqrt(3 / 4) * np.asarray(jes.shape_fitness(np.array(vector)))
    np.testing.assert_allclose(shaped, [0.5, 0.5, 0.5, -1.5], rtol=1e-6)
