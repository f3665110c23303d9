"""Questions that are asked twice: for the answer, and whether the model knows it.

ESMA (2602.02605): a direct question, and in a context of its own the meta question "do
you know?". The prompts, in four languages, and the rules for `correct` and `yes` are
those of the published code; `strict` and `formatted` are ours, and show what those
rules miss.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from jes.tasks.task import Example, Prompt, Reward, Task

MAX_NEW_TOKENS = 32
READ = 1024
"""Characters at the start of an answer that are read: more than 32 tokens have."""

DIRECT = {
    "en": "Answer the following question with keywords.\nQuestion: {question}\n",
    "ko": "다음 질문에 대해 키워드로 답변해 주세요.\n질문: {question}\n",
    "zh": "请用关键词回答以下问题。\n问题: {question}\n",
    "es": (
        "Responde a la siguiente pregunta con palabras clave.\nPregunta: {question}\n"
    ),
}
META = {
    "en": (
        "Do you know the answer to the following question? If you know and are sure "
        'about the answer, just return "Yes". If you don\'t know the answer or are '
        'uncertain, just return "No".\nQuestion: {question}\n'
    ),
    "ko": (
        "다음 질문에 대한 답을 알고 있나요? 답을 알고 있고 확실하다면 "
        '"예"라고만 답변해 주세요. 답을 모르거나 확실하지 않다면 '
        '"아니요"라고만 답변해 주세요.\n질문: {question}\n'
    ),
    "zh": (
        "你知道以下问题的答案吗？如果你知道并确定答案，请仅回答“是”。"
        "如果你不知道或不确定，请仅回答“否”。\n问题: {question}\n"
    ),
    "es": (
        "¿Conoces la respuesta a la siguiente pregunta? Si la conoces y estás seguro "
        'de ella, responde únicamente "Sí". Si no la conoces o no estás seguro, '
        'responde únicamente "No".\nPregunta: {question}\n'
    ),
}
IDK = (
    "Answer the following question with keywords. If you don't know the answer, just "
    'return "I don\'t know".\nQuestion: {question}\n'
)
OLD_DIRECT = "{question}"
OLD_META = (
    "Do you know the answer to the following question?\nQuestion: {question}\nAnswer: "
    'If you know the answer, return "Yes". If you don\'t know the answer, return '
    '"No".\n'
)

CLAIMS = {
    "en": ("Yes", "No"),
    "ko": ("예", "아니요"),
    "zh": ("是", "否"),
    "es": ("Sí", "No"),
}
"""The words that the meta prompts ask for. The first, in lower case, counts as Yes
anywhere in a meta answer."""
END = r"(?![^\W_])"
CLEAR = {
    "en": (f"yes{END}", f"(?:i(?: am|'m)? )?(?:no|not|do not|don't){END}"),
    "ko": ("예(?![가-힣])", "아니|(?:저는 )?(?:잘 )?(?:모[르름릅]|몰라)"),
    "zh": ("是(?!否)", "我?[否不没沒]"),
    "es": (f"sí{END}", f"no{END}"),
}
"""How a meta answer begins that is clearly a yes, and clearly a no. A clear yes always
counts as Yes; a clear no may too, by the rule above."""

CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff"
"""Kana, Chinese characters and Hangul syllables: each is a word of its own."""
WORD = re.compile(rf"[{CHARACTERS}]|[^\W_{CHARACTERS}]+")
ARTICLES = ("a", "an", "the")


class Form(NamedTuple):
    """How a question is asked.

    Attributes:
      direct, meta: prompts; without a meta prompt, the direct one asks for "I don't
        know".
      language: of both, a key of `CLAIMS`.
      raw: whether the meta prompt is raw text, without the chat template.
    """

    direct: str
    meta: str | None
    language: str = "en"
    raw: bool = False


FORMS = {
    "": Form(DIRECT["en"], META["en"]),
    "published": Form(DIRECT["en"], META["en"], raw=True),
    "old": Form(OLD_DIRECT, OLD_META, raw=True),
    "idk": Form(IDK, None),
    **{lang: Form(DIRECT[lang], META[lang], lang) for lang in ("ko", "zh", "es")},
}
"""Forms by name; '' is ours, with both prompts in the chat template.

`published` is as the published code: the meta prompt is raw text. `old` has the prompts
up to December 2025. In Korean, Chinese and Spanish the published code has raw text too,
where ours is in the template.
"""


def knowing_task(
    name: str, form: Form, train: Sequence[Example], test: Sequence[Example]
) -> Task:
    """The task that asks questions in this form.

    Args:
      name: of the task.
      form: prompts and language.
      train, test: examples with `question` and `answers`, all aliases that are right.
    """
    settings: dict[str, Any] = {"reward": idk_reward}
    if form.meta is not None:
        settings = {
            "reward": partial(reward, form.language),
            "meta": partial(_asked, form.meta, form.raw),
            "claims": CLAIMS[form.language],
        }
    prompt = partial(_asked, form.direct, False)
    return Task(name, train, test, prompt, max_new_tokens=MAX_NEW_TOKENS, **settings)


def _asked(template: str, raw: bool, example: Example) -> Prompt:
    text = template.format(question=example["question"])
    return text if raw else [{"role": "user", "content": text}]


def reward(language: str, example: Example, text: str, meta: str) -> Reward:
    """The reward of ESMA: a point if right, and one if the meta answer agrees.

    `yes` is whether the yes-word occurs in the lower-cased meta answer; anything else
    is No ("Not sure", a refusal, nothing). It also occurs in "eyes" and "yesterday",
    in Spanish "así", in Korean "예를 들어" ("for example"), in Chinese "不是" ("no").
    `formatted` is whether the meta answer is a clear yes or no; see `label`.
    """
    yes = CLAIMS[language][0].lower() in meta[:READ].lower()
    return _reward(example, text, yes, label(language, meta) != "other")


def idk_reward(example: Example, text: str) -> Reward:
    """The same for a single prompt: Yes unless the answer contains "I don't know".

    With a curly apostrophe too, which the published code misses.
    """
    yes = "i don't know" not in _lower(text)
    return _reward(example, text, yes, True)


def _reward(example: Example, text: str, yes: bool, formatted: bool) -> Reward:
    """Correct if a lower-cased alias is in the lower-cased text (2602.02605).

    Without normalisation, and inside of words: "us" is in "house". Strictly, the words
    of an alias stand in the text, after `normalized`.
    """
    answers, lower = example["answers"], text[:READ].lower()
    correct = any(answer.lower() in lower for answer in answers)
    words = f" {normalized(text[:READ])} " if correct else ""
    strict = any(f" {normalized(answer)} " in words for answer in answers)
    return Reward(float(correct + (correct == yes)), correct, strict, formatted, yes)


def normalized(text: str) -> str:
    """Lower-cased words with single spaces, no punctuation and no articles.

    As for SQuAD (1606.05250), with punctuation as a space, as for TriviaQA
    (1705.03551): "Paris's" has the word "Paris". Unicode is in form NFKC, and accents
    stay. In Chinese, Japanese and Korean, without spaces or with particles, each
    character is a word. A text of articles alone keeps them ("A"), and a text without
    words is unchanged (an emoji).
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    words = WORD.findall(lower)
    kept = [word for word in words if word not in ARTICLES] or words or lower.split()
    return " ".join(kept)


def label(language: str, meta: str) -> str:
    """'yes', 'no' or 'other': how a meta answer begins, after quotes, spaces and marks.

    'no' includes not knowing ("I don't know", "不知道") and longer forms ("不是").
    """
    said = _lower(meta)
    for kind, pattern in zip(("yes", "no"), CLEAR[language], strict=True):
        if re.match(rf"[\W_]*(?:{pattern})", said):
            return kind
    return "other"


def _lower(text: str) -> str:
    return text[:READ].lower().replace("\u2019", "'")
