"""What is measured: a model, its prompts, and the work of answering them."""

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.evolution import Evolution
from jes.core.noise import generation_key
from jes.memory import useful_members
from jes.models.config import ModelConfig
from jes.models.gguf_files import INSTALLED
from jes.models.qwen import Decoder
from jes.models.weights import Pretrained, load
from jes.questions import Evaluation, Question
from jes.rollout import ask, examine
from jes.sampling.generate import Sampling
from jes.tasks.task import Reward, Task
from jes.update import first_centre, first_state, tell, weights_of


class Case(NamedTuple):
    """A model, and `rows` prompts of `prompt` tokens to be answered with `new`.

    Where they are `ragged` that is their median: lengths of 64 questions of ARC-C,
    log-normal, the longest 2.3 times the mean.
    """

    model: Pretrained
    rows: int
    prompt: int
    new: int
    ragged: bool = False

    def lengths(self) -> np.ndarray:
        """Tokens of each prompt, int [rows]."""
        if not self.ragged:
            return np.full(self.rows, self.prompt)
        return long_tailed(self.rows, self.prompt, 2.46)

    def prompts(self) -> list[list[int]]:
        """Random prompts, the same each time."""
        rng, most = np.random.default_rng(0), self.model.config.vocab_size
        return [rng.integers(0, most, n).tolist() for n in self.lengths()]

    def __str__(self) -> str:
        lengths = self.lengths()
        tokens = f"{lengths.min()} to {lengths.max()}" if self.ragged else self.prompt
        return f"{self.rows} prompts x {tokens} + {self.new} tokens"


def long_tailed(count: int, median: float, longest: float, seed: int = 0) -> np.ndarray:
    """Log-normal lengths in tokens, int32 [count]: quantiles in random order.

    The longest is given in medians.
    """
    ranks = (np.arange(count) + 0.5) / count
    normal = np.array([NormalDist().inv_cdf(rank) for rank in ranks])
    lengths = median * np.exp(normal * math.log(longest) / normal.max())
    lengths = np.maximum(np.rint(lengths), 1).astype(np.int32)
    return np.random.default_rng(seed).permutation(lengths)


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
    longest = int(case.lengths().max())
    evaluation = Evaluation(
        model=case.model.model,
        tokenizer=case.model.tokenizer,
        task=task,
        sampling=Sampling(),
        mode=mode,
        draw=draw,
        buckets=(longest + (mode == "likelihood"),),
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
    copy = jax.tree.map(jnp.array, case.model.params)
    base = case.model.params if evolution.whole_numbers else None
    centre, state = first_centre(evolution, copy), first_state(evolution, copy)
    del copy
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
    """'tiny', the embedded model, one of `SHAPES`, or 'smollm2-135m'."""
    if name in INSTALLED:
        return load(name)
    tiny = load("tiny")
    return (
        tiny
        if name == "tiny"
        else random_model(tiny, **dict(zip(SIZES, SHAPES[name], strict=True)))
    )
