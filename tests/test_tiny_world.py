"""The tiny world: what is held out, and that rewards are right and safe."""

import time

import numpy as np
import pytest

from jes.tasks import tiny, tiny_facts
from jes.tasks.task import Reward
from jes.tasks.tiny import held_out, tiny_task

HOSTILE = [
    "",
    " ",
    "\n\n",
    "\0",
    "9**9**9**9",
    "9" * 5000,
    "(" * 1000 + "1" + ")" * 1000,
    "(" * 12 + ")" * 12,
    "1/0",
    "-",
    "+1",
    "1+",
    "1--1",
    "()",
    "__import__('os')",
    "\u0661+\u0662",
    "\u00b3",
    "\uff11\uff12",
    "\u00bd",
    "\ud800",
    "=" * 100,
    "a" * 1_000_000,
    "1+" * 500_000,
    "((((1" * 200_000,
    " " * 1_000_000,
    "\U0001f600" * 300_000,
]


ASKED_ONCE = [name for name in tiny.TINY_TASKS if "knows" not in name]


@pytest.fixture(scope="module", params=ASKED_ONCE)
def task(request):
    return tiny_task(request.param)


def test_train_and_test_share_nothing(task):
    for field in ("prompt", "same_as"):
        train = {ex[field] for ex in task.train if field in ex}
        test = {ex[field] for ex in task.test if field in ex}
        assert not train & test
    assert len({ex["prompt"] for ex in task.test}) == len(task.test) == 512
    assert len({ex["prompt"] for ex in task.train}) == len(task.train)


def test_split_does_not_depend_on_the_seed(task):
    other = tiny_task(task.name, seed=7, train_size=64)
    assert not {ex["prompt"] for ex in task.train} & {ex["prompt"] for ex in other.test}
    assert [ex["prompt"] for ex in task.test] != [ex["prompt"] for ex in other.test]


def test_same_seed_gives_the_same_examples(task):
    one, same = (tiny_task(task.name, 3, train_size=64, test_size=64) for _ in "ab")
    assert list(one.train) == list(same.train)
    assert list(one.test) == list(same.test)


def test_the_right_answer_earns_everything(task):
    for example in task.test:
        assert task.reward(example, example["answer"]) == Reward(1.0, True, True, True)
        assert len(example["answer"]) < task.max_new_tokens
        assert len(task.prompt(example)) <= 46


def test_hostile_answers_score_zero_at_once(task):
    for example in task.test[:4]:
        for text in HOSTILE:
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                reward = task.reward(example, text)
                taken.append(time.perf_counter() - start)
            assert not reward.correct, text[:40]
            assert not reward.strict, text[:40]
            assert reward.value <= 0.1, text[:40]
            # 1 ms is the aim; the rest is for a busy machine.
            assert min(taken) < 0.02, text[:40]


def test_choices_hold_the_answer():
    for name in ("tiny/max", "tiny/min", "tiny/rules"):
        task = tiny_task(name, train_size=8, test_size=64)
        for example in task.test:
            right = task.choices(example)[task.answer(example)]
            assert right == example["answer"]


def test_answers_are_right():
    for example in tiny_task("tiny/add").test:
        a, b = map(int, example["prompt"][:-1].split("+"))
        assert int(example["answer"]) == a + b
    for name, best in (("tiny/max", max), ("tiny/min", min)):
        for example in tiny_task(name).test:
            options = example["prompt"][4:-1].split()
            numbers = {o[0]: int(o[2:]) for o in options}
            assert numbers[example["answer"]] == best(numbers.values())


def test_unknown_names_and_too_many_examples_are_refused():
    with pytest.raises(ValueError, match="tiny/nothing"):
        tiny_task("tiny/nothing")
    with pytest.raises(ValueError, match="too few"):
        tiny_task("tiny/subtract", train_size=5000, test_size=1)


@pytest.mark.parametrize(
    ("text", "value", "correct", "strict"),
    [
        ("46", 1.0, True, True),
        (" 46.", 1.0, True, False),
        ("46 and so on", 1.0, True, False),
        ("146", 0.0, False, False),
        ("4 6", 0.0, False, False),
        ("-46", 0.0, False, False),
    ],
)
def test_numbers(text, value, correct, strict):
    reward = tiny.number_reward({"answer": "46"}, text)
    assert reward[:3] == (value, correct, strict)


def test_words_earn_partial_credit():
    example = {"answer": "abcd"}
    assert tiny.word_reward(example, "abcd") == Reward(1.0, True, True, True)
    assert tiny.word_reward(example, " ABCD!") == Reward(1.0, True, False, False)
    assert tiny.word_reward(example, "abdc") == Reward(0.25, False, False, True)
    assert tiny.word_reward(example, "abcde").value == pytest.approx(0.4)
    assert tiny.word_reward(example, "abcd" * 9).value < 0.06


@pytest.mark.parametrize(
    ("text", "correct", "strict"),
    [
        ("b", True, True),
        ("b)12", True, False),
        (" B.", True, False),
        ("(b)", True, False),
        ("bob", False, False),
        ("a b", False, False),
        ("abcb", False, False),
    ],
)
def test_labels(text, correct, strict):
    reward = tiny.label_reward({"answer": "b"}, text)
    assert (reward.correct, reward.strict) == (correct, strict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3*5+7", 1.0),
        ("7+5*3", 1.0),
        ("(3*5)+7", 1.0),
        ("7+(5)*3", 1.0),
        ("3 * 5 + 7 = 22", 0.9),
        ("3*5+7\nmore", 0.9),
        ("22", 0.0),
        ("3*7+1", 0.1),
        ("3*5+7+0", 0.1),
        ("3*5+8", 0.1),
        ("3*5+7)", 0.1),
        ("35+7", 0.0),
        ("3*5+7*", 0.0),
        ("3**5+7", 0.0),
        ("-3*5+7", 0.0),
    ],
)
def test_countdown(text, value):
    example = {"numbers": [3, 5, 7], "target": 22}
    reward = tiny.countdown_reward(example, text)
    assert reward.value == pytest.approx(value)
    assert reward.correct == (value >= 0.9)
    assert reward.strict == (value == 1.0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1-2-3", -4),
        ("1-(2-3)", 2),
        ("2*3+4*5", 26),
        ("2*(3+4)*5", 70),
        ("((7))", 7),
        ("12-30", -18),
        ("100", None),
        ("1+", None),
        ("(1", None),
        ("1)", None),
        ("1 2", None),
        ("", None),
    ],
)
def test_arithmetic(expression, value):
    assert tiny.evaluate(expression) == value


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_arithmetic_agrees_with_python_on_random_text():
    rng = np.random.default_rng(0)
    valid = 0
    for _ in range(20_000):
        text = "".join(rng.choice(list("123+-*()"), rng.integers(1, 8)))
        value = tiny.evaluate(text)
        try:
            expected = eval(text, {})  # of our own characters, in a test
        except (SyntaxError, TypeError):
            assert value is None, text
            continue
        # Python also reads calls, powers, unary signs and three digits.
        assert value is None or value == expected, text
        valid += value is not None
    assert valid > 500


@pytest.mark.parametrize(
    ("name", "trait", "expected"),
    [
        ("Al", "red", "True"),
        ("Al", "big", "True"),
        ("Al", "old", "False"),
        ("Bo", "red", "False"),
        ("Bo", "big", "Unknown"),
        ("Cy", "red", "Unknown"),
    ],
)
def test_rules(name, trait, expected):
    facts = [("Al", "red", True), ("Bo", "red", False)]
    rules = [("big", "old", False), ("red", "big", True)]
    assert tiny.truth(facts, rules, name, trait) == expected


def test_rule_answers_are_balanced():
    rng = np.random.default_rng(0)
    answers = [tiny.draw_rules(rng)["answer"] for _ in range(1000)]
    for truth in tiny.TRUTHS:
        # 1000 draws of probability 1/3: standard deviation 0.015, bound five of them.
        assert abs(answers.count(truth) / len(answers) - 1 / 3) < 0.075


def test_facts_are_one_table():
    facts = tiny_facts.facts()
    assert len({f["key"] for f in facts}) == len(facts) == 3072
    for seen in tiny_facts.CLASSES:
        rows = tiny_facts.facts_seen(seen)
        assert len(rows) == 1024
        assert sum(f["held_out"] for f in rows) == 512
    classes = [f["seen"] for f in tiny_task("tiny/facts").test]
    counts = [classes.count(seen) for seen in tiny_facts.CLASSES]
    assert max(counts) - min(counts) <= 1
    reward = tiny_facts.reward(facts[0], f"It is {facts[0]['answer'].title()}.")
    assert reward.correct
    assert not reward.strict


def test_one_example_in_eight_is_held_out():
    rng = np.random.default_rng(0)
    drawn = [held_out(tiny.KINDS["tiny/max"].draw(rng)) for _ in range(4000)]
    # Standard deviation 0.0052, bound five of them.
    assert abs(np.mean(drawn) - 1 / 8) < 0.026
