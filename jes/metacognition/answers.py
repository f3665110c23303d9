"""What a model answers, whether it says that it knows, and how sure it seems."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jes.core.noise import PyTree
from jes.core.tree import with_dtype
from jes.errors import InputError
from jes.metacognition.signal_detection import bootstrap, counts, d_prime, report
from jes.questions import Evaluation, Question
from jes.sampling.generate import generate
from jes.sampling.likelihood import log_likelihoods, pad_choices
from jes.sampling.prompts import encode
from jes.scoring import rewards_of
from jes.tasks.task import Example


class Answers(NamedTuple):
    """Greedy answers to Q questions, from which every metric can be computed again.

    Attributes:
      examples: what was asked.
      texts, metas: the answers, and those to the question whether the model knows
        ('' where the task does not ask it apart).
      correct, strict: bool [Q], by the task's lenient and strict match.
      yes: bool [Q], whether the model says that it knows.
      other: bool [Q], whether it says neither clearly yes nor clearly no. It may count
        as yes all the same, where a yes comes late.
      confidence: float64 [Q], log p(yes) - log p(no) in nats as the first words of the
        answer to the second question; NaN where there is none.
    """

    examples: Sequence[Example]
    texts: list[str]
    metas: list[str]
    correct: np.ndarray
    strict: np.ndarray
    yes: np.ndarray
    other: np.ndarray
    confidence: np.ndarray

    def report(self) -> dict[str, float]:
        """The metrics, see `jes.metacognition.report`; and `strict`, the strict
        accuracy."""
        metrics = report(self.correct, self.yes, self.other, self.confidence)
        return {**metrics, "strict": float(self.strict.mean())}

    def d_prime_interval(self) -> tuple[float, float]:
        """A 95 % interval of the log-linear d', over questions."""
        return bootstrap(
            lambda correct, yes: d_prime(counts(correct, yes)), self.correct, self.yes
        )


def collect(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
) -> Answers:
    """Asks the questions, and about them.

    Args:
      evaluation: the model and the task.
      params: the weights, not those of members.
      questions: of the task.
      batch_size: prompts answered at once.

    Raises:
      InputError: if the task does not ask whether the model knows.
    """
    prompts = [q.prompt for q in questions]
    asks = 1 if evaluation.task.meta is None else 2
    if asks == 2:
        prompts += [list(q.meta) for q in questions]
    weights = with_dtype(params, jnp.dtype(evaluation.dtype))
    said = generate(
        evaluation.model,
        weights,
        prompts,
        evaluation.max_new_tokens,
        eos_ids=evaluation.eos_ids,
        batch_size=batch_size,
        buckets=evaluation.buckets,
    )
    count = len(questions)
    texts = [map(tuple, said[k * count :][:count]) for k in range(asks)]
    asked = list(enumerate(zip(*texts, strict=True)))
    earned = rewards_of(evaluation, questions, asked)
    if np.isnan(earned[:, 4]).any():
        raise InputError(
            f"task {evaluation.task.name} does not ask whether the model knows"
        )
    words = evaluation.tokenizer.backend_tokenizer.decode_batch(said)
    return Answers(
        examples=[q.example for q in questions],
        texts=words[:count],
        metas=words[count:] or [""] * count,
        correct=earned[:, 1] == 1,
        strict=earned[:, 2] == 1,
        yes=earned[:, 4] == 1,
        other=earned[:, 3] == 0,
        confidence=confidence(evaluation, weights, questions, batch_size),
    )


def confidence(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    batch_size: int,
) -> np.ndarray:
    """log p(yes) - log p(no) after the second question, float64 [Q].

    Where both words are single tokens this is the difference of their logits; its
    sigmoid is the confidence of 2602.02605. Other spellings are not counted.
    """
    words = evaluation.task.claims
    if words is None:
        return np.full(len(questions), np.nan)
    claims = [encode(evaluation.tokenizer, word) for word in words]
    # Sorted by length, so that few shapes are compiled.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].meta))
    size = min(batch_size, len(questions))
    differences = np.zeros(len(questions))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        filled = chosen + chosen[-1:] * (size - len(chosen))
        batch = pad_choices(
            [list(questions[i].meta) for i in filled],
            [claims] * size,
            evaluation.buckets,
            evaluation.parts,
        )
        (logs,) = log_likelihoods(evaluation.model, None, batch, 1, params)
        yes, no = np.asarray(logs, float).reshape(-1, 2).T
        differences[chosen] = (yes - no)[: len(chosen)]
    return differences


def write(path: Path, answers: Answers) -> None:
    """A CSV file with a row a question."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "example", *Answers._fields[1:]])
        for number, row in enumerate(zip(*answers, strict=True)):
            example, text, meta, *judged, sure = row
            cells = [int(one) for one in judged]
            line = json.dumps(example, ensure_ascii=False)
            writer.writerow([number, line, text, meta, *cells, f"{sure:.6g}"])
