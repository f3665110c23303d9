"""Rise-then-decay under fixed settings (2602.00170, Fig. 1).

    python -m jes.studies.rise_then_decay --seeds=0,1,2 \\
        --config=configs/rise_then_decay.py:tiny

One hundred training questions, the same every generation, on which the reward is
looked at too. `:tiny` is the embedded model on `tiny/countdown`; without it, it is
Qwen2.5-1.5B on GSM8K as in the paper, which does not say σ, α or the settings of GRPO:
those here are of 2509.24372. Not run by us, but for `:tiny` and `:quick`, its short
form.
"""

from ml_collections import ConfigDict

from jes.config import default

VARIANTS = (None, "tiny", "quick")


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of one run; `jes.studies.rise_then_decay` changes method and seed."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; there are {VARIANTS[1:]}")
    config = default()
    config.data.train_examples = 100
    config.prompts = 0  # all of them
    config.eval_train = True
    config.eval_every = 5
    config.population = 30
    config.generations = 500
    config.sigma = 0.001
    config.alpha = 0.0005
    if variant is None:
        config.model = "Qwen/Qwen2.5-1.5B-Instruct"
        config.task = "gsm8k"
        config.dtype = "bfloat16"
        return config
    config.task = "tiny/countdown"
    config.sigma = config.alpha = 0.02
    config.generations = 40 if variant == "quick" else 120
    config.grpo.learning_rate = 1e-5
    config.grpo.minibatch = 250
    return config
