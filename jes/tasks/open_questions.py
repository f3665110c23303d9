"""Open questions on facts, with all aliases of the answer: the data of 2602.02605.

| task | on the hub | rows |
|---|---|---|
| `trivia_qa` (1705.03551) | mandarjoshi/trivia_qa, `rc.nocontext` | train, validation |
| `nq_open` (1906.00300) | google-research-datasets/nq_open | validation |
| `web_questions` (Berant et al. 2013) | stanfordnlp/web_questions | train, test |
| `freebase_qa` (Jiang et al. 2019) | KelvinJiang/freebase_qa, a script | test |
| `mkqa` (2007.15207) | apple/mkqa, a script | train, to evaluate on |

each in the forms of `jes.tasks.knowing.FORMS`: `trivia_qa`, `trivia_qa/published`, ...
`mkqa` is asked in the language of the form; of the others only the prompt is.

The paper uses `rc` of TriviaQA, the same rows with texts that it does not need: a
question with both web pages and Wikipedia pages is there twice. Only `trivia_qa` and
`web_questions` can be trained on here; the others are for evaluation.

`datasets` 4 and later does not run the loading scripts of the last two, so they need
`data.root`, with a file made once of what the authors publish:

    import json, pandas  # freebase_qa/test.parquet, of FreebaseQA-eval.json
    rows = json.load(open("FreebaseQA-eval.json"))["Questions"]
    pandas.DataFrame(rows).to_parquet("freebase_qa/test.parquet")

    pandas.read_json("mkqa.jsonl.gz", lines=True).to_parquet("mkqa/train.parquet")

(github.com/kelvin-jiang/FreebaseQA, github.com/apple/ml-mkqa). Columns of the first:
`RawQuestion`, and `Parses`, of which all `AnswersName` count. Of the second: `queries`,
a text for each language, and `answers`, for each language a list of `text` and
`aliases`; its unanswerable questions have none.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jes.errors import InputError
from jes.tasks.knowing import FORMS, knowing_task
from jes.tasks.rows import read_rows
from jes.tasks.task import Example, Task


def _nested_names(parses: Any, within: bool = False) -> Iterator[str]:
    """All texts under `AnswersName`, however the lists and fields are nested."""
    if isinstance(parses, dict):
        for name, value in parses.items():
            yield from _nested_names(value, within or name == "AnswersName")
    elif isinstance(parses, list):
        for value in parses:
            yield from _nested_names(value, within)
    elif within and parses is not None:
        yield parses


def _texts_and_aliases(answers: Any) -> Iterator[str | None]:
    for answer in answers:
        yield answer["text"]
        yield from answer.get("aliases") or ()


class Source(NamedTuple):
    """Where questions come from.

    Attributes:
      repository, config: on the hub.
      train, test: splits to train and to evaluate on; '' for none.
      question, answers: names of the columns.
      aliases: all right answers in a value of the column `answers`; may have gaps.
      by_language: whether the columns hold a value for each language.
    """

    repository: str
    test: str
    question: str = "question"
    answers: str = "answer"
    train: str = ""
    config: str = ""
    aliases: Callable[[Any], Iterable[str | None]] = lambda answers: answers
    by_language: bool = False


SETS = {
    "trivia_qa": Source(
        "mandarjoshi/trivia_qa",
        "validation",
        train="train",
        config="rc.nocontext",
        aliases=lambda answer: answer["aliases"],
    ),
    "nq_open": Source("google-research-datasets/nq_open", "validation"),
    "web_questions": Source(
        "stanfordnlp/web_questions", "test", answers="answers", train="train"
    ),
    "freebase_qa": Source(
        "KelvinJiang/freebase_qa",
        "test",
        question="RawQuestion",
        answers="Parses",
        aliases=_nested_names,
    ),
    "mkqa": Source(
        "apple/mkqa",
        "train",
        question="queries",
        answers="answers",
        aliases=_texts_and_aliases,
        by_language=True,
    ),
}

OPEN_TASKS = tuple(
    f"{data}/{form}".removesuffix("/") for data in SETS for form in FORMS
)


def load(name: str, root: str = "") -> Task:
    """The task of this name, one of `OPEN_TASKS`."""
    data, _, form = name.partition("/")
    source, language = SETS[data], FORMS[form].language
    train = _examples(source, source.train, language, root) if source.train else []
    test = _examples(source, source.test, language, root)
    return knowing_task(name, FORMS[form], train, test)


def _examples(source: Source, split: str, language: str, root: str) -> list[Example]:
    """The rows; one without an alias is kept, and counts as wrong, as in the paper.

    Blank aliases are left out: they would be in every answer.
    """
    columns = (source.question, source.answers)
    rows = read_rows(source.repository, source.config, split, columns, root)
    examples: list[Example] = []
    for number, row in enumerate(rows):
        try:
            question, answers = row[source.question], row[source.answers]
            if source.by_language:
                key = "zh_cn" if language == "zh" else language
                question, answers = question[key], answers[key]
            aliases = [a for a in source.aliases(answers) if a and a.strip()]
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{source.repository} {split}: row {number} is not as expected: "
                f"{type(error).__name__}: {error}"
            ) from error
        examples.append({"question": question, "answers": aliases})
    return examples
