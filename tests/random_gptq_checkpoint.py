"""Writes a GPTQ folder with random codes in the shapes of Qwen2.5-0.5B.

    python tests/random_gptq_checkpoint.py --out FOLDER [--bits 4] [--group-size 128]

Symmetric, version 1, groups in order, float16 for all that is not quantised, as the
published folders are. Weights have a standard deviation of 0.01, so that activations
and logits stay finite; the answers of such a model are noise. One tensor is in memory
at a time; 4 bits take 10 s and 0.46 GB.
"""

import argparse
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from random_checkpoint import GENERATION, random_tensor, write_json

from jes.models import gptq
from jes.models.config import ModelConfig
from jes.models.safetensors_files import Tensor, write_tensors
from jes.models.shapes import SHAPES
from jes.models.weights import MAX_SHARD_BYTES, expected_tensors

WEIGHT_DEVIATION = 0.01


def random_words(name: str, shape: tuple[int, ...], bits: int, seed: int) -> np.ndarray:
    """Codes around the middle with a deviation of 2.5 / 16 of their range, packed."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    words = np.zeros(shape, np.uint32)
    for shift in range(0, 32, bits):
        codes = generator.standard_normal(shape, np.float32) * 2.5 * 2 ** (bits - 4)
        codes = np.clip(np.round(codes) + 2 ** (bits - 1), 0, 2**bits - 1)
        words |= codes.astype(np.uint32) << np.uint32(shift)
    return words.view(np.int32)


def random_gptq_tensor(
    name: str, shape: tuple[int, ...], bits: int, group_size: int, seed: int = 0
) -> np.ndarray:
    """The values of a tensor; those that are random depend on its name and the seed."""
    if name.endswith("g_idx"):
        return np.arange(shape[0], dtype=np.int32) // group_size
    if name.endswith("qweight"):
        return random_words(name, shape, bits, seed)
    if name.endswith("qzeros"):
        words = {4: 0x77777777, 8: 0x7F7F7F7F}  # the middle, less one
        return np.full(shape, words[bits], np.int32)
    if name.endswith("scales"):
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        scale = WEIGHT_DEVIATION / (2.5 * 2 ** (bits - 4))
        return (scale * generator.uniform(0.8, 1.2, shape)).astype(np.float16)
    return random_tensor(name, shape, seed, np.dtype(np.float16))


def write_gptq_checkpoint(
    folder: Path, *, shape: str = "qwen2.5-0.5b", bits: int = 4, group_size: int = 128
) -> None:
    """Writes config.json, generation_config.json and random weights."""
    settings = gptq.to_config(bits, group_size, symmetric=True)
    config = SHAPES[shape]
    expected = expected_tensors(ModelConfig.from_hf(config), gptq.from_config(settings))
    tensors = {}
    for name, tensor in expected.items():
        if tensor.zero:
            continue
        read = partial(random_gptq_tensor, name, tensor.shape, bits, group_size)
        stored = "I32" if tensor.dtypes == ("I32",) else "F16"
        tensors[name] = Tensor(tensor.shape, stored, read)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, MAX_SHARD_BYTES)
    write_json(folder / "generation_config.json", GENERATION)
    described = {"torch_dtype": "float16", "quantization_config": settings}
    write_json(folder / "config.json", {**config, **described})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random GPTQ codes in real shapes.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    write_gptq_checkpoint(
        args.out, shape=args.shape, bits=args.bits, group_size=args.group_size
    )


if __name__ == "__main__":
    main()
