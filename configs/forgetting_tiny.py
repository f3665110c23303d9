"""Forgetting on the tiny world: what ES unlearns, and what keeps it (2605.30148).

    python -m jes.train --config=configs/forgetting_tiny.py              # one run
    python -m jes.studies.forgetting --config=configs/forgetting_tiny.py:quick  # study

The embedded model learns to name the least of three numbers (`tiny/min`, 18 % at the
start), with anchored weight decay; five tasks that it knows are watched, and the KL
to the base model. N, σ, α as in `configs/tiny.py`. `:last` is the same for `tiny/last`,
a task of which it knows nothing at the start; `:quick` has half the generations, for
the short form of the study.
"""

from ml_collections import ConfigDict

from jes.config import default

VARIANTS = (None, "quick", "last")


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of one run; `jes.studies.forgetting` changes method and seed."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; there are {VARIANTS[1:]}")
    config = default()
    config.task = "tiny/last" if variant == "last" else "tiny/min"
    config.eval_tasks = (
        "tiny/reverse",
        "tiny/sort",
        "tiny/add",
        "tiny/subtract",
        "tiny/max",
    )
    config.population = 32
    config.prompts = 64
    config.sigma = 0.02
    config.alpha = 0.02
    config.decay = "l2"
    config.decay_coefficient = 1.0
    config.generations = 60 if variant == "quick" else 120
    config.eval_every = 10 if variant == "quick" else 20
    config.kl_prompts = 50
    config.kl_max_new_tokens = 8
    config.grpo.learning_rate = 1e-5
    config.grpo.minibatch = 256
    return config
