"""Shapes of real models by name: their `config.json`, without their weights."""

from typing import Any

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": QWEN2 | _sizes(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": QWEN2 | _sizes(1536, 28, 12, 2, 8960),
    "qwen2.5-3b": QWEN2 | _sizes(2048, 36, 16, 2, 11008),
    "qwen2.5-7b": QWEN2
    | _sizes(3584, 28, 28, 4, 18944)
    | {"vocab_size": 152064, "tie_word_embeddings": False},
    "qwen2.5-72b": QWEN2
    | _sizes(8192, 80, 64, 8, 29568)
    | {"vocab_size": 152064, "tie_word_embeddings": False},
    "qwen3-0.6b": QWEN3 | _sizes(1024, 28, 16, 8, 3072),
}
"""`config.json` of each shape."""
