"""From settings to what a run works with: the model, its tasks, the questions."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jes.config import Settings
from jes.core.evolution import Evolution
from jes.core.mesh import make_mesh
from jes.core.noise import PyTree
from jes.core.tree import is_quantized, with_dtype
from jes.errors import InputError
from jes.io.console import console
from jes.models.weights import Pretrained
from jes.quantize import load_base
from jes.questions import (
    Evaluation,
    Question,
    longest,
    padded_lengths,
    prepare,
    prompts_of,
    shape_for,
)
from jes.sampling.generate import Sampling
from jes.sampling.kl import Answers, sample_answers
from jes.sampling.prompts import STEP, TEMPLATE_KWARGS, bucket, common_prefix
from jes.tasks import Asking, Given, Task, load_task
from jes.update import ROUNDINGS, count_trained, flip_rate

ON_TRAIN = " (train)"
"""After a task's name: an evaluation on the training examples."""
SEEN = 32
"""Generations whose questions are looked at to choose one shape for all."""
MANY_FLIPS = 0.1
"""Warn when noise changes more than this share of the codes in a generation."""


class Experiment(NamedTuple):
    """What stays the same over a run.

    Attributes:
      settings: all of them, checked.
      pretrained: the base model.
      parameters: number of weights that are trained.
      evaluation: how members answer the task that is trained.
      train: its questions.
      evaluations: the trained task and those beside it, with held-out questions; with
        `eval_train` the training questions too, see `ON_TRAIN`.
      base_answers: of the base model to some of these, for the KL.
      identity: hashes of what is asked and how it is rewarded, beside the settings.
    """

    settings: Settings
    pretrained: Pretrained
    parameters: int
    evaluation: Evaluation
    train: list[Question]
    evaluations: dict[str, tuple[Evaluation, list[Question]]]
    base_answers: dict[str, Answers]
    identity: dict[str, str]

    @property
    def evolution(self) -> Evolution:
        """The settings of the update."""
        return self.settings.evolution

    @property
    def prompts(self) -> int:
        """Number of questions per generation."""
        return self.settings.prompts or len(self.train)

    @property
    def answers_a_generation(self) -> int:
        """Number of answers that one generation samples and scores."""
        settings = self.settings
        return self.prompts * (1 if settings.method == "sft" else settings.population)


class State(NamedTuple):
    """Where a run is.

    Attributes:
      root: its root key.
      generation: number of generations that have happened.
      params: the centre θ, float32 or codes.
      opt_state: of the optimizer.
    """

    root: jax.Array
    generation: int
    params: PyTree
    opt_state: Any


def make_experiment(settings: Settings, given: Given | None = None) -> Experiment:
    """Loads the model and the tasks, and encodes all prompts.

    `given` is the task in Python, in place of what `settings.task` stands for.

    Raises:
      InputError: if model, tasks, data and settings do not fit together.
    """
    pretrained, name = load_trainable(settings), settings.task
    trained = task_evaluation(
        settings,
        pretrained,
        name,
        given,
        mode=settings.mode,
        sampling=settings.sampling,
        slice_tokens=settings.slice_tokens,
    )
    if settings.objective != "reward" and trained.task.meta is None:
        raise InputError(
            f"objective {settings.objective!r} is for tasks that ask 'do you know', "
            f"and {name} does not"
        )
    train = prepare(trained, trained.task.train)
    if not train:
        raise InputError(f"task {name} has no training examples")
    if settings.prompts > len(train):
        raise InputError(
            f"prompts={settings.prompts}, but {name} has {len(train)} to train on"
        )
    picks = []
    if settings.prompts not in (0, len(train)):
        picks = [picked(settings, len(train), generation) for generation in range(SEEN)]
    # Members may sample their answers; evaluations are greedy.
    sampling = dataclasses.replace(trained.sampling, temperature=0.0)
    greedy = dataclasses.replace(trained, sampling=sampling)
    evaluations = _evaluations(settings, pretrained, greedy)
    if settings.eval_train:
        evaluations[f"{name}{ON_TRAIN}"] = greedy, train
    return Experiment(
        settings=settings,
        pretrained=pretrained,
        parameters=count_trained(pretrained.params, settings.evolution),
        evaluation=one_shape(trained, train, picks),
        train=train,
        evaluations=evaluations,
        base_answers=_base_answers(settings, pretrained, evaluations),
        identity=identity_of(trained.task, train, evaluations),
    )


def identity_of(
    task: Task,
    train: Sequence[Question],
    evaluations: dict[str, tuple[Evaluation, list[Question]]],
) -> dict[str, str]:
    """`Experiment.identity`, by what a message calls each part."""
    found = {"the rows or prompts to train on": digest(train)}
    for name, (_, questions) in evaluations.items():
        found[f"those of {name}"] = digest(questions)
    if task.source:
        found["the reward"] = hashlib.sha256(task.source.encode()).hexdigest()[:16]
    return found


def digest(questions: Sequence[Question]) -> str:
    """A hash of the questions as tokens, with their rows."""
    found = hashlib.sha256()
    for one in questions:
        row = [dict(one.example), one.prompt, one.choices, list(one.meta)]
        found.update(json.dumps(row, default=str, sort_keys=True).encode())
    return found.hexdigest()[:16]


def settled(experiment: Experiment, resolved: Mapping[str, Any]) -> Experiment:
    """The experiment with what was chosen where its settings leave something open."""
    evaluation, settings = experiment.evaluation, experiment.settings
    rates = {name: resolved[name] for name in ("sigma", "alpha") if name in resolved}
    return experiment._replace(
        evaluation=dataclasses.replace(evaluation, slots=resolved.get("slots", 0)),
        settings=dataclasses.replace(settings, **rates),
    )


def load_trainable(settings: Settings) -> Pretrained:
    """The base model, in a form that the settings can train.

    Raises:
      InputError: for `rounding` without codes, or codes without it.
    """
    form, devices = (settings.quantize, settings.group_size), choose_devices(settings)
    pretrained = load_base(settings.model, *form, settings.dtype, devices)
    pretrained = with_template(pretrained, settings)
    quantized, rounding = is_quantized(pretrained.params), settings.rounding
    if quantized and rounding == "none":
        ways = ", ".join(repr(name) for name in ROUNDINGS if name != "none")
        raise InputError(
            f"{settings.model} is quantised: set rounding to one of {ways}"
        )
    if not quantized and rounding != "none":
        raise InputError(
            f"{settings.model} is a float model, which rounding={rounding!r} is not "
            "for: set quantize to 'int4', 'int8' or 'w8a8'"
        )
    share = flip_rate(settings.evolution) if quantized else 0
    if share > MANY_FLIPS:
        console.print(
            f"[yellow]alpha / sigma = {settings.alpha / settings.sigma:.3g} is large: "
            f"noise alone will change about {100 * share:.0f} % of the codes every "
            "generation; a smaller alpha changes fewer[/yellow]"
        )
    return pretrained


def with_template(pretrained: Pretrained, settings: Settings) -> Pretrained:
    """The model with the chat template of the settings, which is saved with it.

    Raises:
      InputError: if the file cannot be read, or the arguments are no JSON object.
    """
    tokenizer = pretrained.tokenizer
    if tokenizer is None or not (settings.chat_template or settings.template_kwargs):
        return pretrained
    if settings.template_kwargs:
        try:
            values = dict(json.loads(settings.template_kwargs))
        except (ValueError, TypeError) as error:
            raise InputError(
                'template_kwargs are JSON, such as {"enable_thinking": true}: not '
                f"{settings.template_kwargs!r}"
            ) from error
        setattr(tokenizer, TEMPLATE_KWARGS, values)
    if not settings.chat_template:
        return pretrained
    try:
        text = Path(settings.chat_template).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template: {error}") from None
    tokenizer.chat_template = text
    files = dict(pretrained.files) | {"chat_template.jinja": text.encode()}
    return dataclasses.replace(pretrained, files=files)


def choose_devices(settings: Settings) -> Mesh | None:
    """The devices of this process that a run uses, as a mesh; None for one.

    Raises:
      InputError: if there are too few, or `model_parallel` does not divide them.
    """
    devices = jax.local_devices()
    if settings.devices > len(devices):
        raise InputError(f"devices={settings.devices}, but there are {len(devices)}")
    if settings.method != "es":
        return None
    try:
        return make_mesh(settings.model_parallel, devices[: settings.devices or None])
    except ValueError as error:
        raise InputError(str(error)) from error


def make_evaluation(
    pretrained: Pretrained,
    task: Task,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    **settings: Any,
) -> Evaluation:
    """How a model answers a task, with its own end tokens; see `Evaluation`.

    Raises:
      InputError: if the model has no tokenizer.
    """
    if pretrained.tokenizer is None:
        raise InputError("the model folder has no tokenizer, which tasks need")
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        sampling=dataclasses.replace(sampling, eos_ids=pretrained.eos_ids),
        **settings,
    )


def task_evaluation(
    settings: Settings,
    pretrained: Pretrained,
    name: str,
    given: Given | None = None,
    **more: Any,
) -> Evaluation:
    """`make_evaluation` for a task by its name, with the settings of a run.

    `given` is a task in Python, in place of what the name stands for.
    """
    task = task_for(
        pretrained,
        name,
        seed=settings.seed,
        asking=settings.asking,
        given=given,
        **dataclasses.asdict(settings.data),
    )
    return make_evaluation(
        pretrained,
        task,
        dtype=settings.dtype,
        draw=settings.draw,
        buckets=settings.buckets,
        **more,
    )


def task_for(
    pretrained: Pretrained,
    name: str,
    asking: Asking = Asking(),  # noqa: B008  frozen
    **options: Any,
) -> Task:
    """`load_task`; text becomes a chat message where the model has a template."""
    chat = getattr(pretrained.tokenizer, "chat_template", None) is not None
    return load_task(name, asking=dataclasses.replace(asking, chat=chat), **options)


def _evaluations(
    settings: Settings, pretrained: Pretrained, trained: Evaluation
) -> dict[str, tuple[Evaluation, list[Question]]]:
    """The trained task and those beside it, with their held-out questions."""
    evaluated = {settings.task: trained} | {
        name: task_evaluation(settings, pretrained, name)
        for name in settings.eval_tasks
    }
    found = {}
    for name, evaluation in evaluated.items():
        found[name] = evaluation, prepare(evaluation, evaluation.task.test)
        if not found[name][1]:
            raise InputError(f"task {name} has no examples to evaluate on")
    return found


def _base_answers(
    settings: Settings,
    pretrained: Pretrained,
    evaluations: dict[str, tuple[Evaluation, list[Question]]],
) -> dict[str, Answers]:
    """Answers that the base model samples to some questions of each task."""
    if not settings.kl_prompts:
        return {}
    params = with_dtype(pretrained.params, jnp.dtype(settings.dtype))
    return {
        name: sample_answers(
            pretrained.model,
            params,
            [question.prompt for question in questions[: settings.kl_prompts]],
            settings.kl_max_new_tokens,
            key=settings.root,
            eos_ids=pretrained.eos_ids,
            batch_size=settings.eval_batch,
            buckets=settings.buckets,
        )
        for name, (_, questions) in evaluations.items()
    }


def one_shape(
    evaluation: Evaluation,
    questions: Sequence[Question],
    picks: Sequence[Sequence[int]] = (),
) -> Evaluation:
    """The evaluation with one shape for all batches: one compiled program.

    Where the prompts share a prefix, one length for that and one for the rest. `picks`
    are the numbers of the questions of some batches; all are one without them.
    """
    prefix, rest = padded_lengths(evaluation, questions)
    evaluation = dataclasses.replace(
        evaluation,
        buckets=(bucket(longest(questions), evaluation.buckets),),
        parts=(prefix, rest) if prefix else (),
    )
    batches = [[questions[i] for i in numbers] for numbers in picks]
    shape = shape_for(evaluation, batches or [questions])
    if shape.blocks:  # where padding costs much, not to the length of a bucket either
        lengths = evaluation.buckets, evaluation.parts
        _, common = common_prefix(prompts_of(evaluation, questions), *lengths)
        most = longest(questions), longest(questions) - common
        whole, own = (count + -count % STEP for count in most)
        parts = (prefix, own) if prefix else ()
        evaluation = dataclasses.replace(evaluation, buckets=(whole,), parts=parts)
        shape = shape_for(evaluation, batches or [questions])
    return dataclasses.replace(evaluation, shape=shape)


def picked(settings: Settings, total: int, generation: int) -> Sequence[int]:
    """The numbers of a generation's questions: drawn without replacement, or all."""
    if settings.prompts in (0, total):
        return range(total)
    rng = np.random.default_rng([settings.seed, generation])
    return rng.choice(total, settings.prompts, replace=False).tolist()


def pick(experiment: Experiment, generation: int) -> list[Question]:
    """The questions of a generation."""
    questions = experiment.train
    numbers = picked(experiment.settings, len(questions), generation)
    return [questions[i] for i in numbers]
