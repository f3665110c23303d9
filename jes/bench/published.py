"""The published way of 2509.24372, on PyTorch, to compare with."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jes.bench.cases import Case, examination


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
