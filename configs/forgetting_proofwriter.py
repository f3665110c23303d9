"""ProofWriter without forgetting the rest: anchored weight decay, as in 2605.30148.

    python -m jes.train --config=configs/forgetting_proofwriter.py
    python -m jes.train --config=configs/forgetting_proofwriter.py:tiny
    python -m jes.studies.forgetting --seeds=0,1,2 \\
        --config=configs/forgetting_proofwriter.py \\
        --methods=es,l2:10,l1:0.01,n:128,n:256,grpo:1e-6

The first is L2 with λ = 10, `:l1` λ = 0.01; `:l1_norm` and `:l2_norm` are the λ that
reach the published norms in float32; `:es` and `:grpo` go without. The other two target
tasks and HellaSwag, PIQA, ARC-Challenge and MMLU-Pro are watched, with the KL to the
base model. The last command is the paper.

tasksource/proofwriter: 200 and 1000 rows of its shuffled train split.
Published for Qwen2.5-3B, plain ES: ProofWriter 44.2 -> 77.0 %, mean of the priors
61.1 -> 60.5 %.
Not run by us: 500 generations are 3 million answers of up to 1024 tokens, which took
the authors about 4 hours on a node of eight H200. `:tiny` is the embedded model on
`tiny/rules`.
"""

from ml_collections import ConfigDict

from jes.studies.paper_configs import forgetting_config


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of the run; `variant` is what follows the colon."""
    return forgetting_config("proofwriter", variant)
