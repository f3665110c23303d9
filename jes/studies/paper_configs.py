"""The protocols of 2605.30148 and 2602.03120 as settings of `jes.train`.

`configs/forgetting_*.py` and `configs/qes_*.py` are made from them.
"""

from ml_collections import ConfigDict

from jes.config import default
from jes.core.drift import coefficient_for_norm

TARGETS = {
    "countdown": "tiny/countdown",
    "gsm8k": "tiny/min",
    "proofwriter": "tiny/rules",
}
"""Target of 2605.30148 -> the task of the tiny world that takes its place."""
PRIORS = ("hellaswag", "piqa", "arc_c_cot", "mmlu_pro")
PUBLISHED = {"l1": (0.01, 92.13), "l2": (10.0, 67.68)}
"""Kind of decay -> λ of the paper, and ‖θ - θ_0‖ that it reports with that λ."""
PARAMETERS = 3_085_938_688
"""Of Qwen2.5-3B, which the norms are of."""
FORGETTING_VARIANTS = ("es", "l1", "l2", "l1_norm", "l2_norm", "grpo", "tiny")
TINY_PRIORS = ("tiny/reverse", "tiny/add", "tiny/max")

QES_MODELS = {
    "int4": "Qwen/Qwen2.5-{}-Instruct-GPTQ-Int4",
    "int8": "Qwen/Qwen2.5-{}-Instruct-GPTQ-Int8",
    "w8a8": "neuralmagic/Qwen2.5-{}-Instruct-quantized.w8a8",
}
QES_RATES = {
    "int4": {"1.5B": (0.01, 5e-4), "3B": (0.005, 3e-4)},
    "int8": {"1.5B": (0.001, 1e-4), "3B": (0.001, 1e-4)},
    "w8a8": {"1.5B": (0.01, 1e-3), "3B": (0.01, 1e-3)},
}
"""Published sigma and alpha; the published code leaves out the 1/N of Eq. (5)."""
BITS4 = {"sigma": 0.26, "alpha": 0.4, "generations": 80, "population": 32}
BITS8 = {"sigma": 3.0, "alpha": 0.8, "generations": 120, "population": 16}
"""Of the embedded model, in codes. A small model's weights take longer steps."""
FLOATS4 = {"sigma": 0.01, "alpha": 0.0154}
FLOATS8 = {"sigma": 0.0045, "alpha": 0.0012}
"""The same model before rounding, with steps of the same lengths: the codes' times
sqrt(E[delta^2]) / sigma, times the mean scale, 0.022 of int4 and 0.0015 else."""
QES_VARIANTS = ("3b", "published", "published_3b", "tiny", "float")


def forgetting_config(target: str, variant: str | None) -> ConfigDict:
    """Settings of one run of 2605.30148.

    Args:
      target: the task to train, one of `TARGETS`; the others are prior tasks.
      variant: None or 'l2' is the paper's L2 decay, 'l1' its L1 decay. 'l2_norm' and
        'l1_norm' take the λ that reaches the norm of the paper in float32: float16
        arithmetic rounds most of the pull away. 'es' has no decay, 'grpo' is the
        baseline, 'tiny' the embedded model on the tiny task in place of the target.

    Raises:
      ValueError: for another variant.
    """
    config = checked_default(variant, FORGETTING_VARIANTS)
    config.kl_prompts = 50
    if variant == "tiny":  # a minute on two CPU cores
        config.update(task=TARGETS[target], eval_tasks=TINY_PRIORS)
        config.update(population=16, prompts=32, sigma=0.02, alpha=0.02)
        config.update(decay="l2", decay_coefficient=1.0, kl_max_new_tokens=8)
        config.update(generations=40, eval_every=10)
        config.data.test_examples = 128
        config.grpo.learning_rate = 1e-5
        return config
    config.update(model="Qwen/Qwen2.5-3B-Instruct", dtype="bfloat16", task=target)
    config.eval_tasks = (*(task for task in TARGETS if task != target), *PRIORS)
    config.update(population=30, sigma=1e-3, alpha=5e-4)
    config.update(generations=500, eval_every=25)
    config.buckets = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
    config.grpo.minibatch = 1000  # 32 prompts of 30 answers, and it divides 200 of them
    if variant == "grpo":
        config.method = "grpo"
    elif variant != "es":
        kind = (variant or "l2")[:2]
        coefficient, norm = PUBLISHED[kind]
        if variant in ("l1_norm", "l2_norm"):
            same = ("alpha", "population", "generations")
            law = {key: config[key] for key in same} | {"parameters": PARAMETERS}
            coefficient = coefficient_for_norm(norm, kind=kind, **law)
        config.decay, config.decay_coefficient = kind, coefficient
    return config


def qes_config(form: str, variant: str | None) -> ConfigDict:
    """Settings of one run of 2602.03120.

    Args:
      form: 'int4', 'int8' or 'w8a8'.
      variant: None is the paper with the settings of the 1.5B model, '3b' those of the
        3B. 'published' and 'published_3b' follow the published code where it differs:
        no 1/N, z-scores of the pairs' differences, a uniform initial residual, a clip.
        'tiny' is the embedded model, quantized, on a task that it can learn; 'float'
        the same without quantization, with steps and perturbations of equal length.

    Raises:
      ValueError: for another variant.
    """
    config = checked_default(variant, QES_VARIANTS)
    config.antithetic = True
    if variant != "float":
        config.rounding = "replay"
    if variant in ("tiny", "float"):
        config.update(task="tiny/min", eval_tasks=TINY_PRIORS)
        config.update(prompts=64, eval_every=40)
        config.group_size = 32 if form == "int4" else -1
        config.update(BITS4 if form == "int4" else BITS8)
        if variant == "float":
            config.update(FLOATS4 if form == "int4" else FLOATS8)
        else:
            config.quantize = form
        return config
    size = "3B" if variant in ("3b", "published_3b") else "1.5B"
    config.update(model=QES_MODELS[form].format(size), dtype="bfloat16")
    config.update(task="countdown", generations=300, population=50)
    config.update(anchor="host", eval_every=25)
    config.sigma, rate = QES_RATES[form][size]
    config.alpha = config.population * rate  # ours has the 1/N
    if variant in ("published", "published_3b"):
        config.update(alpha=rate, divide_by_population=False, shaping="pair_zscore")
        config.update(initial_residual="uniform", residual_clip=1.5)
    return config


def checked_default(variant: str | None, known: tuple[str, ...]) -> ConfigDict:
    """The default config; raises ValueError for a variant that is not known."""
    if variant not in (None, *known):
        raise ValueError(f"there is no variant {variant!r}; there are {known}")
    return default()
