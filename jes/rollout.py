"""Ask: perturb the weights, let every member answer the prompts, score the answers.

Axis letters: C members of a chunk, B prompts, N new tokens, R rows of choices.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.lazy_noise import draw_later
from jes.core.mesh import on_mesh_of
from jes.core.noise import Noise, PyTree
from jes.core.population import draw_deviations, draw_members, draw_overlays, evaluate
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.hosts import exchange
from jes.questions import Evaluation, Question, longest_text, split_prompts
from jes.sampling.continuous_batching import decode_in_slots
from jes.sampling.generate import decode_members, unrolled_centre, unrolled_members
from jes.sampling.likelihood import log_likelihoods, pad_choices
from jes.sampling.prompts import batches
from jes.scoring import (
    Answered,
    Score,
    judge_answers,
    judge_likelihoods,
    score_answers,
    score_likelihoods,
)


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
      params: the centre θ, float32; on a mesh, its devices share the members.
      key: the generation key.
      questions: the prompts, the same for all members.
      noise: how members differ from the centre.
      population: number of members.
      chunk: members held in memory at once, on each device.
      before_chunk: called before each chunk; an exception from it stops the
        generation with nothing changed.

    Returns:
      A `Score` of float64 arrays [population].
    """
    run, score, _ = rollout(evaluation, questions)

    def dispatch(members: np.ndarray) -> jax.Array:
        before_chunk()
        return run(params, key, jnp.asarray(members), noise=noise)

    count = -(-population // jax.process_count())
    first = count * jax.process_index()
    mine = np.minimum(np.arange(first, first + count), population - 1)

    def scored() -> np.ndarray:
        with on_mesh_of(params) as devices:
            at_once = devices * min(chunk, -(-count // devices))
            return np.array(evaluate(dispatch, score, mine, at_once), float)

    rows = np.concatenate(exchange(scored))[:population]
    return Score(*rows.T)


def examine(
    evaluation: Evaluation,
    params: PyTree,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
    key: jax.Array | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Lets the centre itself answer questions, any number of them.

    Returns:
      A `Score` of floats over all questions.
    """
    if not questions:
        raise InputError(f"task {evaluation.task.name} has no examples to evaluate on")
    key = jax.random.key(0) if key is None else key
    texts = [longest_text(question) for question in questions]
    new = evaluation.max_new_tokens if evaluation.mode == "generate" else 0
    plan = batches(texts, batch_size, new, evaluation.buckets, evaluation.parts)
    start = 0
    sums = np.zeros(len(Score._fields))
    for numbers, size in plan:
        chosen = [questions[i] for i in numbers]
        before_batch()
        # The last batch is filled up so that it has the shape of the others.
        run, score, _ = rollout(evaluation, chosen, fill_to=size)
        answers = run(params, jax.random.fold_in(key, start), jnp.zeros(1, int))
        start += len(chosen)
        (one,) = score(answers)
        weights = np.full(len(sums), len(chosen))
        weights[Score._fields.index("tokens")] = 1
        sums += weights * np.array(one)
    sums /= [1 if name == "tokens" else len(questions) for name in Score._fields]
    return Score(*map(float, sums))


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
      members: int [C], held in memory at once.
      noise: how members differ; None for the centre, which may sample its answers.
      batch_size: prompts answered at once.
      before_batch: called before each batch.
    """
    size = -(-len(questions) // -(-len(questions) // batch_size))
    parts = []
    for start in range(0, len(questions), size):
        chosen = questions[start : start + size]
        before_batch()
        run, _, judge = rollout(evaluation, chosen, fill_to=size)
        # Rows sample by their number in the batch. Noise is to be the same in all.
        batch_key = jax.random.fold_in(key, start) if noise is None else key
        parts.append(judge(run(params, batch_key, jnp.asarray(members), noise=noise)))
    return Answered(*(np.concatenate(each, 1) for each in zip(*parts, strict=True)))


def rollout(
    evaluation: Evaluation, questions: Sequence[Question], fill_to: int = 0
) -> tuple[
    Callable[..., jax.Array],
    Callable[[jax.Array], list[Score]],
    Callable[[jax.Array], Answered],
]:
    """The device's part of answering these questions, and the host's.

    The first takes (params, key, members [C], noise) and gives tokens [C, B, N] or
    log-likelihoods [C, R]; of these the second makes a `Score` a member, and the third
    single answers.
    """
    filled = [*questions, *[questions[-1]] * (fill_to - len(questions))]
    model = evaluation.model
    dtype = jnp.dtype(evaluation.dtype)
    centre = _Centre(evaluation)

    def prepared(
        params: PyTree, key: jax.Array, members: jax.Array, noise: Noise | None
    ) -> tuple[PyTree, PyTree]:
        """The members' weights, and None; or how they differ from a centre, and it."""
        if is_quantized(params):
            deviations = None
            if noise is not None:
                deviations = _draw_overlays(params, key, members, noise)
            return deviations, with_dtype(params, dtype)
        if noise is None:
            return None, centre.of(params)
        if noise.rank:
            deviations = _draw_deviations(params, key, members, noise, dtype)
            return deviations, centre.of(params)
        if evaluation.draw == "member":
            return _draw(params, key, members, noise, dtype), None
        return _draw_later(params, key, members, noise, dtype), params

    if evaluation.mode == "likelihood":
        prompts, choices = [q.prompt for q in filled], [q.choices for q in filled]
        batch = pad_choices(prompts, choices, evaluation.buckets, evaluation.parts)

        def rate(
            params: PyTree, key: jax.Array, members: Any, noise: Noise | None = None
        ) -> jax.Array:
            weights, shared = prepared(params, key, members, noise)
            return log_likelihoods(model, weights, batch, len(members), shared)

        return (
            rate,
            partial(score_likelihoods, evaluation, questions, batch),
            partial(judge_likelihoods, evaluation, questions, batch),
        )

    prefix, padded = split_prompts(evaluation, filled)
    decoded: Callable[..., Any] = decode_members
    if 0 < evaluation.slots < len(padded.tokens):
        decoded = partial(
            decode_in_slots,
            slots=evaluation.slots,
            slice_tokens=evaluation.slice_tokens,
        )

    def answer(
        params: PyTree, key: jax.Array, members: jax.Array, noise: Noise | None = None
    ) -> jax.Array:
        weights, shared = prepared(params, key, members, noise)
        # Layers that draw their noise are one program in a loop: it would take minutes
        # to compile them one by one.
        by_layer = evaluation.draw == "layer" and noise is not None and not noise.rank
        if weights is not None and not by_layer:
            weights = unrolled_members(model, weights)
        return decoded(
            model if by_layer else model.unrolled(),
            weights,
            padded,
            _sampling_keys(key, members),
            max_new_tokens=evaluation.max_new_tokens,
            eos_ids=evaluation.eos_ids,
            sampling=evaluation.sampling,
            centre=shared,
            prefix=prefix,
        )

    return (
        answer,
        partial(score_answers, evaluation, questions),
        partial(judge_answers, evaluation, questions),
    )


class _Centre:
    """The weights that members share, or that answer themselves, for all chunks."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.made: tuple[PyTree, PyTree] = (None, None)

    def of(self, params: PyTree) -> PyTree:
        """In the dtype of the answers; where they are generated, layer by layer."""
        if self.made[0] is not params:
            centre = with_dtype(params, jnp.dtype(self.evaluation.dtype))
            if self.evaluation.mode == "generate":
                centre = unrolled_centre(self.evaluation.model, centre)
            self.made = params, centre
        return self.made[1]


@jax.jit
def _sampling_keys(key: jax.Array, members: jax.Array) -> jax.Array:
    """Where answers are sampled, each member draws from a key of its own: [C]."""
    sampling_key = jax.random.fold_in(key, zlib.crc32(b"sampling"))
    return jax.vmap(partial(jax.random.fold_in, sampling_key))(members)


_draw = jax.jit(draw_members, static_argnums=(3, 4))
_draw_later = jax.jit(draw_later, static_argnums=(3, 4))
_draw_overlays = jax.jit(draw_overlays, static_argnums=3)
_draw_deviations = jax.jit(draw_deviations, static_argnums=(3, 4))
