"""Tiny models of every family, and the logits that `transformers` gives for them.

    python tests/make_goldens.py        (needs torch; rewrites tests/goldens/*.npz)

A golden holds config.json, the weights, a left-padded batch and its logits, so that
`test_parity.py` can compare without torch. The weights are values of float16 and the
logits float32 from float32 arithmetic.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from random_checkpoint import write_checkpoint

from jes.models.safetensors_files import open_tensors

GOLDENS = Path(__file__).parent / "goldens"

TINY: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
QWEN2 = TINY | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = TINY | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA = TINY | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _heads(heads: int, kv_heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2 | _heads(6, 2, tied=True) | {"rope_theta": 1e6},
    # A norm whose epsilon is as large as the squares that it is added to.
    "qwen2_untied": QWEN2 | _heads(3, 1, tied=False) | {"rms_norm_eps": 0.1},
    # head_dim is not hidden_size / heads.
    "qwen3": QWEN3 | _heads(4, 2, tied=False) | {"head_dim": 16, "rope_theta": 1e6},
    "qwen3_tied": QWEN3 | _heads(3, 3, tied=True) | {"head_dim": 4},
    # The four wavelengths, 6 to 199 positions, lie in all three regions of the scaling.
    "llama": LLAMA
    | _heads(3, 3, tied=False)
    | {
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_tied": LLAMA | _heads(6, 2, tied=True) | {"rms_norm_eps": 1e-5},
}
"""config.json of a tiny model for each family, ratio of heads, and kind of head."""


class Batch(NamedTuple):
    """Left-padded prompts: tokens [B, T], and positions [B, T] with -1 for padding."""

    tokens: np.ndarray
    positions: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """bool [B, T], where a token is and not padding."""
        return self.positions >= 0


def make_batch(vocab_size: int = TINY["vocab_size"], seed: int = 0) -> Batch:
    """Three prompts of 20, 13 and 1 tokens; the padding holds tokens of any kind."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (3, 20))
    padding = np.array([[0], [7], [19]])
    positions = np.maximum(np.arange(20)[None] - padding, -1)
    return Batch(tokens.astype(np.int32), positions.astype(np.int32))


def torch_logits(folder: Path, batch: Batch) -> np.ndarray:
    """float32 logits [B, T, V] of `transformers`; those of padding mean nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(batch.tokens, dtype=torch.long),
            attention_mask=torch.tensor(batch.real, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(batch.positions, 0), dtype=torch.long),
        )
    return output.logits.numpy()


def make_golden(name: str, hf_config: Mapping[str, Any]) -> None:
    """Writes `goldens/<name>.npz`."""
    batch = make_batch()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder, hf_config, dtype="float16")
        tensors: dict[str, Any] = {
            f"tensor/{n}": tensor.read() for n, tensor in open_tensors(folder).items()
        }
        logits = torch_logits(folder, batch)
    GOLDENS.mkdir(exist_ok=True)
    np.savez_compressed(
        GOLDENS / f"{name}.npz",
        config=np.array(json.dumps(hf_config)),
        tokens=batch.tokens,
        positions=batch.positions,
        logits=np.where(batch.real[..., None], logits, 0),
        **tensors,
    )


def main() -> None:
    """Makes all of them."""
    for name, hf_config in CONFIGS.items():
        make_golden(name, hf_config)


if __name__ == "__main__":
    main()
