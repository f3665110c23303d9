"""Members answer questions: variables x questions -> tokens, and their scores.

Axis letters: M members of a chunk, N members of a generation, B prompts, R rows of
choices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jes.core.members import Members
from jes.core.mesh import POPULATION, mesh_of
from jes.core.noise import Noise, PyTree
from jes.core.population import evaluate, perturb_members
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.hosts import exchange
from jes.questions import Evaluation, Question, batch_of, longest_text
from jes.sampling.continuous_batching import Batching, decode_in_slots
from jes.sampling.generate import decode, unrolled, unrolled_params
from jes.sampling.likelihood import ChoiceBatch, log_likelihoods
from jes.sampling.prompts import PromptBatch, batches
from jes.scoring import Answered, Score, answered, score


class Rollout(NamedTuple):
    """What all chunks of a generation have in common.

    Attributes:
      evaluation: the model, its task and how to ask.
      params: θ, float32.
      shared: θ in the form in which members share it; `params` where they do not.
      noise: how members differ; None for the model itself.
      mesh: that members are spread over.
    """

    evaluation: Evaluation
    params: PyTree
    shared: PyTree
    noise: Noise | None
    mesh: Mesh | None = None


def prepare_rollout(
    evaluation: Evaluation,
    params: PyTree,
    noise: Noise | None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Makes what all members share once for all chunks and batches."""
    shared = params
    # Members of floats with full-rank noise are perturbed in float32, then cast.
    if noise is None or noise.rank or is_quantized(params):
        shared = with_dtype(params, jnp.dtype(evaluation.dtype))
        if evaluation.mode == "generate" and not is_quantized(params):
            shared = unrolled_params(evaluation.model, shared)
    return Rollout(evaluation, params, shared, noise, mesh)


def members_of(rollout: Rollout, key: jax.Array, numbers: np.ndarray) -> Members:
    """These members, in the form that `answer` takes."""
    evaluation = rollout.evaluation
    members = perturb_members(
        rollout.params,
        key,
        numbers,
        rollout.noise,
        dtype=evaluation.dtype,
        draw=evaluation.draw,
        mesh=rollout.mesh,
    )
    if members.share_params:
        members = members.replace(params=rollout.shared)
    if evaluation.mode == "generate" and not _lazy(rollout):
        members = unrolled(evaluation.model, members)
    return members


def answer(
    rollout: Rollout,
    key: jax.Array,
    numbers: np.ndarray,
    batch: PromptBatch | ChoiceBatch,
) -> jax.Array | np.ndarray:
    """Lets members answer a batch.

    Returns:
      Tokens int32 [M, B, max_new_tokens], or log-likelihoods of choices [M, R].
    """
    evaluation = rollout.evaluation
    members = members_of(rollout, key, numbers)
    if isinstance(batch, ChoiceBatch):
        return log_likelihoods(evaluation.model, members, batch)
    # Layers that draw their noise stay one program in a loop: one by one, they would
    # take minutes to compile.
    model = evaluation.model if _lazy(rollout) else evaluation.model.unrolled()
    sampling = evaluation.sampling
    if 0 < evaluation.slots < len(batch.tokens):
        batching = Batching(
            sampling=sampling,
            slots=evaluation.slots,
            slice_tokens=evaluation.slice_tokens,
        )
        return decode_in_slots(model, members, batch, batching)
    return decode(model, members, batch, sampling)


def _lazy(rollout: Rollout) -> bool:
    """Whether layers draw the noise."""
    noise = rollout.noise
    return rollout.evaluation.draw == "layer" and noise is not None and not noise.rank


def ask(
    evaluation: Evaluation,
    params: PyTree,
    key: jax.Array,
    questions: Sequence[Question],
    *,
    noise: Noise,
    population: int,
    chunk: int,
    before_chunk: Callable[[], None] = lambda: None,
) -> Score:
    """Lets every member of a generation answer the questions.

    Several processes each take a part of the members, and all return all scores.

    Args:
      evaluation: the model, its task and how to ask.
      params: θ, float32; on a mesh, its devices share the members.
      key: the generation key.
      questions: the prompts, the same for all members.
      noise: how members differ.
      population: N.
      chunk: members held in memory at once, on each device.
      before_chunk: called before each chunk; an exception from it stops the
        generation with nothing changed.

    Returns:
      A `Score` of float64 arrays [N].
    """
    mesh = mesh_of(params)
    devices = 1 if mesh is None else mesh.shape[POPULATION]
    rollout = prepare_rollout(evaluation, params, noise, mesh)
    batch = batch_of(evaluation, questions)

    def dispatch(numbers: np.ndarray) -> jax.Array | np.ndarray:
        before_chunk()
        return answer(rollout, key, numbers, batch)

    count = -(-population // jax.process_count())
    first = count * jax.process_index()
    mine = np.minimum(np.arange(first, first + count), population - 1)
    at_once = devices * min(chunk, -(-count // devices))
    scored = partial(score, evaluation, questions, batch)
    parts = exchange(lambda: np.stack(evaluate(dispatch, scored, mine, at_once)))
    return Score(*np.concatenate(parts, 1)[:, :population])


def examine(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
    key: jax.Array | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Evaluates the model itself on any number of questions.

    Returns:
      A `Score` of floats over all questions.
    """
    if not questions:
        raise InputError(f"task {evaluation.task.name} has no examples to evaluate on")
    key = jax.random.key(0) if key is None else key
    rollout = prepare_rollout(evaluation, params, None)
    texts = [longest_text(question) for question in questions]
    new = evaluation.max_new_tokens if evaluation.mode == "generate" else 0
    start, sums = 0, np.zeros(len(Score._fields))
    tokens = np.array(Score._fields) == "tokens"
    for numbers, size in batches(
        texts, batch_size, new, evaluation.buckets, evaluation.parts
    ):
        chosen = [questions[i] for i in numbers]
        before_batch()
        batch = batch_of(evaluation, chosen, size)
        batch_key = jax.random.fold_in(key, start)
        outputs = answer(rollout, batch_key, np.zeros(1, int), batch)
        start += len(chosen)
        means = np.stack(score(evaluation, chosen, batch, outputs))[:, 0]
        sums += np.where(tokens, 1, len(chosen)) * means
    return Score(*map(float, sums / np.where(tokens, 1, len(questions))))


def answer_each(
    evaluation: Evaluation,
    params: PyTree,
    key: jax.Array,
    questions: Sequence[Question],
    members: np.ndarray,
    *,
    noise: Noise | None,
    batch_size: int = 256,
    before_batch: Callable[[], None] = lambda: None,
) -> Answered:
    """What each of some members answers to each of any number of questions.

    Args:
      evaluation, params, key: as for `ask`.
      questions: B of them, asked in batches of about `batch_size`.
      members: int [M], held in memory at once.
      noise: how members differ; None for the model itself, which may sample.
      batch_size: prompts answered at once.
      before_batch: called before each batch.
    """
    rollout = prepare_rollout(evaluation, params, noise)
    size = -(-len(questions) // -(-len(questions) // batch_size))
    parts = []
    for start in range(0, len(questions), size):
        chosen = questions[start : start + size]
        before_batch()
        batch = batch_of(evaluation, chosen, size)
        # Rows sample by their number in the batch. Noise is to be the same in all.
        batch_key = jax.random.fold_in(key, start) if noise is None else key
        outputs = answer(rollout, batch_key, members, batch)
        parts.append(answered(evaluation, chosen, batch, outputs))
    return Answered(*(np.concatenate(each, 1) for each in zip(*parts, strict=True)))
