"""The published way of 2509.24372, on PyTorch, to compare with."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jes.bench.cases import (
    MEMBERS,
    Case,
    examination,
    generation,
    larger_model,
    qwen_shape,
    settings,
)
from jes.bench.timing import Row, compare
from jes.io.console import console
from jes.models.weights import load


def published(case: Case) -> Callable[[], Any]:
    """One member by the published method: perturb in place, generate, restore."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        case.pretrained.save(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    _, questions = examination(case)
    prompts = torch.tensor([question.prompt for question in questions])
    mask = torch.ones_like(prompts)
    settings = GenerationConfig(
        max_new_tokens=case.new,
        min_new_tokens=case.new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    model.generation_config = GenerationConfig()

    def shift(sigma: float) -> None:
        generator = torch.Generator()
        for weight in model.parameters():
            generator.manual_seed(7)
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.add_(noise, alpha=sigma)

    @torch.inference_mode()
    def member() -> int:
        shift(1e-3)
        answers = model.generate(
            prompts, attention_mask=mask, generation_config=settings
        )
        shift(-1e-3)
        if answers.shape[1] != case.prompt + case.new:
            raise AssertionError(f"{answers.shape[1]} tokens, not all that were asked")
        return 0

    return member


def rows(repeats: int) -> list[Row]:
    """The rows of `jes.bench`: tokens per second over it."""
    if find_spec("torch") is None:
        console.print("'pytorch' is left out: it is not installed")
        return []
    large = larger_model()
    cases = [
        (Case("tiny, 64 prompts x 24 + 5 tokens", load("tiny"), 64, 24, 5), ">= 2.5"),
        (Case("4.5M, 64 prompts x 64 + 32 tokens", large, 64, 64, 32), ">= 1.5"),
    ]
    out = []
    for case, goal in cases:
        for law in ("normal", "table"):
            name = f"tokens/s, jes with {law} noise / PyTorch: {case.name}"
            run = generation(case, settings(MEMBERS, law), update=False)
            other = published(case)
            out.append(compare(name, goal, other, run, repeats, 1 / MEMBERS))
    case = Case("0.5B shape, 8 prompts x 64 + 16 tokens", qwen_shape(), 8, 64, 16)
    name = f"tokens/s, jes with table noise / PyTorch: {case.name}"
    run = generation(case, settings(1, "table"), update=False, chunk=1)
    out.append(compare(name, "", published(case), run, min(repeats, 3)))
    return out
