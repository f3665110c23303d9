"""What is measured: a model, its prompts, and the work of answering them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.evolution import Evolution
from jes.core.noise import generation_key
from jes.memory import useful_members
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.models.weights import Pretrained, load
from jes.questions import Evaluation, Question
from jes.rollout import ask, examine
from jes.sampling.generate import Sampling
from jes.tasks.task import Reward, Task
from jes.update import first_centre, first_state, tell, weights_of


class Case(NamedTuple):
    """A model, and `rows` prompts of `prompt` tokens to be answered with `new`."""

    model: Pretrained
    rows: int
    prompt: int
    new: int

    def prompts(self) -> list[list[int]]:
        """Random prompts, the same each time."""
        rng, shape = np.random.default_rng(0), (self.rows, self.prompt)
        return rng.integers(0, self.model.config.vocab_size, shape).tolist()

    def __str__(self) -> str:
        return f"{self.rows} prompts x {self.prompt} + {self.new} tokens"


def evaluation_of(
    case: Case, mode: str = "generate", draw: str = "member"
) -> tuple[Evaluation, list[Question]]:
    """The prompts as a task whose rewards cost as little as a lookup."""
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
        model=case.model.model,
        tokenizer=case.model.tokenizer,
        task=task,
        sampling=Sampling(),
        mode=mode,
        draw=draw,
        buckets=(case.prompt + (mode == "likelihood"),),
    )
    choices = [[1], [2]] if mode == "likelihood" else []
    return evaluation, [Question({}, prompt, choices) for prompt in case.prompts()]


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

    With or without the update; `chunk` members at once, 0 for as many as are useful.
    """
    evaluation, questions = evaluation_of(case, mode, draw)
    base = case.model.params
    centre = first_centre(evolution, jax.tree.map(jnp.array, base))
    state = first_state(evolution, base)
    chunk = chunk or useful_members(evolution.population, case.rows)
    key = generation_key(jax.random.key(0), 0)

    def run() -> Any:
        nonlocal centre, state
        scores = ask(
            evaluation,
            weights_of(evolution, centre, base),
            key,
            questions,
            noise=evolution.noise,
            population=evolution.population,
            chunk=chunk,
        )
        if not update:
            return scores.reward
        centre, state = tell(evolution, centre, state, key, scores.reward)
        return centre

    return run


def inference(case: Case, mode: str = "generate") -> Callable[[], Any]:
    """A function that answers the prompts with the weights as they are."""
    evaluation, questions = evaluation_of(case, mode)
    params = case.model.params
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


SHAPES = {
    "4.5M": (102, 256, 6, 4, 2, 704),
    "80M": (16384, 640, 12, 10, 2, 2560),
    "0.5B shape": (151936, 896, 24, 14, 2, 4864),  # Qwen2.5-0.5B
}
"""Sizes of random models, all with the embedded model's tokenizer."""
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)


def model_of(name: str) -> Pretrained:
    """'tiny', the embedded model, or one of `SHAPES`."""
    tiny = load("tiny")
    return (
        tiny
        if name == "tiny"
        else random_model(tiny, **dict(zip(SIZES, SHAPES[name], strict=True)))
    )
