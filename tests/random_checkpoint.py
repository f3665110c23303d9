"""Writes a model folder with random weights in the shapes of a real model.

    python tests/random_checkpoint.py --shape qwen2.5-0.5b --out FOLDER \
        [--tokenizer FOLDER] [--dtype bfloat16] [--seed 0]

Answers of such a model are noise, but everything else about it is real: memory, time,
files. One tensor is in memory at a time. 0.5B takes 10 s, 7B 2 minutes and 15 GB.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jes.models.config import ModelConfig
from jes.models.safetensors_files import FLOATS, Tensor, write_tensors
from jes.models.shapes import SHAPES
from jes.models.weights import COPIED, MAX_SHARD_BYTES, expected_tensors

GENERATION = {"bos_token_id": 151643, "eos_token_id": [151645, 151643]}
"""`generation_config.json` of Qwen2.5 where no tokenizer folder brings one."""


def random_tensor(
    name: str, shape: tuple[int, ...], seed: int, dtype: np.dtype
) -> np.ndarray:
    """Values that keep activations and logits near 1 and make every tensor matter.

    Matrices have a standard deviation of fan-in**-0.5, norm scales are 1 ± 0.2, biases
    0 ± 0.2. A tensor depends on its name and the seed only.
    """
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    else:
        values *= 0.2 if name.endswith("bias") else shape[-1] ** -0.5
    return values.astype(dtype)


def write_checkpoint(
    folder: Path,
    hf_config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json, random weights, a tokenizer's files.

    Args:
      folder: where to; made if it is not there.
      hf_config: contents of config.json.
      tokenizer: a folder whose tokenizer and generation defaults are copied.
      dtype: 'float32', 'float16' or 'bfloat16'.
      seed: of the weights.
      max_shard_bytes: above it the weights are split into several files.
    """
    (stored,) = (name for name, d in FLOATS.items() if d.name == dtype)
    expected = expected_tensors(ModelConfig.from_hf(hf_config))
    tensors = {
        name: Tensor(
            shape, stored, partial(random_tensor, name, shape, seed, FLOATS[stored])
        )
        for name, (shape, *_) in expected.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, max_shard_bytes)
    write_json(folder / "generation_config.json", GENERATION)
    if tokenizer is not None:
        for name in COPIED:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    write_json(folder / "config.json", {**hf_config, "torch_dtype": dtype})


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes a JSON object as the folders of the hub have it."""
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random weights in real shapes.")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument(
        "--dtype", choices=[d.name for d in FLOATS.values()], default="bfloat16"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(
        args.out,
        SHAPES[args.shape],
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
