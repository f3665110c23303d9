"""The protocol of 2602.03120 as settings of `jes.train`; `configs/qes_*.py`."""

from ml_collections import ConfigDict

from jes.config import default

MODELS = {
    "int4": "Qwen/Qwen2.5-{}-Instruct-GPTQ-Int4",
    "int8": "Qwen/Qwen2.5-{}-Instruct-GPTQ-Int8",
    "w8a8": "neuralmagic/Qwen2.5-{}-Instruct-quantized.w8a8",
}
SIZES = {None: "1.5B", "3b": "3B", "published": "1.5B", "published_3b": "3B"}
RATES = {
    ("int4", "1.5B"): (0.01, 5e-4),
    ("int4", "3B"): (0.005, 3e-4),
    ("int8", "1.5B"): (0.001, 1e-4),
    ("int8", "3B"): (0.001, 1e-4),
    ("w8a8", "1.5B"): (0.01, 1e-3),
    ("w8a8", "3B"): (0.01, 1e-3),
}
"""Published sigma and alpha; the published code leaves out the 1/N of Eq. (5)."""
TINY = {
    "int4": {"sigma": 0.26, "alpha": 0.4, "generations": 80, "population": 32},
    "int8": {"sigma": 3.0, "alpha": 0.8, "generations": 120, "population": 16},
    "w8a8": {"sigma": 3.0, "alpha": 0.8, "generations": 120, "population": 16},
}
"""Of the embedded model. Its weights take longer steps than those of a large model, so
that they are more codes."""
FLOATS = {"int4": (0.01, 0.0154), "int8": (0.0045, 0.0012), "w8a8": (0.0045, 0.0012)}
"""Sigma and alpha of the same model before rounding, of the same lengths: the codes'
times sqrt(E[delta^2]) / sigma, times the mean scale, 0.022 of int4 and 0.0015 else."""
VARIANTS = ("3b", "published", "published_3b", "tiny", "float")


def qes_config(form: str, variant: str | None) -> ConfigDict:
    """Settings of one run.

    Args:
      form: 'int4', 'int8' or 'w8a8'.
      variant: None is the paper with the settings of the 1.5B model, '3b' those of the
        3B. 'published' and 'published_3b' are the published code where that differs: no
        1/N, z-scores of the pairs' differences, a uniform initial residual, and a clip.
        'tiny' is the embedded model, rounded here, on a task that it can learn; 'float'
        is the same without rounding, with steps and perturbations of the same length.

    Raises:
      ValueError: for another variant.
    """
    if variant not in (None, *VARIANTS):
        raise ValueError(f"there is no variant {variant!r}; there are {VARIANTS}")
    config = default()
    if variant in ("tiny", "float"):
        return tiny(config, form, variant)
    size = SIZES[variant]
    config.model = MODELS[form].format(size)
    config.dtype = "bfloat16"
    config.task = "countdown"
    config.generations = 300
    config.population = 50
    config.antithetic = True
    config.rounding = "replay"
    config.anchor = "host"
    config.sigma, rate = RATES[form, size]
    config.alpha = config.population * rate  # ours has the 1/N
    config.eval_every = 25
    if variant in ("published", "published_3b"):
        config.alpha = rate
        config.divide_by_population = False
        config.shaping = "pair_zscore"
        config.initial_residual = "uniform"
        config.residual_clip = 1.5
    return config


def tiny(config: ConfigDict, form: str, variant: str) -> ConfigDict:
    """The embedded model, in minutes on two CPU cores."""
    config.task = "tiny/min"
    config.eval_tasks = ("tiny/reverse", "tiny/add", "tiny/max")
    config.group_size = 32 if form == "int4" else -1
    config.antithetic = True
    config.prompts = 64
    config.update(TINY[form])
    config.eval_every = 40
    if variant == "float":
        config.sigma, config.alpha = FLOATS[form]
        return config
    config.rounding = "replay"
    config.quantize = form
    return config
