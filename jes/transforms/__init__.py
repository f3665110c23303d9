"""Gradient transformations in the manner of optax."""

from jes.transforms._es_gradient import EsGradientState, es_gradient

__all__ = ["EsGradientState", "es_gradient"]
