"""Gradient transformations in the manner of optax."""

from jes.transforms._anchored_weight_decay import (
    AnchoredWeightDecayState,
    anchored_weight_decay,
)
from jes.transforms._es_gradient import EsGradientState, es_gradient

__all__ = [
    "AnchoredWeightDecayState",
    "EsGradientState",
    "anchored_weight_decay",
    "es_gradient",
]
