"""What a decoder is built from: `config.json` as a frozen, hashable value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FAMILIES = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
}
"""Supported `architectures` and how they differ (the rest is in the numbers)."""

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
"""Fields without which a `config.json` does not describe a model."""


MOST = {
    "vocab_size": 10_000_000,
    **dict.fromkeys(("hidden_size", "intermediate_size"), 1_000_000),
    "num_hidden_layers": 1000,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 10_000),
    "head_dim": 10_000,
    "max_position_embeddings": 1_000_000_000,
}
"""Sizes beyond any model: a file with larger ones is damaged, or made to harm."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of the rotary wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, in the field names of `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a `config.json`.

        Raises:
          ValueError: for an architecture, or a setting of it, that is not supported.
        """
        architecture = (hf.get("architectures") or ["none"])[0]
        if architecture not in FAMILIES:
            raise ValueError(
                f"architecture {architecture!r} is not supported; "
                f"supported are {', '.join(FAMILIES)}"
            )
        _check(hf, architecture)
        # transformers 5 writes `rope_parameters`, and reads it where both are; older
        # folders have both fields apart.
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        heads = hf["num_attention_heads"]
        return cls(
            architecture=architecture,
            **{field: hf[field] for field in REQUIRED},
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=_positive(
                "rope_theta", rope.get("rope_theta", hf.get("rope_theta", 10000.0))
            ),
            rope_scaling=_rope_scaling(rope),
            rms_norm_eps=_positive("rms_norm_eps", hf.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            max_position_embeddings=hf.get("max_position_embeddings", 32768),
            **FAMILIES[architecture],
        )


def _positive(field: str, value: Any) -> float:
    """The value as a float of 32 bits; a `ValueError` if it is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 1e-38 < value < 1e38):
        raise ValueError(f"{field} must be a positive number, not {value!r}")
    return float(value)


def check_setting(path: str, value: Any, *supported: Any) -> None:
    """Raises a `ValueError` unless the value is one of those supported."""
    if value not in supported:
        names = ", ".join(map(repr, supported))
        raise ValueError(f"{path}={value!r} is not supported; supported: {names}")


def check_unset(config: Mapping[str, Any], *fields: str, path: str = "") -> None:
    """Raises a `ValueError` if one of these fields has a value."""
    for field in fields:
        if config.get(field):
            raise ValueError(f"{path}{field}={config[field]!r} is not supported")


def _check(hf: Mapping[str, Any], architecture: str) -> None:
    # Qwen3's head_dim is a number of its own, where others divide hidden_size.
    required = (*REQUIRED, "head_dim") if "Qwen3" in architecture else REQUIRED
    lacking = [field for field in required if hf.get(field) is None]
    if lacking:
        raise ValueError(f"these fields are missing: {', '.join(lacking)}")
    for field, most in MOST.items():
        value = hf.get(field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 0 < value <= most):
            raise ValueError(
                f"{field} must be a whole number from 1 to {most:,}, not {value!r}"
            )
    if hf.get("head_dim") is None and hf["num_attention_heads"] > hf["hidden_size"]:
        raise ValueError("there are more num_attention_heads than hidden_size")
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    if new and old and _rope_scaling(new) != _rope_scaling(old):
        raise ValueError(
            f"rope_parameters={new!r} and rope_scaling={old!r} differ: remove one"
        )
    tied = hf.get("tie_word_embeddings", False)
    check_setting("tie_word_embeddings", tied, True, False)
    check_unset(hf, "use_sliding_window")
    if not FAMILIES[architecture]["qkv_bias"]:
        check_unset(hf, "attention_bias", "mlp_bias")
    check_setting("hidden_act", hf.get("hidden_act", "silu"), "silu")
    heads, kv_heads = hf["num_attention_heads"], hf.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide among {kv_heads} KV heads")


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported (only 'llama3')")
    fields = [field.name for field in dataclasses.fields(RopeScaling)]
    lacking = [field for field in fields if field not in rope]
    if lacking:
        raise ValueError(f"rope scaling without {', '.join(lacking)}")
    return RopeScaling(**{field: _positive(field, rope[field]) for field in fields})
