"""Countdown without forgetting the rest: anchored weight decay, as in 2605.30148.

    python -m jes.train --config=configs/forgetting_countdown.py
    python -m jes.train --config=configs/forgetting_countdown.py:tiny
    python -m jes.studies.forgetting --seeds=0,1,2 \\
        --config=configs/forgetting_countdown.py \\
        --methods=es,l2:10,l1:0.01,n:128,n:256,grpo:1e-6

The first is L2 with λ = 10, `:l1` λ = 0.01; `:l1_norm` and `:l2_norm` are the λ that
reach the published norms in float32; `:es` and `:grpo` go without. The other two target
tasks and HellaSwag, PIQA, ARC-Challenge and MMLU-Pro are watched, with the KL to the
base model. The last command is the paper.

200 problems to train on and 2000 held out. The paper's 2200 are read from
`FOLDER/countdown/{train,test}.parquet` (columns numbers, target); without a folder the
first rows of Jiayi-Pan/Countdown-Tasks-3to4 take their place.
Published for Qwen2.5-3B, L2 with λ = 10: Countdown 11.5 -> 56.2 %, mean of the six
priors 66.6 -> 66.8 % (plain ES: 56.5 and 61.9 %; its seeds are 4 points apart).
Not run by us: 500 generations are 3 million answers of up to 1024 tokens, which took
the authors about 4 hours on a node of eight H200. `:tiny` is the embedded model on
`tiny/countdown`.
"""

from ml_collections import ConfigDict

from jes.studies.paper_configs import forgetting_config


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of the run; `variant` is what follows the colon."""
    return forgetting_config("countdown", variant)
