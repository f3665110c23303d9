"""The protocol of 2605.30148 as settings of `jes.train`; `configs/forgetting_*.py`."""

from ml_collections import ConfigDict

from jes.config import default
from jes.core.drift import coefficient_for_norm

TARGETS = ("countdown", "gsm8k", "proofwriter")
PRIORS = ("hellaswag", "piqa", "arc_c_cot", "mmlu_pro")
PUBLISHED = {"l1": (0.01, 92.13), "l2": (10.0, 67.68)}
"""Kind of decay -> λ of the paper, and ‖θ - θ_0‖ that it reports with that λ."""
PARAMETERS = 3_085_938_688
"""Of Qwen2.5-3B, which the norms are of."""
MIRRORS = {
    "countdown": "tiny/countdown",
    "gsm8k": "tiny/min",
    "proofwriter": "tiny/rules",
}
"""Target -> the task of the tiny world that takes its place in `:tiny`."""
VARIANTS = ("es", "l1", "l2", "l1_norm", "l2_norm", "grpo", "tiny")


def forgetting_config(target: str, variant: str | None) -> ConfigDict:
    """Settings of one run.

    Args:
      target: the task to train, one of `TARGETS`; the others are watched.
      variant: None or 'l2' is the paper's L2 decay, 'l1' its L1 decay. 'l2_norm' and
        'l1_norm' take the λ with which float32 arithmetic comes to the norm that the
        paper reports: its float16 arithmetic rounds most of the pull away. 'es' has no
        decay, 'grpo' is the paper's baseline, 'tiny' the embedded model on the task
        that mirrors the target.

    Raises:
      ValueError: for another variant.
    """
    if variant not in (None, *VARIANTS):
        raise ValueError(f"there is no variant {variant!r}; there are {VARIANTS}")
    config = default()
    config.model = "Qwen/Qwen2.5-3B-Instruct"
    config.dtype = "bfloat16"
    config.task = target
    others = [task for task in TARGETS if task != target]
    config.eval_tasks = (*others, *PRIORS)
    config.population = 30
    config.sigma = 1e-3
    config.alpha = 5e-4
    config.generations = 500
    config.eval_every = 25
    config.kl_prompts = 50
    config.buckets = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
    config.grpo.minibatch = 1000  # 32 prompts of 30 answers, and it divides 200 of them
    if variant == "grpo":
        config.method = "grpo"
    elif variant != "es":
        kind = "l1" if variant in ("l1", "l1_norm") else "l2"
        coefficient, norm = PUBLISHED[kind]
        if variant in ("l1_norm", "l2_norm"):
            coefficient = coefficient_for_norm(
                norm,
                alpha=config.alpha,
                population=config.population,
                parameters=PARAMETERS,
                generations=config.generations,
                kind=kind,
            )
        config.decay, config.decay_coefficient = kind, coefficient
    if variant == "tiny":
        make_tiny(config, MIRRORS[target])
    return config


def make_tiny(config: ConfigDict, task: str) -> None:
    """The same on the embedded model, in a minute on two CPU cores."""
    config.model = "tiny"
    config.dtype = "float32"
    config.task = task
    config.eval_tasks = ("tiny/reverse", "tiny/add", "tiny/max")
    config.data.test = 128
    config.prompts = 32
    config.population = 16
    config.sigma = 0.02
    config.alpha = 0.02
    config.decay_coefficient = 1.0
    config.generations = 40
    config.eval_every = 10
    config.kl_max_new_tokens = 8
    config.buckets = default().buckets
    config.grpo.learning_rate = 1e-5
    config.grpo.minibatch = 0
