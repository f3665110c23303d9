"""A decoder of two layers with random weights, whose answers differ."""

from typing import Any

import jax
import jax.numpy as jnp

import jes
from jes.core.noise import PyTree
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def decoder(**changes: Any) -> Decoder:
    """Of this shape, or with entries of it changed."""
    return Decoder(ModelConfig.from_hf(SHAPE | changes))


def weights_of(model: Decoder) -> PyTree:
    """Initial weights answer with one token for ever; these do not."""
    drawn = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jes.perturb(drawn, jax.random.key(1), 0.3)
