"""Ask: perturb the weights, let every member answer the prompts, score the answers.

Axis letters: C members of a chunk, B prompts, N new tokens, R rows of choices.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.drawn import draw_later
from jes.core.mesh import on_mesh_of
from jes.core.noise import Noise, PyTree
from jes.core.population import (
    draw_deviations,
    draw_members,
    draw_overlays,
    evaluate,
)
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.hosts import exchange
from jes.sampling.generate import (
    GREEDY,
    Sampling,
    decode_members,
    trim,
    unrolled_centre,
    unrolled_members,
)
from jes.sampling.likelihood import (
    ChoiceBatch,
    log_likelihoods,
    pad_choices,
)
from jes.sampling.prompts import BUCKETS, PromptBatch, batches, encode, share
from jes.sampling.slots import decode_in_slots
from jes.tasks.task import Example, Reward, Task

MODES = ("generate", "likelihood")
DRAWS = ("member", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examiner:
    """How a model is examined on a task.

    Attributes:
      model, tokenizer: from `jes.load`.
      task: its prompts and rewards.
      eos_ids: tokens that end an answer.
      mode: 'generate' rewards the generated text; 'likelihood' takes the choice with
        the highest log-likelihood per token as the answer.
      dtype: of the weights that answer. The centre stays in float32 (its master),
        because an ES step is smaller than half a bfloat16 ulp of a typical weight.
      max_new_tokens: longest answer; by default the task's.
      sampling: how the next token is chosen.
      buckets: prompt lengths to pad to.
      draw: when a member's noise is drawn: 'member', all of it before it answers; or
        'layer', again for every pass through a layer, so that of all members' weights
        one layer is there at a time. The numbers are the same.
      parts: lengths to pad what prompts share and the rest to, as for `prompts.share`:
        None for `buckets`, () to compute every prompt in full.
      slots: prompts that a member answers at a time, see `jes.sampling.slots`; 0 for
        all, until the longest answer has ended.
      slice_tokens: most tokens until the host sees to slots that are free.
    """

    model: Any
    tokenizer: Any
    task: Task
    eos_ids: tuple[int, ...]
    mode: str = "generate"
    dtype: Any = jnp.float32
    max_new_tokens: int = 0
    sampling: Sampling = GREEDY
    buckets: tuple[int, ...] = BUCKETS
    draw: str = "member"
    parts: tuple[int, ...] | None = None
    slots: int = 0
    slice_tokens: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {MODES}, not {self.mode!r}")
        if self.draw not in DRAWS:
            raise InputError(f"draw must be one of {DRAWS}, not {self.draw!r}")
        if self.mode == "likelihood" and self.task.meta is not None:
            raise InputError(
                f"task {self.task.name} asks two questions, whose answers must be "
                "generated: use mode 'generate'"
            )
        if self.mode == "likelihood" and self.task.choices is None:
            raise InputError(
                f"task {self.task.name} has no choices: use mode 'generate'"
            )
        if not self.max_new_tokens:
            object.__setattr__(self, "max_new_tokens", self.task.max_new_tokens)


class Question(NamedTuple):
    """An example as token ids; `meta` is empty where the task asks nothing more."""

    example: Example
    prompt: list[int]
    choices: list[list[int]]
    meta: Sequence[int] = ()


class Score(NamedTuple):
    """What a member's answers earned, as means over the prompts; or arrays of these.

    Attributes:
      reward: mean reward, the member's fitness.
      accuracy: share of answers whose leniently extracted answer is right.
      strict: share of answers that are right in the format asked for.
      formatted: share of answers in that format.
      truncated: share of answers cut off at `max_new_tokens`.
      tokens: number of tokens generated.
      hits, false_alarms: shares of the answers that are right, or wrong, and of which
        the model says that it knows them; NaN where the task does not ask for that.
    """

    reward: Any
    accuracy: Any
    strict: Any
    formatted: Any
    truncated: Any
    tokens: Any
    hits: Any = math.nan
    false_alarms: Any = math.nan


def prepare(examiner: Examiner, examples: Sequence[Example]) -> list[Question]:
    """Renders and encodes examples.

    Raises:
      InputError: for a prompt that no bucket holds.
    """
    task, tokenizer = examiner.task, examiner.tokenizer
    questions = []
    for number, example in enumerate(examples):
        prompt = encode(tokenizer, task.prompt(example))
        choices: list[list[int]] = []
        if examiner.mode == "likelihood" and task.choices is not None:
            choices = [encode(tokenizer, choice) for choice in task.choices(example)]
        meta = () if task.meta is None else encode(tokenizer, task.meta(example))
        questions.append(Question(example, prompt, choices, meta))
        length = longest(questions[-1:])
        if length > max(examiner.buckets):
            raise InputError(
                f"{task.name}: the prompt of example {number} has {length} tokens, "
                f"more than the longest bucket ({max(examiner.buckets)}): add a longer "
                "one to `buckets`, or leave such examples out"
            )
    return questions


def longest(questions: Sequence[Question]) -> int:
    """Tokens of the longest prompt, with its longest choice."""
    return max(len(longest_text(question)) for question in questions)


def longest_text(question: Question) -> list[int]:
    """The longer of its two prompts, or the prompt with its longest choice."""
    text = [*question.prompt, *max(question.choices, key=len, default=[])]
    return max(text, list(question.meta), key=len)


def padded_lengths(
    examiner: Examiner, questions: Sequence[Question]
) -> tuple[int, int]:
    """Tokens of what all prompts share, 0 for nothing, and of the rest, both padded."""
    if examiner.mode == "likelihood":
        choices = [question.choices for question in questions]
        prompts = [question.prompt for question in questions]
        batch = pad_choices(prompts, choices, examiner.buckets, examiner.parts)
        prefix, rest = batch.prefix, batch.rows
    else:
        prefix, rest = _shared(examiner, questions)
    return 0 if prefix is None else prefix.tokens.shape[1], rest.tokens.shape[1]


def _shared(
    examiner: Examiner, questions: Sequence[Question]
) -> tuple[PromptBatch | None, PromptBatch]:
    """What the prompts have in common, and the rest of all first, then all second."""
    prompts = [question.prompt for question in questions]
    if examiner.task.meta is not None:
        prompts += [list(question.meta) for question in questions]
    return share(prompts, examiner.buckets, parts=examiner.parts)


def ask(
    examiner: Examiner,
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
      examiner: the model, its task and how to ask.
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
    run, score, _ = _rollout(examiner, questions)

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
    examiner: Examiner,
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
        raise InputError(f"task {examiner.task.name} has no examples to evaluate on")
    key = jax.random.key(0) if key is None else key
    texts = [longest_text(question) for question in questions]
    new = examiner.max_new_tokens if examiner.mode == "generate" else 0
    plan = batches(texts, batch_size, new, examiner.buckets, examiner.parts)
    start = 0
    sums = np.zeros(len(Score._fields))
    for numbers, size in plan:
        chosen = [questions[i] for i in numbers]
        before_batch()
        # The last batch is filled up so that it has the shape of the others.
        run, score, _ = _rollout(examiner, chosen, fill_to=size)
        answers = run(params, jax.random.fold_in(key, start), jnp.zeros(1, int))
        start += len(chosen)
        (one,) = score(answers)
        weights = np.full(len(sums), len(chosen))
        weights[Score._fields.index("tokens")] = 1
        sums += weights * np.array(one)
    sums /= [1 if name == "tokens" else len(questions) for name in Score._fields]
    return Score(*map(float, sums))


class Answered(NamedTuple):
    """Single answers of members.

    Attributes:
      right: bool [C, B], whether the leniently extracted answer is right.
      said: integers [C, B, N], tokens as generated, or with N = 1 the choice taken.
    """

    right: np.ndarray
    said: np.ndarray


def answer_each(
    examiner: Examiner,
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
      examiner, params, key: as for `ask`.
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
        run, _, judge = _rollout(examiner, chosen, fill_to=size)
        # Rows sample by their number in the batch. Noise is to be the same in all.
        batch_key = jax.random.fold_in(key, start) if noise is None else key
        parts.append(judge(run(params, batch_key, jnp.asarray(members), noise=noise)))
    return Answered(*(np.concatenate(each, 1) for each in zip(*parts, strict=True)))


def _rollout(
    examiner: Examiner, questions: Sequence[Question], fill_to: int = 0
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
    model = examiner.model
    dtype = jnp.dtype(examiner.dtype)
    centre = _Centre(examiner)

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
        if examiner.draw == "member":
            return _draw(params, key, members, noise, dtype), None
        return _draw_later(params, key, members, noise, dtype), params

    if examiner.mode == "likelihood":
        prompts, choices = [q.prompt for q in filled], [q.choices for q in filled]
        batch = pad_choices(prompts, choices, examiner.buckets, examiner.parts)

        def rate(
            params: PyTree, key: jax.Array, members: Any, noise: Noise | None = None
        ) -> jax.Array:
            weights, shared = prepared(params, key, members, noise)
            return log_likelihoods(model, weights, batch, len(members), shared)

        return (
            rate,
            partial(_score_likelihoods, examiner, questions, batch),
            partial(_judge_likelihoods, examiner, questions, batch),
        )

    prefix, padded = _shared(examiner, filled)
    decoded: Callable[..., Any] = decode_members
    if 0 < examiner.slots < len(padded.tokens):
        decoded = partial(
            decode_in_slots, slots=examiner.slots, slice_tokens=examiner.slice_tokens
        )

    def answer(
        params: PyTree, key: jax.Array, members: jax.Array, noise: Noise | None = None
    ) -> jax.Array:
        weights, shared = prepared(params, key, members, noise)
        # Layers that draw their noise are one program in a loop: it would take minutes
        # to compile them one by one.
        by_layer = examiner.draw == "layer" and noise is not None and not noise.rank
        if weights is not None and not by_layer:
            weights = unrolled_members(model, weights)
        return decoded(
            model if by_layer else model.unrolled(),
            weights,
            padded,
            _sampling_keys(key, members),
            max_new_tokens=examiner.max_new_tokens,
            eos_ids=examiner.eos_ids,
            sampling=examiner.sampling,
            centre=shared,
            prefix=prefix,
        )

    return (
        answer,
        partial(_score_answers, examiner, questions),
        partial(_judge_answers, examiner, questions),
    )


class _Centre:
    """The weights that members share, or that answer themselves, for all chunks."""

    def __init__(self, examiner: Examiner) -> None:
        self.examiner = examiner
        self.made: tuple[PyTree, PyTree] = (None, None)

    def of(self, params: PyTree) -> PyTree:
        """In the dtype of the answers; where they are generated, layer by layer."""
        if self.made[0] is not params:
            centre = with_dtype(params, jnp.dtype(self.examiner.dtype))
            if self.examiner.mode == "generate":
                centre = unrolled_centre(self.examiner.model, centre)
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


def _score_answers(
    examiner: Examiner, questions: Sequence[Question], answers: jax.Array
) -> list[Score]:
    """Rewards of generated tokens, one `Score` a member.

    Args:
      examiner: as for `ask`.
      questions: B of them.
      answers: [C, P, N]. P is B, where a batch was filled up more, and with a second
        question twice that: first all answers to the first.
    """
    members, earned = _earned(
        examiner, questions, _unfilled(examiner, questions, answers)
    )
    scores = []
    for rows, rewards in zip(members, earned, strict=True):
        lengths = np.array([len(text) for row in rows for text in row])
        truncated = lengths == examiner.max_new_tokens
        generated = int((lengths + ~truncated).sum())
        scores.append(mean_score(rewards, truncated.mean(), generated))
    return scores


def _judge_answers(
    examiner: Examiner, questions: Sequence[Question], answers: jax.Array
) -> Answered:
    """Single answers, of the arguments of `_score_answers`."""
    tokens = _unfilled(examiner, questions, answers)
    _, earned = _earned(examiner, questions, tokens)
    return Answered(earned[..., 1] == 1, tokens[:, 0])


def _unfilled(
    examiner: Examiner, questions: Sequence[Question], answers: jax.Array
) -> np.ndarray:
    """Tokens [C, A, B, N] to the A questions of each prompt, without the filled-up."""
    tokens = np.asarray(answers)
    asks = 1 if examiner.task.meta is None else 2
    tokens = tokens.reshape(len(tokens), asks, -1, tokens.shape[-1])
    return tokens[:, :, : len(questions)]


def _earned(
    examiner: Examiner, questions: Sequence[Question], tokens: np.ndarray
) -> tuple[list[list[tuple[tuple[int, ...], ...]]], np.ndarray]:
    """Each member's answers without their end, and what they earn, [C, B, 5]."""
    members = []
    for rows in tokens:
        texts = [map(tuple, trim(each, examiner.eos_ids)) for each in rows]
        members.append(list(zip(*texts, strict=True)))
    asked = [(i, row) for rows in members for i, row in enumerate(rows)]
    earned = rewards_of(examiner, questions, asked)
    return members, earned.reshape(len(members), len(questions), -1)


def mean_score(rewards: np.ndarray, truncated: float, tokens: int) -> Score:
    """A member's score from the rewards of its answers, float64 [B, 5]."""
    value, correct, strict, formatted, _ = rewards.mean(0)
    right, yes = rewards[:, 1], rewards[:, 4]
    hits, false_alarms = (right * yes).mean(), ((1 - right) * yes).mean()
    return Score(
        value, correct, strict, formatted, truncated, tokens, hits, false_alarms
    )


def rewards_of(
    examiner: Examiner,
    questions: Sequence[Question],
    asked: Sequence[tuple[int, tuple[tuple[int, ...], ...]]],
) -> np.ndarray:
    """What answers earn: the fields of a `Reward`, float64 [R, 5], None as NaN.

    Answers mostly agree: each different one is decoded and scored once.

    Args:
      examiner: the task and the tokenizer.
      questions: what was asked.
      asked: for each of R answers the number of its question, and its tokens without
        the end token: one text, or with a second question two.
    """
    new = list(dict.fromkeys(asked))
    texts = list(dict.fromkeys(text for _, answer in new for text in answer))
    tokenizer = examiner.tokenizer.backend_tokenizer
    decoded = dict(
        zip(texts, tokenizer.decode_batch([list(t) for t in texts]), strict=True)
    )
    earned: dict[Any, Reward] = {}
    for i, answer in new:
        written = (decoded[text] for text in answer)
        earned[i, answer] = examiner.task.reward(questions[i].example, *written)
    return np.array([earned[one] for one in asked], float)


def _score_likelihoods(
    examiner: Examiner,
    questions: Sequence[Question],
    batch: ChoiceBatch,
    log_likelihoods: jax.Array,
) -> list[Score]:
    """Share of right choices by log-likelihood per token, one `Score` a member."""
    answered = _judge_likelihoods(examiner, questions, batch, log_likelihoods)
    shares = answered.right.mean(-1)
    shares[~np.isfinite(np.asarray(log_likelihoods)).all(-1)] = np.nan
    return [Score(share, share, share, 1.0, 0.0, 0) for share in map(float, shares)]


def _judge_likelihoods(
    examiner: Examiner,
    questions: Sequence[Question],
    batch: ChoiceBatch,
    log_likelihoods: jax.Array,
) -> Answered:
    """The choice with the highest log-likelihood per token, and whether it is right."""
    assert examiner.task.answer is not None
    per_token = np.asarray(log_likelihoods) / batch.scored.sum(-1)
    taken = np.stack(
        [per_token[:, batch.owners == i].argmax(-1) for i in range(len(questions))], 1
    )
    right = np.array([examiner.task.answer(q.example) for q in questions])
    return Answered(taken == right, taken[..., None])
