"""Members answer questions: variables x questions -> tokens, and their scores.

Axis letters: M members of a chunk, N members of a generation, B prompts, C choices.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from jes.io.interrupts import Before, proceed
from jes.questions import (
    Batch,
    Evaluation,
    Question,
    batch_of,
    longest_text,
    rows_of,
    shape_for,
)
from jes.sampling.continuous_batching import Batching, decode_in_slots
from jes.sampling.generate import decode, unrolled, unrolled_params
from jes.sampling.likelihood import Choices, log_likelihoods
from jes.sampling.packing import Packed, Shape, shared_shapes
from jes.sampling.prompts import batches, bucket
from jes.scoring import (
    Answered,
    Score,
    answer_rewards,
    answered,
    generated,
    mean_score,
    score,
    texts_of,
)


class Rollout(NamedTuple):
    """What all chunks of a generation have in common.

    `shared` is θ in the form in which members share it; `params` where they do not.
    `before` is called between programs.
    """

    evaluation: Evaluation
    params: PyTree
    shared: PyTree
    noise: Noise | None
    mesh: Mesh | None = None
    before: Before = proceed


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


def members_of(
    rollout: Rollout,
    key: jax.Array,
    numbers: np.ndarray,
    sigmas: np.ndarray | None = None,
) -> Members:
    """These members, in the form that `answer` takes."""
    evaluation, noise = rollout.evaluation, rollout.noise
    settings = {"dtype": evaluation.dtype, "draw": evaluation.draw}
    settings |= {"mesh": rollout.mesh, "sigmas": sigmas}
    members = perturb_members(rollout.params, key, numbers, noise, **settings)
    if members.share_params:
        members = members.replace(params=rollout.shared)
    if evaluation.mode == "generate" and not _lazy(rollout):
        members = unrolled(evaluation.model, members)
    return members


def answer(
    rollout: Rollout,
    key: jax.Array,
    numbers: np.ndarray,
    batch: Batch,
    sigmas: np.ndarray | None = None,
) -> jax.Array | np.ndarray:
    """Answers int32 [M, B, max_new_tokens], or log-likelihoods [M, B, C].

    `sigmas` [M] go before the σ of the noise.
    """
    evaluation = rollout.evaluation
    members = members_of(rollout, key, numbers, sigmas)
    rollout.before("")
    if isinstance(batch, Choices):
        return log_likelihoods(evaluation.model, members, batch)
    # Layers that draw their noise stay in a loop: unrolled, they compile for minutes.
    model = evaluation.model if _lazy(rollout) else evaluation.model.unrolled()
    sampling = evaluation.sampling
    slots, slice_tokens = evaluation.slots, evaluation.slice_tokens
    if 0 < slots < rows_of(batch) and not isinstance(batch, Packed):
        batching = Batching(sampling=sampling, slots=slots, slice_tokens=slice_tokens)
        return decode_in_slots(
            model, members, batch, batching, before_slice=rollout.before
        )
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
    before_chunk: Before = proceed,
) -> Score:
    """Lets every member of a generation answer the questions.

    Several processes each take a part of the members, and all return all scores.

    Args:
      evaluation: the model, its task and how to ask.
      params: θ, float32; on a mesh, its devices share the members.
      key: the generation key.
      questions: the same for all members.
      noise: how members differ.
      population: N.
      chunk: members held in memory at once, on each device.
      before_chunk: called before each chunk, and between its programs; an exception
        stops the generation.

    Returns:
      A `Score` of float64 arrays [N].
    """
    mesh = mesh_of(params)
    devices = 1 if mesh is None else mesh.shape[POPULATION]
    rollout = prepare_rollout(evaluation, params, noise, mesh)
    rollout = rollout._replace(before=before_chunk)
    batch = batch_of(evaluation, questions)

    def dispatch(numbers: np.ndarray) -> jax.Array | np.ndarray:
        before_chunk(f"member {numbers[0] + 1} of {population}")
        return answer(rollout, key, numbers, batch)

    count = -(-population // jax.process_count())
    first = count * jax.process_index()
    mine = np.minimum(np.arange(first, first + count), population - 1)
    at_once = devices * min(chunk, -(-count // devices))
    scored = partial(score, evaluation, questions, batch)
    parts = exchange(
        lambda: np.stack(jax.tree.leaves(evaluate(dispatch, scored, mine, at_once)))
    )
    return Score.of_columns(np.concatenate(parts, 1)[:, :population])


def examine(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
    key: jax.Array | None = None,
    before_batch: Before = proceed,
    listen: Callable[[int, str, np.ndarray], None] | None = None,
) -> Score:
    """Evaluates the model itself on any number of questions: a `Score` of floats.

    `listen` is told each question's number, the answer, and a row of `answer_rewards`.
    """
    if not questions:
        raise InputError(f"task {evaluation.task.name} has no examples to evaluate on")
    key = jax.random.key(0) if key is None else key
    rollout = prepare_rollout(evaluation, params, None)
    texts = [longest_text(question) for question in questions]
    new = evaluation.max_new_tokens if evaluation.mode == "generate" else 0
    lengths = evaluation.buckets, evaluation.parts
    planned = list(batches(texts, batch_size, new, *lengths))
    order, sizes = zip(*planned, strict=True)
    chosen = [[questions[i] for i in numbers] for numbers in order]
    longest = [bucket(max(len(texts[i]) for i in some), lengths[0]) for some in order]
    shapes = shared_shapes(chosen, longest, partial(shape_for, evaluation))
    plan = zip(chosen, sizes, shapes, strict=True)
    answers = _answers(rollout, key, plan, np.zeros(1, int), before_batch)
    rewards, truncated, tokens = [], 0.0, 0.0
    for (numbers, _), given in zip(planned, answers, strict=True):
        rewards.append(answer_rewards(evaluation, *given)[0])
        cut, count = generated(evaluation, *given)
        truncated += len(numbers) * cut[0]
        tokens += count[0]
        if listen is not None:
            said = texts_of(evaluation, *given)
            for one in zip(numbers, said, rewards[-1], strict=True):
                listen(*one)
    truncated /= len(questions)
    return jax.tree.map(float, mean_score(np.concatenate(rewards), truncated, tokens))


def _answers(
    rollout: Rollout,
    key: jax.Array,
    plan: Iterable[tuple[Sequence[Question], int, Shape | None]],
    members: np.ndarray,
    before_batch: Before,
) -> Iterator[tuple[Sequence[Question], Batch, Any]]:
    """For each batch of the plan its questions, the batch and what is answered."""
    start, rollout = 0, rollout._replace(before=before_batch)
    for chosen, size, shape in plan:
        before_batch(f"{rollout.evaluation.task.name}: {start} answers")
        evaluation = dataclasses.replace(rollout.evaluation, shape=shape)
        batch = batch_of(evaluation, chosen, size)
        # Rows sample by their number in the batch. Noise is to be the same in all.
        batch_key = jax.random.fold_in(key, start) if rollout.noise is None else key
        yield chosen, batch, answer(rollout, batch_key, members, batch)
        start += len(chosen)


def answer_each(
    evaluation: Evaluation,
    params: PyTree,
    key: jax.Array,
    questions: Sequence[Question],
    members: np.ndarray,
    *,
    noise: Noise | None,
    batch_size: int = 256,
    before_batch: Before = proceed,
) -> Answered:
    """What members [M], in memory at once, answer to any number of questions.

    They are asked in even batches of at most `batch_size`. Without noise the model
    itself answers, and may sample. Other arguments are those of `ask`.
    """
    rollout = prepare_rollout(evaluation, params, noise)
    size = -(-len(questions) // -(-len(questions) // batch_size))
    starts = range(0, len(questions), size)
    shape = evaluation.shape
    plan = [(questions[start : start + size], size, shape) for start in starts]
    parts = [
        answered(evaluation, *given)
        for given in _answers(rollout, key, plan, members, before_batch)
    ]
    return Answered(*(np.concatenate(each, 1) for each in zip(*parts, strict=True)))
