"""Evolution strategies for language models, in JAX: the table of contents."""

from jes.core.fitness import shape_fitness
from jes.core.noise import Noise, generation_key, perturb, perturb_member
from jes.models.weights import Pretrained, load
from jes.sampling.generate import generate
from jes.transforms import anchored_weight_decay, es_gradient

__all__ = [
    "Noise",
    "Pretrained",
    "anchored_weight_decay",
    "es_gradient",
    "generate",
    "generation_key",
    "load",
    "perturb",
    "perturb_member",
    "shape_fitness",
]
