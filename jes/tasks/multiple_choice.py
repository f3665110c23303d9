"""Multiple-choice questions: one table of tasks that differ in rows and wording.

| task | source | rows |
|---|---|---|
| `arc_c`, `arc_c_cot` | ARC-Challenge (1803.05457) | 1119 to train on, 1172 held out |
| `hellaswag` | HellaSwag (1905.07830) | 2048 of 10,042 |
| `piqa` | PIQA (1911.11641) | 1838 |
| `winogrande` | WinoGrande (1907.10641) | 1267 |
| `mmlu_pro` | MMLU-Pro (2406.01574), five worked examples | 2048 of 12,032 |

All but `arc_c` and `winogrande` are prior tasks of 2605.30148, and asked as there;
WinoGrande is asked as that paper asks PIQA. `arc_c_cot` and `mmlu_pro` ask for a chain
of thought, the others for the label alone: it is generated, or the likeliest label is
taken (`mode='likelihood'`).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jes.errors import InputError
from jes.tasks import extract
from jes.tasks.rows import one_of, read_rows, subset
from jes.tasks.task import Example, Prompt, Reward, Task

LETTERS = "ABCDEFGHIJ"
SHOTS = 5
MOST_CHOICES = 5
"""Of a question of ARC, whose letters end at E."""
FINISH = (
    'finish your answer with "The answer is (X)" where X is the correct letter choice.'
)
NUMBER_ONLY = "Reply with only the option number: 1 or 2."
THINK = "Let's think step by step."

# A small letter, or an A, before another word may be the article.
STATED = re.compile(r"\b(?i:answer(?: is|:)?|option)\s*\(?([A-E]|[a-e](?!\s+\w))\b")
ALONE = re.compile(r"\b([B-E]|A(?!\s+(?!(?:is|was|because)\b)[a-z]))\b")


class Kind(NamedTuple):
    """One task.

    Attributes:
      repository, config: of the data set on the hub.
      columns: the columns that are read.
      read: question, options and answer (a label) of a row.
      labels: one for each option; options are listed as '<label>. <option>'.
      system: the system message.
      text: the user's message, a template of `question`, `options` and `columns`.
      find: extracts a label from an answer.
      train, test: splits; '' for none.
      max_new_tokens: of an answer: more than 32 for a chain of thought.
    """

    repository: str
    config: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[str, Sequence[str], str]]
    labels: str
    system: str
    text: str
    find: Callable[[str], extract.Found]
    train: str = ""
    test: str = "validation"
    max_new_tokens: int = 16


def _arc(row: dict[str, Any]) -> tuple[str, Sequence[str], str]:
    # Some rows label their choices 1 to 4: all labels are turned into letters.
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if len(labels) != len(texts) or not 2 <= len(texts) <= MOST_CHOICES:
        raise ValueError(f"{len(texts)} choices with {len(labels)} labels")
    letters = dict(zip(labels, LETTERS, strict=False))
    key = row["answerKey"]
    answer = letters.get(key, f"answerKey {key!r}")
    return row["question"], list(texts), answer


def _mmlu_pro(row: dict[str, Any]) -> tuple[str, Sequence[str], str]:
    # 'N/A' pads the options of some rows, at the end, so that no letter moves.
    options = [option for option in row["options"] if option != "N/A"]
    return row["question"], options, row["answer"]


def _arc_letter(text: str) -> extract.Found:
    """The letter of an answer that should be a letter alone; in the last characters.

    The format lets brackets and a full stop pass. Leniently, the letter after 'answer
    is', else the first letter that stands alone.
    """
    text = text[-4096:]
    strict = re.fullmatch(r"\s*\(?([A-E])\)?\.?\s*", text)
    small = re.fullmatch(r"\s*\(?([a-e])\)?\.?\s*", text)
    found = strict or small or STATED.search(text) or ALONE.search(text)
    return extract.Found(found and found[1].upper(), strict is not None)


_find_1_or_2 = partial(extract.option, options="12", lenient=re.compile(r"\b[12]\b"))

ARC = ("allenai/ai2_arc", "ARC-Challenge", ("question", "choices", "answerKey"), _arc)
KINDS = {
    "arc_c": Kind(
        *ARC,
        labels="ABCDE",
        system="You answer multiple-choice science questions.",
        text=(
            "{question}\n{options}\n\nReply with the letter of the right answer only."
        ),
        find=_arc_letter,
        train="train",
        test="test",
        max_new_tokens=32,
    ),
    "arc_c_cot": Kind(
        *ARC,
        labels="ABCDE",
        system=(
            "You are a science question answering expert. Think step by step and "
            f"{FINISH}"
        ),
        text=(
            "The following are multiple choice science questions. Think step by step "
            f"and then {FINISH}\n\n\n"
            "Question: {question}\nOptions:\n{options}\nAnswer:"
        ),
        find=partial(extract.letter, last="E"),
        train="train",
        test="test",
        max_new_tokens=1024,
    ),
    "hellaswag": Kind(
        "Rowan/hellaswag",
        "",
        ("activity_label", "ctx", "endings", "label"),
        lambda row: (row["ctx"], row["endings"], str(row["label"])),
        labels="0123",
        system=(
            "You are given a situation followed by four possible endings. Choose the "
            "most appropriate ending by selecting the corresponding number. Reply with "
            "only the option number: 0, 1, 2, or 3."
        ),
        text=(
            "Activity: {activity_label}\nContext: {question}\n\n"
            "Possible endings:\n{options}\n\n"
            "Which ending best completes the scenario?"
        ),
        find=partial(extract.option, options="0123", lenient=re.compile("[0123]")),
    ),
    "piqa": Kind(
        "baber/piqa",  # ybisk/piqa is a script, which `datasets` no longer runs
        "",
        ("goal", "sol1", "sol2", "label"),
        lambda row: (
            row["goal"],
            (row["sol1"], row["sol2"]),
            {"0": "1", "1": "2"}.get(str(row["label"]), f"label {row['label']!r}"),
        ),
        labels="12",
        system=(
            "You are given a physical commonsense goal and two possible solutions. "
            "Choose the better solution by selecting the corresponding number. "
            f"{NUMBER_ONLY}"
        ),
        text=(
            "Goal: {question}\n\nPossible solutions:\n{options}\n\n"
            "Which solution is more likely to work?"
        ),
        find=_find_1_or_2,
    ),
    "winogrande": Kind(
        "allenai/winogrande",
        "winogrande_xl",
        ("sentence", "option1", "option2", "answer"),
        lambda row: (
            row["sentence"],
            (row["option1"], row["option2"]),
            str(row["answer"]),
        ),
        labels="12",
        system=(
            "You are given a sentence with a blank and two possible fillings. Choose "
            f"the better filling by selecting the corresponding number. {NUMBER_ONLY}"
        ),
        text=(
            "Sentence: {question}\n\nPossible fillings:\n{options}\n\n"
            "Which filling fits the blank (_) better?"
        ),
        find=_find_1_or_2,
    ),
    "mmlu_pro": Kind(
        "TIGER-Lab/MMLU-Pro",
        "",
        ("question", "options", "answer", "category"),
        _mmlu_pro,
        labels=LETTERS,
        system=(
            "You are a knowledge expert solving multiple-choice questions. Think step "
            f"by step and {FINISH}"
        ),
        text=(
            f"{{worked}}Question:\n{{question}}\nOptions:\n{{options}}\nAnswer: {THINK}"
        ),
        find=partial(extract.letter, last=LETTERS[-1]),
        test="test",
        max_new_tokens=1024,
    ),
}


def load(name: str, root: str = "", published: bool = False) -> Task:
    """One task of `KINDS`; at most 2048 examples are held out, a fixed subset.

    `published` reads answers as 2605.30148 does: thoughts in '<think>' too.

    Raises:
      InputError: if the data cannot be read, or an answer is not among the options.
    """
    kind = KINDS[name]
    train, test = (_examples(kind, split, root) for split in (kind.train, kind.test))
    if name == "mmlu_pro":
        worked = _worked_examples(root)
        if lacking := {example["category"] for example in test} - set(worked):
            raise InputError(f"mmlu_pro: validation has no category {min(lacking)!r}")
        test = [{**e, "worked": worked[e["category"]]} for e in test]
    label_only = kind.max_new_tokens <= 32
    return Task(
        name=f"{name}/published" if published else name,
        train=train,
        test=test,
        prompt=partial(_prompt, kind),
        reward=partial(_reward, kind, published=published),
        max_new_tokens=kind.max_new_tokens,
        choices=partial(_choices, kind) if label_only else None,
        answer=partial(_answer, kind) if label_only else None,
    )


def _example(kind: Kind, row: dict[str, Any]) -> Example:
    try:
        question, options, answer = kind.read(row)
        if not (isinstance(question, str) and all(isinstance(o, str) for o in options)):
            raise TypeError("the question or an option is no text")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        shown = str(row.get(kind.columns[0]))[:40]
        raise InputError(
            f"{kind.repository}: {shown!r} is not as expected: {error}"
        ) from error
    return {**row, "question": question, "options": options, "answer": answer}


def _examples(kind: Kind, split: str, root: str) -> list[Example]:
    if not split:
        return []
    rows = read_rows(kind.repository, kind.config, split, kind.columns, root)
    rows = rows if split == kind.train else subset(rows)
    examples = [_example(kind, row) for row in rows]
    for example in examples:
        where = f"{kind.repository}: {example['question'][:40]!r}"
        one_of(example["answer"], _choices(kind, example), where)
    return examples


def _worked_examples(root: str) -> dict[str, str]:
    """Five solved questions of each category of MMLU-Pro, as its own code has them."""
    kind = KINDS["mmlu_pro"]
    columns = (*kind.columns, "cot_content")
    categories: dict[str, list[Example]] = {}
    for row in read_rows(kind.repository, kind.config, "validation", columns, root):
        categories.setdefault(row["category"], []).append(_example(kind, row))
    return {
        category: (
            f"The following are multiple choice questions (with answers) about "
            f"{category}. Think step by step and then {FINISH}\n\n\n"
        )
        + "".join(
            _text(kind, {**example, "worked": ""}).removesuffix(THINK)
            + example["cot_content"].removeprefix("A: ")
            + "\n\n"
            for example in examples[:SHOTS]
        )
        for category, examples in categories.items()
    }


def _choices(kind: Kind, example: Example) -> str:
    return kind.labels[: len(example["options"])]


def _answer(kind: Kind, example: Example) -> int:
    return kind.labels.index(example["answer"])


def _text(kind: Kind, example: Example) -> str:
    options = zip(kind.labels, example["options"], strict=False)
    listed = "\n".join(f"{label}. {option}" for label, option in options)
    return kind.text.format(**{**example, "options": listed})


def _prompt(kind: Kind, example: Example) -> Prompt:
    return [
        {"role": "system", "content": kind.system},
        {"role": "user", "content": _text(kind, example)},
    ]


def _reward(kind: Kind, example: Example, text: str, published: bool = False) -> Reward:
    """1 if the extracted label is right."""
    find, rule = kind.find, {}
    if not published:
        text = extract.without_thoughts(text)
    if isinstance(find, partial) and find.func is extract.letter:
        rule = {"published": published}
    return extract.graded(find(text, **rule), example["answer"])
