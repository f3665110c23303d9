"""ES on ARC-Challenge, with the hyperparameters of ES at Scale (2509.24372).

    python -m jes.train --config=configs/arc_c.py [--config.data.root=FOLDER]
    python -m jes.train --config=configs/arc_c.py:tiny --config.data.root=FOLDER

Population, sigma, alpha, prompts a generation and greedy answers are the paper's, which
uses one setting for all models of 0.5B to 8B (and 500 generations; 300 is our guess at
what a task this short needs). The task is not: its ARC results are on ARC-AGI. So there
is no published number for this run, and we have none either. Not run by us. What is
known nearby: Qwen2.5-3B-Instruct, asked to reason first, answers 85.1 % of the test
questions before any training (2605.30148).

Needs: `allenai/ai2_arc` (1119 questions to train on, 1172 to evaluate on; from the hub,
or as `FOLDER/ai2_arc/ARC-Challenge/{train,test}.parquet`), the model (from the hub,
or `--config.model=FOLDER`), and an accelerator: a generation is 30 members times 200
prompts of about 100 tokens, 300 generations 1.8 million answers. In bfloat16 the model
takes 1 GB a member held at once, its float32 master, anchor and update 5 GB.

`--config.mode=likelihood` takes the likeliest letter as the answer instead of
generating one. `:tiny` is this, with the model of the package and small numbers: a
minute on two CPU cores. That model reads letter by letter and knows no science, so it
shows that everything works, not that anything is learned. (It writes no letter of an
answer either: with `--config.mode=generate` all members earn 0, and nothing moves.)
"""

from ml_collections import ConfigDict

from jes.config import default


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of the run; `variant` is what follows the colon, 'tiny' or nothing."""
    if variant not in (None, "tiny"):
        raise ValueError(f"there is no variant {variant!r}, only 'tiny'")
    config = default()
    config.task = "arc_c"
    config.model = "Qwen/Qwen2.5-0.5B-Instruct"
    config.dtype = "bfloat16"
    config.population = 30
    config.sigma = 0.001
    config.alpha = 0.0005
    config.prompts = 200
    config.generations = 300
    config.max_new_tokens = 8  # a letter, and room to say it in the wrong format
    config.eval_every = 25
    if variant == "tiny":
        config.model = "tiny"
        config.dtype = "float32"
        config.mode = "likelihood"
        config.population = 4
        config.sigma = 0.02
        config.alpha = 0.02
        config.prompts = 8
        config.generations = 4
        config.data.train_examples = 64
        config.data.test_examples = 32
        config.eval_every = 2
        config.eval_batch = 8
    return config
