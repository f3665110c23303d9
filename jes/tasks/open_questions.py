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

The paper takes `rc` of TriviaQA, the same rows with texts that are not used: a question
with both web pages and Wikipedia pages is there twice. Only `trivia_qa` and
`web_questions` can be trained on here; the others are for evaluation.

`datasets` 4 and later does not run the loaders of the last two, so they need
`data.root`, with a file made once of what the authors publish:

    import json, pandas  # freebase_qa/test.parquet, of FreebaseQA-eval.json
    rows = json.load(open("FreebaseQA-eval.json"))["Questions"]
    pandas.DataFrame(rows).to_parquet("freebase_qa/test.parquet")

    pandas.read_json("mkqa.jsonl.gz", lines=True).to_parquet("mkqa/train.parquet")

(github.com/kelvin-jiang/FreebaseQA, github.com/apple/ml-mkqa). Columns of the first:
`RawQuestion`, and `Parses`, of which all `AnswersName` count. Of the second: `queries`,
a text a language, and `answers`, for each language a list of `text` and `aliases`; its
unanswerable questions have none.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jes.errors import InputError
from jes.tasks.knowing import FORMS, knowing_task
from jes.tasks.rows import read_rows
from jes.tasks.task import Example, Task

Row = dict[str, Any]
Texts = Iterable[str | None]


class Source(NamedTuple):
    """Where questions come from.

    Attributes:
      repository, config: on the hub.
      train, test: splits to train and to evaluate on; '' for none.
      columns: those that are read.
      question, answers: of a row, in a language; answers may have gaps.
    """

    repository: str
    config: str
    train: str
    test: str
    columns: tuple[str, str]
    question: Callable[[Row, str], str]
    answers: Callable[[Row, str], Texts]


def _names(parses: Any, within: bool = False) -> Iterator[str]:
    """All texts under `AnswersName`, however the lists and fields are nested."""
    if isinstance(parses, dict):
        for name, value in parses.items():
            yield from _names(value, within or name == "AnswersName")
    elif isinstance(parses, list):
        for value in parses:
            yield from _names(value, within)
    elif within and parses is not None:
        yield parses


def _of_language(texts: Row, language: str) -> Any:
    return texts["zh_cn" if language == "zh" else language]


def _mkqa_answers(row: Row, language: str) -> Texts:
    for answer in _of_language(row["answers"], language):
        yield answer["text"]
        yield from answer.get("aliases") or ()


SETS = {
    "trivia_qa": Source(
        "mandarjoshi/trivia_qa",
        "rc.nocontext",
        "train",
        "validation",
        ("question", "answer"),
        lambda row, _: row["question"],
        lambda row, _: row["answer"]["aliases"],
    ),
    "nq_open": Source(
        "google-research-datasets/nq_open",
        "",
        "",
        "validation",
        ("question", "answer"),
        lambda row, _: row["question"],
        lambda row, _: row["answer"],
    ),
    "web_questions": Source(
        "stanfordnlp/web_questions",
        "",
        "train",
        "test",
        ("question", "answers"),
        lambda row, _: row["question"],
        lambda row, _: row["answers"],
    ),
    "freebase_qa": Source(
        "KelvinJiang/freebase_qa",
        "",
        "",
        "test",
        ("RawQuestion", "Parses"),
        lambda row, _: row["RawQuestion"],
        lambda row, _: _names(row["Parses"]),
    ),
    "mkqa": Source(
        "apple/mkqa",
        "",
        "",
        "train",
        ("queries", "answers"),
        lambda row, language: _of_language(row["queries"], language),
        _mkqa_answers,
    ),
}

OPEN_TASKS = tuple(
    f"{data}/{form}".removesuffix("/") for data in SETS for form in FORMS
)


def load(name: str, root: str = "", seed: int = 0) -> Task:
    """The task of this name, one of `OPEN_TASKS`."""
    del seed
    data, _, form = name.partition("/")
    language = FORMS[form].language
    train, test = (
        _examples(SETS[data], split, language, root) if split else ()
        for split in (SETS[data].train, SETS[data].test)
    )
    return knowing_task(name, FORMS[form], train, test)


def _examples(source: Source, split: str, language: str, root: str) -> list[Example]:
    """The rows; one without an alias stays, and is answered wrongly, as in the paper.

    Aliases that are blank are left out: they would be in every answer.
    """
    rows = read_rows(source.repository, source.config, split, source.columns, root)
    examples: list[Example] = []
    for number, row in enumerate(rows):
        try:
            aliases = [a for a in source.answers(row, language) if a and a.strip()]
            question = source.question(row, language)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{source.repository} {split}: row {number} is not as expected: "
                f"{type(error).__name__}: {error}"
            ) from error
        examples.append({"question": question, "answers": aliases})
    return examples
