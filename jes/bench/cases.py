"""What is measured: a model, what it is asked, and the work of answering."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.evolution import Evolution
from jes.core.noise import Noise, generation_key
from jes.io import memory
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.models.weights import Pretrained, load
from jes.questions import Evaluation, Question
from jes.rollout import ask, examine
from jes.sampling.generate import Sampling
from jes.tasks.task import Reward, Task
from jes.update import first_state, tell

MEMBERS = 16
"""Of a generation that is timed."""


class Case(NamedTuple):
    """A model and what it is asked: `rows` prompts of `prompt` tokens, `new` new."""

    name: str
    pretrained: Pretrained
    rows: int
    prompt: int
    new: int


def examination(
    case: Case, mode: str = "generate", draw: str = "member"
) -> tuple[Evaluation, list[Question]]:
    """Random prompts to a task whose rewards cost as little as a lookup."""
    task = Task(
        name="bench",
        train=(),
        test=(),
        prompt=lambda example: "",
        reward=lambda example, text: Reward(len(text) % 7, False, False, False),
        choices=lambda example: ["a", "b"],
        answer=lambda example: 0,
        max_new_tokens=case.new,
    )
    evaluation = Evaluation(
        model=case.pretrained.model,
        tokenizer=case.pretrained.tokenizer,
        task=task,
        sampling=Sampling(),
        mode=mode,
        draw=draw,
        buckets=(case.prompt + (mode == "likelihood"),),
    )
    rng = np.random.default_rng(0)
    vocabulary = case.pretrained.config.vocab_size
    prompts = rng.integers(0, vocabulary, (case.rows, case.prompt)).tolist()
    choices = [[1], [2]] if mode == "likelihood" else []
    return evaluation, [Question({}, prompt, choices) for prompt in prompts]


def generation(
    case: Case,
    evolution: Evolution,
    *,
    update: bool = True,
    chunk: int = 0,
    mode: str = "generate",
    draw: str = "member",
) -> Callable[[], Any]:
    """A function that runs one generation, on a copy of the weights.

    Args:
      case: the model and what it is asked.
      evolution: settings.
      update: whether it is ask and tell, or `ask` alone.
      chunk: members held at once; 0 for what fits.
      mode, draw: see `Evaluation`.
    """
    evaluation, questions = examination(case, mode, draw)
    params = jax.tree.map(jnp.array, case.pretrained.params)
    state = first_state(evolution, params)
    chunk = chunk or fitting(
        case, evolution.noise, evolution.population, evaluation.dtype
    )
    key = generation_key(jax.random.key(0), 0)

    def run() -> Any:
        nonlocal params, state
        scores = ask(
            evaluation,
            params,
            key,
            questions,
            noise=evolution.noise,
            population=evolution.population,
            chunk=chunk,
        )
        if not update:
            return scores.reward
        params, state = tell(evolution, params, state, key, scores.reward)
        return params

    return run


def fitting(case: Case, noise: Noise, members: int, dtype: Any) -> int:
    """How many of the members to hold at once."""
    config, params = case.pretrained.config, case.pretrained.params
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return memory.choose_chunk(
        config,
        memory.weight_bytes(config, parameters, dtype, noise if noise.rank else None),
        dtype,
        case.rows,
        case.prompt,
        case.new,
        population=members,
        budget=memory.free_bytes(),
    )


def settings(members: int, law: str) -> Evolution:
    """Of the generations that are timed, which leave the weights as they are."""
    return Evolution(population=members, sigma=1e-3, alpha=0.0, distribution=law)


def unperturbed(case: Case, mode: str = "generate") -> Callable[[], Any]:
    """A function that answers the prompts with the weights as they are."""
    evaluation, questions = examination(case, mode)
    params = case.pretrained.params
    return lambda: examine(evaluation, params, questions, batch_size=case.rows)


def random_model(like: Pretrained, **shape: int) -> Pretrained:
    """A model with random weights of another shape, with the same tokenizer."""
    hf_config = {**like.hf_config, **shape}
    config = ModelConfig.from_hf(hf_config)
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return dataclasses.replace(
        like, model=model, params=params, config=config, hf_config=hf_config
    )


def larger_model() -> Pretrained:
    """4.5M random weights, with the embedded model's tokenizer."""
    return random_model(
        load("tiny"), hidden_size=256, num_hidden_layers=6, intermediate_size=704
    )


def qwen_shape() -> Pretrained:
    """Random weights in the shape of Qwen2.5-0.5B, with the embedded tokenizer."""
    return random_model(
        load("tiny"),
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
    )
