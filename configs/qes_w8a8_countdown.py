"""Countdown learned in int8 weights and activations: quantised ES, as in 2602.03120.

    python -m jes.train --config=configs/qes_w8a8_countdown.py
    python -m jes.train --config=configs/qes_w8a8_countdown.py:tiny
    python -m jes.studies.forgetting --config=configs/qes_w8a8_countdown.py:tiny \\
        --seeds=0,1,2 --methods=replay,residual,quzo,naive

The first is Qwen2.5-1.5B with the paper's settings, `:3b` the larger model,
`:published` the settings of the published code where they differ. `:tiny` is the
embedded model, rounded here, on `tiny/min`; `:float` is the same before rounding, to
compare with. The last command compares the ways of rounding.

200 problems to train on, 2000 held out, as in `configs/forgetting_countdown.py`.
Published for Qwen2.5-3B (`:3b`), held-out accuracy: 21.4 % with seed replay, 31.7 %
with the residual kept; nothing for 1.5B.
(Single runs; two of them are 10 points apart.) Not run by us.
"""

from ml_collections import ConfigDict

from jes.studies.paper_configs import qes_config


def get_config(variant: str | None = None) -> ConfigDict:
    """Settings of the run; `variant` is what follows the colon."""
    return qes_config("w8a8", variant)
