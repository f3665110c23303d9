"""The tasks of the evaluation suite: rows, prompts, extraction, hostile answers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_errors import write_parquet

import jes
from jes.errors import InputError
from jes.sampling.prompts import encode
from jes.tasks import Reward, countdown, extract, gsm8k, load_task, proofwriter, rows

Row = dict[str, Any]


def _options(number: int, count: int) -> list[str]:
    return [f"option{number}.{i}" for i in range(count)]


def arc_row(n: int) -> Row:
    choices = {"text": _options(n, 4), "label": list("ABCD")}
    return {"id": f"{n}", "question": f"Q{n}?", "choices": choices, "answerKey": "B"}


def gsm8k_row(n: int) -> Row:
    return {"question": f"How many is {n}?", "answer": f"So <<{n}={n}>>{n}\n#### {n}"}


def proofwriter_row(n: int) -> Row:
    label = proofwriter.LABELS[n % 3]
    return {"theory": f"Theory {n}.", "question": f"Question {n}.", "answer": label}


def hellaswag_row(n: int) -> Row:
    return {
        "activity_label": f"Activity{n}",
        "ctx": f"Somebody {n}",
        "endings": _options(n, 4),
        "label": str(n % 4),
    }


def piqa_row(n: int) -> Row:
    return {"goal": f"Goal{n}", "sol1": "one", "sol2": "two", "label": n % 2}


def winogrande_row(n: int) -> Row:
    answer = str(n % 2 + 1)
    return {"sentence": "A _", "option1": "x", "option2": "y", "answer": answer}


def mmlu_pro_row(n: int) -> Row:
    return {
        "question": f"Q{n}?",
        "options": _options(n, 10),
        "answer": "ABCDEFGHIJ"[n % 10],
        "category": ("law", "math")[n % 2],
        "cot_content": f"A: Let's think step by step. Worked {n}. The answer is (A).",
    }


# Task -> folder, splits, a row, and the column of the answers.
SETS: dict[str, tuple[str, tuple[str, ...], Callable[[int], Row], str]] = {
    "arc_c_cot": ("ai2_arc/ARC-Challenge", ("train", "test"), arc_row, "answerKey"),
    "gsm8k": ("gsm8k/main", ("train", "test"), gsm8k_row, "answer"),
    "proofwriter": ("proofwriter", ("train", "test"), proofwriter_row, "answer"),
    "hellaswag": ("hellaswag", ("validation",), hellaswag_row, "label"),
    "piqa": ("piqa", ("validation",), piqa_row, "label"),
    "winogrande": (
        "winogrande/winogrande_xl",
        ("validation",),
        winogrande_row,
        "answer",
    ),
    "mmlu_pro": ("mmlu_pro", ("validation", "test"), mmlu_pro_row, "answer"),
}
TRAINED = ("arc_c_cot", "gsm8k", "proofwriter")
COT = ("arc_c_cot", "gsm8k", "mmlu_pro", "proofwriter")


def write(root: Path, name: str, table: list[Row]) -> None:
    folder, splits, _, _ = SETS[name]
    columns = {key: [row[key] for row in table] for key in table[0]}
    for split in splits:
        write_parquet(root / folder / f"{split}.parquet", columns)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with twelve rows in every split."""
    for name, (_, _, row, _) in SETS.items():
        write(tmp_path, name, [row(n) for n in range(12)])
    return tmp_path


@pytest.mark.parametrize("name", SETS)
def test_rows_become_examples(name: str, root: Path) -> None:
    task = load_task(name, root=str(root))
    assert task.name == name
    assert (len(task.train), len(task.test)) == (12 if name in TRAINED else 0, 12)
    assert task.max_new_tokens == (1024 if name in COT else 16)
    assert (task.choices is None) == (name in COT)
    if task.choices is not None and task.answer is not None:
        for example in task.test:
            chosen = task.choices(example)[task.answer(example)]
            assert task.reward(example, chosen) == Reward(1.0, True, True, True)


@pytest.mark.parametrize("name", SETS)
def test_missing_columns_are_named(name: str, tmp_path: Path) -> None:
    _, _, row, column = SETS[name]
    write(tmp_path, name, [{k: v for k, v in row(0).items() if k != column}])
    with pytest.raises(InputError, match=f"no column {column}; the columns are"):
        load_task(name, root=str(tmp_path))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("answer", ["", "Z"])
def test_answers_that_there_are_not_are_named(
    name: str, answer: str, tmp_path: Path
) -> None:
    _, _, row, column = SETS[name]
    write(tmp_path, name, [{**row(0), column: answer}])
    with pytest.raises(InputError):
        load_task(name, root=str(tmp_path))


@pytest.mark.parametrize("name", SETS)
def test_missing_data_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        load_task(name, root=str(tmp_path))


@pytest.mark.parametrize("name", ["hellaswag", "mmlu_pro"])
def test_the_subset_is_fixed(name: str, root: Path) -> None:
    row = SETS[name][2]
    write(root, name, [row(n) for n in range(3000)])
    first, second = (load_task(name, root=str(root), seed=s).test for s in (0, 1))
    assert first == second
    assert len({str(example) for example in first}) == 2048
    asked = [example["question"].strip("Q?").split()[-1] for example in first[:3]]
    assert asked == ["1352", "2595", "886"]  # random.Random(2357).sample


def test_small_sets_are_left_whole() -> None:
    assert rows.subset(list(range(2048))) == list(range(2048))


def test_proofwriter_of_the_hub_is_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Dataset.shuffle(seed=0)` does it."""
    import datasets
    import pyarrow as pa

    table = pa.Table.from_pylist([proofwriter_row(n) for n in range(1500)])
    monkeypatch.setattr(rows, "_from_hub", lambda *_: table)
    task = load_task("proofwriter")
    assert (len(task.train), len(task.test)) == (200, 1000)
    shuffled = datasets.Dataset(table).shuffle(seed=0)
    assert [e["theory"] for e in task.train] == shuffled["theory"][:200]
    assert [e["theory"] for e in task.test] == shuffled["theory"][200:1200]


PROMPTS = {
    "arc_c_cot": (
        ["system", "user"],
        'finish your answer with "The answer is (X)" where X is the correct letter '
        "choice.\n\n\nQuestion: Q0?\nOptions:\nA. option0.0\nB. option0.1\n"
        "C. option0.2\nD. option0.3\nAnswer:",
    ),
    "gsm8k": (
        ["user"],
        "Solve this grade-school math word problem step by step.\n\nProblem: How many "
        "is 0?\n\nWrite short calculations and check the final result.\nOn the last "
        "line, write only: #### <number>",
    ),
    "proofwriter": (["user", "assistant"], "Reasoning:"),
    "hellaswag": (
        ["system", "user"],
        "Activity: Activity0\nContext: Somebody 0\n\nPossible endings:\n0. option0.0\n"
        "1. option0.1\n2. option0.2\n3. option0.3\n\nWhich ending best completes the "
        "scenario?",
    ),
    "piqa": (
        ["system", "user"],
        "Goal: Goal0\n\nPossible solutions:\n1. one\n2. two\n\nWhich solution is more "
        "likely to work?",
    ),
    "winogrande": (
        ["system", "user"],
        "Sentence: A _\n\nPossible fillings:\n1. x\n2. y\n\nWhich filling fits the "
        "blank (_) better?",
    ),
    "mmlu_pro": (
        ["system", "user"],
        "I. option0.8\nJ. option0.9\nAnswer: Let's think step by step.",
    ),
}
SYSTEMS = {
    "arc_c_cot": 'expert. Think step by step and finish your answer with "The answer',
    "hellaswag": "Reply with only the option number: 0, 1, 2, or 3.",
    "piqa": "Choose the better solution by selecting the corresponding number.",
    "winogrande": "Reply with only the option number: 1 or 2.",
    "mmlu_pro": "You are a knowledge expert solving multiple-choice questions.",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, root: Path) -> None:
    task = load_task(name, root=str(root))
    messages = task.prompt(task.test[0])
    roles, end = PROMPTS[name]
    assert [message["role"] for message in messages] == roles
    assert messages[-1]["content"].endswith(end)
    if name in SYSTEMS:
        assert SYSTEMS[name] in messages[0]["content"]


def test_the_prompt_of_proofwriter(root: Path) -> None:
    task = load_task("proofwriter", root=str(root))
    text = task.prompt(task.train[0])[0]["content"]
    assert text.startswith(
        "You are given a theory and a question. Determine whether the question is "
        "entailed by the theory.\n\nFirst write your reasoning.\nOn the last line"
    )
    assert "\nAnswer: True\nAnswer: False\nAnswer: Unknown\nDo not add any" in text
    assert text.endswith("\n\nTheory: Theory 0.\nQuestion: Question 0.")


def test_the_worked_examples_of_mmlu_pro(root: Path) -> None:
    """Five, of the category of the question."""
    task = load_task("mmlu_pro", root=str(root))
    for first, category in enumerate(("law", "math")):
        text = task.prompt(task.test[first])[1]["content"]
        assert text.startswith(
            "The following are multiple choice questions (with answers) about "
            f"{category}. Think step by step and then finish your answer with"
        )
        worked = [f"Worked {n}." in text for n in range(12)]
        assert worked == [n % 2 == first and n < 10 for n in range(12)]
        assert text.count("Answer: Let's think step by step.") == 6
        assert text.count("Question:\n") == 6
    write(root, "mmlu_pro", [mmlu_pro_row(0)])
    folder = root / "mmlu_pro"
    (folder / "validation.parquet").rename(folder / "other.parquet")
    columns = {k: [v] for k, v in mmlu_pro_row(1).items()}
    write_parquet(folder / "validation.parquet", columns)
    with pytest.raises(InputError, match="validation has no category 'law'"):
        load_task("mmlu_pro", root=str(root))


def test_prefills_are_continued(root: Path, small_model: Path) -> None:
    tokenizer = jes.load(small_model).tokenizer
    task = load_task("proofwriter", root=str(root))
    text = tokenizer.decode(encode(tokenizer, task.prompt(task.test[0])))
    assert text.endswith("<|assistant|>Reasoning:")
    prompt = countdown.prompt({"numbers": [1, 2], "target": "3"})
    text = tokenizer.decode(encode(tokenizer, prompt))
    assert text.endswith("<|assistant|>Let me solve this step by step.\n<think>")


def test_options_of_mmlu_pro_that_are_none_are_left_out(root: Path) -> None:
    options = ["one", "two", "N/A", "N/A"]
    write(root, "mmlu_pro", [{**mmlu_pro_row(1), "options": options}])
    task = load_task("mmlu_pro", root=str(root))
    text = task.prompt(task.test[0])[1]["content"]
    assert text.count("Options:\nA. one\nB. two\nAnswer: Let's think") == 2
    write(root, "mmlu_pro", [{**mmlu_pro_row(2), "options": options}])
    with pytest.raises(InputError, match="answer 'C' is not one of A, B"):
        load_task("mmlu_pro", root=str(root))


# Task, text -> what is extracted, whether in the format.
OPTIONS = {
    ("hellaswag", "2"): ("2", True),
    ("hellaswag", " 2\n"): ("2", True),
    ("hellaswag", "Option 1 is wrong, so 3"): ("1", False),
    ("hellaswag", "12"): ("1", False),
    ("hellaswag", "45"): (None, False),
    ("hellaswag", ""): (None, False),
    ("hellaswag", "2" + " " * 10_000): ("2", False),
    ("piqa", "1"): ("1", True),
    ("piqa", "2."): ("2", False),
    ("piqa", "Solution 2"): ("2", False),
    ("piqa", "12"): (None, False),
    ("piqa", "0"): (None, False),
    ("piqa", ""): (None, False),
    ("winogrande", "1"): ("1", True),
    ("winogrande", "**2**"): ("2", False),
    ("winogrande", "12"): (None, False),
}


@pytest.mark.parametrize(("name", "text"), OPTIONS, ids=lambda t: repr(t[:30]))
def test_options(name: str, text: str, root: Path) -> None:
    task = load_task(name, root=str(root))
    assert task.choices is not None
    found, formatted = OPTIONS[name, text]
    for example in task.test[:4]:
        reward = task.reward(example, text)
        correct = example["answer"] == found
        assert reward == Reward(
            float(correct), correct, correct and formatted, formatted
        )


LETTERS = {
    "The answer is (C).": ("C", True),
    "So, the answer is (c)": ("C", True),
    "The answer is (C).\n\n": ("C", True),
    "The answer is (B)? No. The answer is (C).": ("C", True),
    "The answer is (C). Or (B).": ("C", False),
    "Answer is (C)": ("C", False),
    "The answer is C.": ("C", False),
    "The answer is A. No: the answer is (C)!": ("C", False),
    "the answer is clearly (B)": ("C", False),  # of `clearly`, by the published rule
    "B": ("B", False),
    "B or C": ("B", False),
    "A dog is the answer, (C)": ("A", False),
    "a dog": ("A", False),
    "The answer is (J)": (None, False),
    "because": (None, False),
    "": (None, False),
    "Done. " * 10_000 + "The answer is (C).": ("C", True),
}


@pytest.mark.parametrize("text", LETTERS, ids=lambda text: repr(text[:40]))
def test_letters(text: str, root: Path) -> None:
    found, formatted = LETTERS[text]
    assert extract.letter(text, "E") == (found, formatted)
    arc = load_task("arc_c_cot", root=str(root))
    correct = found == "B"
    reward = arc.reward(arc.test[0], text)
    assert reward == Reward(float(correct), correct, correct and formatted, formatted)


def test_letters_of_mmlu_pro_go_to_j(root: Path) -> None:
    task = load_task("mmlu_pro", root=str(root))
    example = next(e for e in task.test if e["answer"] == "J")
    assert task.reward(example, "The answer is (J).") == Reward(1.0, True, True, True)
    assert task.reward(example, "The answer is just (B)") == Reward(
        1.0, True, False, False
    )
    assert task.reward(example, "I am lost: J") == Reward(0.0, False, False, False)


NUMBERS = {
    "#### 1,234": (1234, True),
    "#### -3": (-3, True),
    "####5": (5, True),
    "#### 5.0\n\n": (5, True),
    "text #### 5\n#### 7": (7, True),
    "#### 7\nDone.": (7, False),
    "so #### 7": (7, False),
    "#### $7": (7, False),
    "#### 7 apples": (7, False),
    "#### 3/4": (0.75, False),
    "#### .": (None, False),
    "#### 1.2.3": (1.2, False),
    "\\boxed{3/4}": (0.75, False),
    "\\boxed{1}, no, \\boxed{$1,000}": (1000, False),
    "\\boxed{x}": (None, False),
    "\\boxed{1/0}": (None, False),
    "5 <answer> 50% </answer>": (50, False),
    "5 <answer> none </answer>": (None, False),
    "x 12 then 15": (12, False),
    "It costs $-1,500.": (-1500, False),
    "<think> 3 #### 3 </think> It is 4.": (4, False),
    "<think> 3 </think>\n#### 4": (4, True),
    "no number": (None, False),
    "\u0664": (None, False),
    "": (None, False),
}


@pytest.mark.parametrize("text", NUMBERS, ids=repr)
def test_numbers(text: str) -> None:
    found, formatted = NUMBERS[text]
    assert gsm8k.find(text) == found
    right = {"question": "", "answer": 0.0 if found is None else found}
    correct = found is not None
    value = pytest.approx(0.1 * formatted + correct)
    strict = correct and formatted
    assert gsm8k.reward(right, text) == Reward(value, correct, strict, formatted)
    wrong = {"question": "", "answer": right["answer"] + 1e-5}
    value = pytest.approx(0.1 * formatted)
    assert gsm8k.reward(wrong, text) == Reward(value, False, False, formatted)


TRUTHS = {
    "Answer: true": ("True", True),
    "Reasons.\nAnswer: Unknown\n \n": ("Unknown", True),
    " ANSWER:FALSE ": ("False", True),
    "Answer: True\nAnswer: False": ("False", True),
    "Answer: False\nThat is all.": ("False", False),
    "Answer: False\nTrue": ("False", False),
    "Answer: True.": ("True", False),
    "Final answer: True": ("True", False),
    "Not False.\nThe final answer is: True.": ("True", False),
    "True": ("True", False),
    "**True**": ("True", False),
    "So it is false.": ("False", False),
    "It is true, or false, or unknown to me": ("Unknown", False),
    "True\nDone.": (None, False),  # a single other word on the last line
    "True\nAnswer: maybe": (None, False),
    "untrue": (None, False),
    "It is untrue": (None, False),
    "": (None, False),
}


@pytest.mark.parametrize("text", TRUTHS, ids=repr)
def test_truths(text: str) -> None:
    found, formatted = TRUTHS[text]
    for label in proofwriter.LABELS:
        correct = label == found
        value = pytest.approx(0.1 * formatted + correct)
        expected = Reward(value, correct, correct and formatted, formatted)
        assert proofwriter.reward({"answer": label}, text) == expected


CONCISE = {
    "Paris": Reward(0.0, True, True, True),
    "paris": Reward(0.0, True, True, True),
    "Paris.": Reward(-1.0, True, False, False),
    " Paris. ": Reward(-3.0, True, False, False),
    "Paris..": Reward(-2.0, False, False, False),
    "Lyon!": Reward(0.0, False, False, True),
    "": Reward(-5.0, False, False, False),
    "It is Paris.": Reward(-7.0, False, False, False),
    "x" * 1_000_000: Reward(-999_995.0, False, False, False),
}


@pytest.mark.parametrize("text", CONCISE, ids=lambda text: repr(text[:30]))
def test_conciseness(text: str) -> None:
    task = load_task("conciseness")
    assert (len(task.train), len(task.test), task.max_new_tokens) == (2, 8, 100)
    example = task.test[0]
    question = "What is the capital of France?"
    assert task.prompt(example) == [{"role": "user", "content": question}]
    assert task.reward(example, text) == CONCISE[text]
    for example in (*task.train, *task.test):
        assert task.reward(example, example["answer"]).strict


def test_the_last_of_several() -> None:
    assert extract.last_between("a(1)b(2)c", "(", ")") == "2"
    assert extract.last_between("(1(2)", "(", ")") == "1(2"
    assert extract.last_between("(1)(2", "(", ")") == "1"
    assert extract.last_between(")(", "(", ")") is None
    assert extract.last_line(" a\n b \n \r\n") == "b"
    assert extract.last_line("") == ""


HOSTILE = (
    "x" * 1_000_000,
    "x\n" * 500_000,
    " " * 1_000_000,
    "\n" * 1_000_000,
    "\t \n" * 300_000,
    "." * 1_000_000,
    "," * 1_000_000,
    "9" * 1_000_000,
    "x" + "9" * 1_000_000,
    "9," * 500_000 + "x",
    "#### " * 200_000,
    "####" + " " * 1_000_000,
    "####" + " " * 4000,
    "#### " + "9" * 4000 + "x",
    "\\boxed{" * 100_000,
    "\\boxed{" + "9" * 4000 + "x}",
    "\\boxed{" + "9" * 2000 + "/" + "9" * 2000 + "}",
    "<answer>" * 100_000,
    "<answer></answer>" * 60_000,
    "answer: " * 100_000,
    "answer:\n" * 100_000,
    "answer:" + " " * 1_000_000,
    "Answer:" + " " * 8000 + "x",
    "answer is" + " " * 1_000_000,
    "THE ANSWER IS" + " " * 8000 + "x",
    "the answer is (z)" * 60_000,
    "The answer is (z)." + " " * 8000 + "x",
    "\ud800" * 1_000_000,
    "\x00" * 1_000_000,
    "\ud800\x00\uffff \u2028\x85",
    "\u00df" * 1_000_000,  # two letters in capitals
    "\U0001f600" * 1_000_000,
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_hostile_answers_earn_nothing_in_milliseconds(text: str, root: Path) -> None:
    for name in (*SETS, "conciseness"):
        task = load_task(name, root=str(root))
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            reward = task.reward(task.test[-1], text)
            taken.append(time.perf_counter() - start)
        assert not reward.correct, name
        assert not reward.strict, name
        assert reward.value <= 0.1, name
        assert min(taken) < 2e-3, name
