"""Members answer questions: variables x questions -> tokens, and their scores.

Axis letters: M members of a chunk, N members of a generation, B prompts, C choices.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jes.core.evolution import Evolution
from jes.core.members import Members, by_member
from jes.core.mesh import POPULATION, mesh_of
from jes.core.noise import Noise, PyTree
from jes.core.population import evaluate, perturb_members, sampling_keys
from jes.core.programs import program
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.hosts import exchange, from_all
from jes.io.interrupts import Before, proceed
from jes.questions import (
    Batch,
    Evaluation,
    Question,
    batch_of,
    longest_text,
    rows_of,
    shape_for,
    texts_in,
)
from jes.sampling.continuous_batching import (
    Batching,
    decode_in_slots,
    read_in_slots,
)
from jes.sampling.generate import decode, unrolled, unrolled_params
from jes.sampling.likelihood import Choices, log_likelihoods
from jes.sampling.packing import Shape, computed_tokens, shared_shapes
from jes.sampling.prompts import PromptBatch, batches, bucket
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


def dtype_of_centre(evaluation: Evaluation, evolution: Evolution) -> Any:
    """The dtype of θ that members are asked with.

    Float32; but where θ is made for that, of a displacement, and members share it, no
    other than they answer in.
    """
    shared = evolution.rank or evaluation.draw == "layer"
    return evaluation.dtype if evolution.whole_numbers and shared else jnp.float32


def prepare_rollout(
    evaluation: Evaluation,
    params: PyTree,
    noise: Noise | None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Makes what all members share once for all chunks and batches."""
    shared, dtype = params, jnp.dtype(evaluation.dtype)
    # Members of floats with full-rank noise are perturbed in float32, then cast.
    if noise is None or noise.rank or is_quantized(params):
        if evaluation.mode == "generate" and not is_quantized(params):
            shared = unrolled_params(evaluation.model, params, dtype)
        else:
            shared = with_dtype(params, dtype)
    return Rollout(evaluation, params, shared, noise, mesh)


def members_of(
    rollout: Rollout,
    key: jax.Array,
    numbers: np.ndarray,
    sigmas: np.ndarray | None = None,
) -> Members:
    """These members, in the form that `answer` takes."""
    evaluation, noise = rollout.evaluation, rollout.noise
    apart = evaluation.mode == "generate" and not _lazy(rollout)
    settings = {"dtype": evaluation.dtype, "draw": evaluation.draw, "apart": apart}
    settings |= {"mesh": rollout.mesh, "sigmas": sigmas}
    members = perturb_members(rollout.params, key, numbers, noise, **settings)
    if members.share_params:
        members = members.replace(params=rollout.shared)
        if apart:
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
    if _in_slots(batch, evaluation):
        own = {"slots": evaluation.slots, "slice_tokens": evaluation.slice_tokens}
        batching = Batching(sampling=sampling, **own)
        return decode_in_slots(
            model, members, batch, batching, before_slice=rollout.before
        )
    return decode(model, members, batch, sampling)


def _in_slots(batch: Batch, evaluation: Evaluation) -> TypeGuard[PromptBatch]:
    """Whether a member answers part of its prompts at a time."""
    few = 0 < evaluation.slots < rows_of(batch)
    return few and isinstance(batch, PromptBatch)


def tokens_read(evaluation: Evaluation, batch: Batch) -> int:
    """Tokens, with padding, that a member computes to read the prompts of a batch."""
    if _in_slots(batch, evaluation):
        return read_in_slots(batch, evaluation.slots)
    return computed_tokens(texts_in(batch))


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
    shown: int = 0,
    together: bool = False,
) -> Score:
    """Evaluates the model itself on any number of questions: a `Score` of floats.

    The devices that each hold it share the questions.

    Args:
      evaluation: the model, its task and how to ask.
      params: θ; on a mesh, all devices of 'population' have the same.
      questions: any number.
      batch_size: most questions that a device answers at once.
      key: for sampled answers.
      before_batch: called before batches; an exception stops the evaluation.
      listen: is told, of the first `shown` questions, the number, the answer as text,
        and a row of `answer_rewards`.
      shown: how many.
      together: whether all processes call this, to share the questions.
    """
    if not questions:
        raise InputError(f"task {evaluation.task.name} has no examples to evaluate on")
    key = jax.random.key(0) if key is None else key
    rollout = prepare_rollout(evaluation, params, None)._replace(before=before_batch)
    mesh = mesh_of(params)
    devices = 1 if mesh is None else mesh.shape[POPULATION]
    processes, mine = 1, 0
    if together:
        processes, mine = jax.process_count(), jax.process_index()
    groups = _groups(evaluation, questions, batch_size, devices, processes)
    rewards = np.zeros((len(questions), 5 + len(evaluation.task.parts)))
    texts: dict[str, str] = {}

    def answer_mine() -> np.ndarray:
        totals = np.zeros(2)
        for group in groups[mine::processes]:
            before_batch(f"{evaluation.task.name}: {group[0].start} answers")
            found = _answers_apart(rollout, key, questions, group, mesh)
            for asked, given in zip(group, found, strict=True):
                numbers = np.array(asked.numbers)
                rewards[numbers] = answer_rewards(evaluation, *given)[0]
                cut, count = generated(evaluation, *given)
                totals += len(numbers) * cut[0], count[0]
                if (numbers < shown).any():
                    pairs = zip(numbers, texts_of(evaluation, *given), strict=True)
                    texts.update((str(n), text) for n, text in pairs if n < shown)
        return np.append(rewards, totals)

    if together:  # each question is one process's; the others have zeros for it
        found = exchange(answer_mine).sum(0)
        for each in from_all(lambda: texts):
            texts.update(each)
    else:
        found = answer_mine()
    rewards, (truncated, tokens) = found[:-2].reshape(rewards.shape), found[-2:]
    if listen is not None:
        for number in sorted(map(int, texts)):
            listen(number, texts[str(number)], rewards[number])
    truncated /= len(questions)
    return jax.tree.map(float, mean_score(rewards, truncated, tokens))


class _Asked(NamedTuple):
    """Questions of an evaluation that a device answers at once.

    Attributes:
      start: how many come before, which their sampling depends on.
      numbers: of the questions.
      size: to fill up to.
      longest: tokens of the longest, padded.
      shape: to pack to.
    """

    start: int
    numbers: list[int]
    size: int
    longest: int
    shape: Shape | None


def _groups(
    evaluation: Evaluation,
    questions: Sequence[Question],
    batch_size: int,
    devices: int,
    processes: int,
) -> list[list[_Asked]]:
    """The questions in batches, and like batches in groups, one for each device."""
    texts = [longest_text(question) for question in questions]
    new = evaluation.max_new_tokens if evaluation.mode == "generate" else 0
    lengths = evaluation.buckets, evaluation.parts
    size = min(batch_size, -(-len(questions) // (devices * processes)))
    order, sizes = zip(*batches(texts, size, new, *lengths), strict=True)
    chosen = [[questions[i] for i in numbers] for numbers in order]
    longest = [bucket(max(len(texts[i]) for i in some), lengths[0]) for some in order]
    shapes = shared_shapes(chosen, longest, partial(shape_for, evaluation))
    starts = np.cumsum([0, *map(len, order)])[:-1].tolist()
    groups: list[list[_Asked]] = []
    for asked in map(_Asked, starts, order, sizes, longest, shapes):
        if groups and len(groups[-1]) < devices and asked[2:] == groups[-1][0][2:]:
            groups[-1].append(asked)
        else:
            groups.append([asked])
    return groups


def _answers_apart(
    rollout: Rollout,
    key: jax.Array,
    questions: Sequence[Question],
    group: Sequence[_Asked],
    mesh: Mesh | None,
) -> Iterator[tuple[Sequence[Question], Batch, Any]]:
    """What `score` takes, for each batch of a group, by as many devices."""
    evaluation = rollout.evaluation
    asked = [[questions[i] for i in each.numbers] for each in group]
    made = [
        batch_of(dataclasses.replace(evaluation, shape=each.shape), some, each.size)
        for each, some in zip(group, asked, strict=True)
    ]
    keys = [jax.random.fold_in(key, each.start) for each in group]
    alone = np.zeros(1, int)
    if mesh is not None and len({_form(batch) for batch in made}) == 1:
        model = evaluation.model
        if evaluation.mode == "generate":
            model = model.unrolled()
        # Devices for which there is nothing left answer the first batch too.
        numbers = [*range(len(made)), *[0] * (mesh.shape[POPULATION] - len(made))]
        stacked = jax.tree.map(lambda *x: np.stack([x[i] for i in numbers]), *made)
        own = jnp.concatenate([sampling_keys(keys[i], alone) for i in numbers])
        members = Members({"params": rollout.shared, "noise": {}}, own, mesh)
        answers = _answer_apart(model, members, stacked, evaluation.sampling)
        parts = np.split(np.asarray(answers), len(numbers))[: len(made)]
    else:
        pairs = zip(keys, made, strict=True)
        parts = [np.asarray(answer(rollout, own, alone, x)) for own, x in pairs]
    return zip(asked, made, parts, strict=True)


def _form(batch: Batch) -> Any:
    """What batches that are to be stacked have in common."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(np.shape(leaf) for leaf in leaves)


@program(static_argnames=("model", "sampling"))
@by_member(own=["batches"])
def _answer_apart(model: Any, members: Members, batches: Any, sampling: Any) -> Any:
    """Each member answers a batch of its own: a device the one, or several in turn."""

    def answer_one(number: int) -> jax.Array:
        one = slice(number, number + 1)
        itself = dataclasses.replace(members, keys=members.keys[one])
        batch = jax.tree.map(lambda array: array[number], batches)
        if isinstance(batch, Choices):
            return log_likelihoods(model, itself, batch)
        return decode(model, itself, batch, sampling)

    return jnp.concatenate(list(map(answer_one, range(members.count))))


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
    rollout, parts = rollout._replace(before=before_batch), []
    for start in range(0, len(questions), size):
        before_batch(f"{evaluation.task.name}: {start} answers")
        asked = questions[start : start + size]
        batch = batch_of(evaluation, asked, size)
        # Rows sample by their number in the batch. Noise is to be the same in all.
        own = jax.random.fold_in(key, start) if noise is None else key
        outputs = answer(rollout, own, members, batch)
        parts.append(answered(evaluation, asked, batch, outputs))
    return Answered(*(np.concatenate(each, 1) for each in zip(*parts, strict=True)))
