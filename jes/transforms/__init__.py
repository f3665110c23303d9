"""Gradient transformations in the manner of optax."""

from jes.transforms._anchored_weight_decay import (
    AnchoredWeightDecayState,
    anchored_weight_decay,
)
from jes.transforms._error_feedback import ErrorFeedbackState, error_feedback
from jes.transforms._es_gradient import EsGradientState, es_gradient
from jes.transforms._seed_replay import SeedReplayState, seed_replay

__all__ = [
    "AnchoredWeightDecayState",
    "ErrorFeedbackState",
    "EsGradientState",
    "SeedReplayState",
    "anchored_weight_decay",
    "error_feedback",
    "es_gradient",
    "seed_replay",
]
