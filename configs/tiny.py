"""The embedded model learns a task it has seen little of: `make tiny`."""

from ml_collections import ConfigDict

from jes.config import default


def get_config() -> ConfigDict:
    """Settings of the run."""
    config = default()
    config.task = "tiny/min"
    config.eval_tasks = ("tiny/reverse", "tiny/add")
    config.population = 32
    config.prompts = 64
    config.sigma = 0.02
    config.alpha = 0.02
    config.generations = 120
    config.eval_every = 30
    return config
