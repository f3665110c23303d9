"""Evolution strategies for language models, in JAX: the table of contents."""

import signal
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    # `python -m jes...` imports for seconds, in which Ctrl-C would print a traceback of
    # other packages; `jes.io.command_line.guarded` takes over from there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from jes import landscape, metacognition
from jes.core.anchor import distance, keep_anchor
from jes.core.codes import pack as pack_codes
from jes.core.codes import unpack as unpack_codes
from jes.core.drift import coefficient_for_norm, drift_norm
from jes.core.fitness import shape_fitness
from jes.core.noise import Noise, generation_key, perturb, perturb_member
from jes.core.population import draw_overlays
from jes.models.weights import Pretrained, load
from jes.sampling.generate import generate
from jes.tasks import Reward, Task
from jes.transforms import (
    anchored_weight_decay,
    error_feedback,
    es_gradient,
    seed_replay,
    stochastic_rounding,
    update_in_place,
)

if TYPE_CHECKING:
    from jes.api import Result, answer, fine_tune

__version__ = version("jes")

__all__ = [
    "Noise",
    "Pretrained",
    "Result",
    "Reward",
    "Task",
    "anchored_weight_decay",
    "answer",
    "coefficient_for_norm",
    "distance",
    "draw_overlays",
    "drift_norm",
    "error_feedback",
    "es_gradient",
    "fine_tune",
    "generate",
    "generation_key",
    "keep_anchor",
    "landscape",
    "load",
    "metacognition",
    "pack_codes",
    "perturb",
    "perturb_member",
    "seed_replay",
    "shape_fitness",
    "stochastic_rounding",
    "unpack_codes",
    "update_in_place",
]


def __getattr__(name: str) -> Any:
    """Imports `jes.api` when it is first used: entry points are modules in it."""
    if name in ("Result", "answer", "fine_tune"):
        from jes import api

        return getattr(api, name)
    raise AttributeError(f"module 'jes' has no attribute {name!r}")
