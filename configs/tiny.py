"""The embedded model learns to find the least of three numbers: `make tiny`.

    python -m jes.train --config=configs/tiny.py

Base ES (2509.24372) on `tiny/min`, which the embedded model has seen little of; two
tasks that it knows (`tiny/max`, `tiny/reverse`) are watched while it learns. About a
minute and a half on two idle CPU cores: 18 % -> 61 % of held-out questions. The known
tasks are forgotten on the way: that is what 2605.30148 is about.
"""

from ml_collections import ConfigDict

from jes.config import default


def get_config() -> ConfigDict:
    """Settings of the run."""
    config = default()
    config.task = "tiny/min"
    config.eval_tasks = ("tiny/max", "tiny/reverse")
    config.population = 32
    config.prompts = 64
    config.sigma = 0.02
    config.alpha = 0.02
    config.generations = 120
    config.eval_every = 20
    return config
