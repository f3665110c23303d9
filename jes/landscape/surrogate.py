"""A loss that has derivatives where the reward has none: likelihood of right answers.

Rewards are functions of text. What autodiff can tell the curvature of is a surrogate:
minus the log-likelihood of a task's reference answers, as supervised fine-tuning would
take it. Its Hessian is not that of the reward, only of something that the same weights
have to do with.

Axis letters: P examples, a row each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jes.baselines.gradient import mean_gradient
from jes.core.noise import PyTree
from jes.errors import InputError
from jes.landscape.curvature import hvp
from jes.questions import Evaluation, Question
from jes.sampling.likelihood import ChoiceBatch, choice_log_likelihoods, pad_choices
from jes.sampling.prompts import encode
from jes.tasks.task import Example, Task


def reference(task: Task, example: Example) -> str:
    """The text of a right answer: a worked solution, the right choice, or the answer.

    Raises:
      InputError: if the examples of the task have none.
    """
    if "solution" in example:
        return example["solution"]
    if task.choices is not None and task.answer is not None:
        return task.choices(example)[task.answer(example)]
    answer = example.get("answer")
    if not isinstance(answer, str):
        raise InputError(
            f"task {task.name} has no text of a right answer, which a surrogate of its "
            "reward needs"
        )
    return answer


def reference_batch(
    evaluation: Evaluation, questions: Sequence[Question]
) -> ChoiceBatch:
    """Prompts with their reference answers and the end token, a row an example.

    Raises:
      InputError: for a task without such answers, or a row that no bucket holds.
    """
    end = list(evaluation.eos_ids[:1])
    answers = [
        encode(evaluation.tokenizer, reference(evaluation.task, q.example)) + end
        for q in questions
    ]
    try:
        prompts = [question.prompt for question in questions]
        return pad_choices(prompts, [[a] for a in answers], evaluation.buckets)
    except ValueError as error:
        raise InputError(f"{evaluation.task.name}: {error}") from error


def surrogate_loss(model: Any, params: PyTree, batch: ChoiceBatch) -> jax.Array:
    """Minus the log-likelihood of a reference answer in nats, the mean over the rows.

    Args:
      model: a decoder.
      params: its weights, float32 (one set, no member axis).
      batch: from `reference_batch`.
    """
    return -choice_log_likelihoods(model, None, batch, 1, params).mean()


def surrogate_product(
    model: Any, params: PyTree, microbatch: int = 0
) -> Callable[..., jax.Array]:
    """The Hessian of the surrogate as a product for `jes.landscape.lanczos`.

    Args:
      model: a decoder.
      params: its weights; only their shapes matter.
      microbatch: rows whose activations are held at once; a divisor of P, 0 for all.

    Returns:
      A function of a flat vector [D], the weights and the batch, to be traced.
    """
    _, unravel = ravel_pytree(params)

    def product(vector: jax.Array, params: PyTree, batch: ChoiceBatch) -> jax.Array:
        arrays = jax.tree.map(jnp.asarray, batch)

        def slopes(rows: jax.Array) -> tuple[tuple[()], jax.Array]:
            chosen = jax.tree.map(lambda array: array[rows], arrays)
            loss = partial(surrogate_loss, model, batch=chosen)
            return (), ravel_pytree(hvp(loss, params, unravel(vector)))[0]

        rows = jnp.arange(len(batch.scored))
        # Accelerators multiply float32 in fewer bits unless told not to.
        with jax.default_matmul_precision("highest"):
            return mean_gradient(slopes, rows, microbatch)[1]

    return product
