"""Three updates in whole numbers, on meshes of up to 8 devices of the CPU, as hashes.

    python tests/whole_number_updates.py DEVICES/MODEL_PARALLEL/PART/SHARE ...

A line of JSON for each: the fingerprints of θ with each decay. PART is the least number
of weights that are updated at once. `tests/test_whole_numbers.py` knows the hashes.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.evolution import Evolution
from jes.core.mesh import make_mesh
from jes.models.config import ModelConfig
from jes.models.partition import place
from jes.models.shapes import QWEN2
from jes.models.weights import fingerprint, leaf_shapes
from jes.transforms import _in_place
from jes.update import first_centre, first_state, replay, weights_of

SHAPE = QWEN2 | {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
DECAYS = {"none": 0.0, "l2": 0.5, "l1": 0.01}
FITNESS = [
    [3.0, 1.5, -2.25, 0.5, 7.0],
    [0.1, 0.2, 0.3, float("nan"), 0.7],
    [1.0, 1.0, 1.0, 1.0, 1.0],
]


def base(config: ModelConfig) -> dict[str, Any]:
    """Weights that are the same on every machine."""
    params: dict[str, Any] = {}
    for number, (path, shape) in enumerate(sorted(leaf_shapes(config).items())):
        values = (np.arange(np.prod(shape)) * 7919 + number) % 1009 - 504
        node, names = params, path.split("/")
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = np.float32(values / 512).reshape(shape)
    return params


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    for layout in sys.argv[1:]:
        devices, parallel, part, share = map(int, layout.split("/"))
        _in_place.PART = part
        found = {}
        for decay, coefficient in DECAYS.items():
            config = ModelConfig.from_hf(SHAPE)
            mesh = make_mesh(parallel, jax.devices()[:devices])
            params = place(jax.tree.map(jnp.asarray, base(config)), mesh)
            evolution = Evolution(
                population=5,
                sigma=0.1,
                alpha=0.1,
                alpha_half_life=1,
                distribution="sign",
                decay=decay,
                decay_coefficient=coefficient,
            )
            centre = first_centre(evolution, params)
            state = first_state(evolution, params)
            root, fitness = jax.random.key(3), np.float32(FITNESS)
            centre, _ = replay(
                evolution, centre, state, root, fitness, share=bool(share)
            )
            found[decay] = fingerprint(weights_of(evolution, centre, params))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
