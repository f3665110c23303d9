"""Gradient transformations in the manner of optax, and updates in place by them."""

from jes.transforms._anchored_weight_decay import anchored_weight_decay
from jes.transforms._error_feedback import error_feedback
from jes.transforms._es_gradient import es_gradient
from jes.transforms._in_place import count_parts, update_in_place
from jes.transforms._seed_replay import seed_replay
from jes.transforms._stochastic_rounding import stochastic_rounding
from jes.transforms._whole_number_es import whole_number_es

__all__ = [
    "anchored_weight_decay",
    "count_parts",
    "error_feedback",
    "es_gradient",
    "seed_replay",
    "stochastic_rounding",
    "update_in_place",
    "whole_number_es",
]
