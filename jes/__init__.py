"""Evolution strategies for language models, in JAX: the table of contents."""

from jes.anchor import distance, keep_anchor
from jes.core.drift import coefficient_for_norm, drift_norm
from jes.core.fitness import shape_fitness
from jes.core.noise import Noise, generation_key, perturb, perturb_member
from jes.models.weights import Pretrained, load
from jes.sampling.generate import generate
from jes.transforms import anchored_weight_decay, es_gradient

__all__ = [
    "Noise",
    "Pretrained",
    "anchored_weight_decay",
    "coefficient_for_norm",
    "distance",
    "drift_norm",
    "es_gradient",
    "generate",
    "generation_key",
    "keep_anchor",
    "load",
    "perturb",
    "perturb_member",
    "shape_fitness",
]
