"""How the parameters of one model are distributed over the axis 'model' of a mesh.

Linear layers that read the residual stream are split by columns and those that write to
it by rows, so that attention and feed-forward each end in one sum over the devices;
embeddings are split by tokens. Norms, and axes that do not divide evenly, are
replicated.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jes.core.mesh import MODEL
from jes.core.noise import leaf_path
from jes.models.config import ModelConfig

SPLIT = (
    ("embed/embedding", P(MODEL), "vocab_size"),
    ("lm_head", P(None, MODEL), "vocab_size"),
    ("layers/attention/q/kernel", P(None, None, MODEL), "num_attention_heads"),
    ("layers/attention/q/bias", P(None, MODEL), "num_attention_heads"),
    ("layers/attention/[kv]/kernel", P(None, None, MODEL), "num_key_value_heads"),
    ("layers/attention/[kv]/bias", P(None, MODEL), "num_key_value_heads"),
    ("layers/attention/o/kernel", P(None, MODEL), "num_attention_heads"),
    ("layers/mlp/(gate|up)/kernel", P(None, None, MODEL), "intermediate_size"),
    ("layers/mlp/down/kernel", P(None, MODEL), "intermediate_size"),
)
"""Path of a leaf, how it is split, and the size that the device count must divide."""


def leaf_sharding(path: str, config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """The sharding of the leaf at a path ('layers/mlp/up/kernel')."""
    count = mesh.shape[MODEL]
    for pattern, spec, parts in SPLIT:
        divides = getattr(config, parts) % count == 0
        if count > 1 and divides and re.fullmatch(pattern, path):
            return NamedSharding(mesh, spec)
    return NamedSharding(mesh, P())


def place(params: Any, config: ModelConfig, mesh: Mesh | None) -> Any:
    """The parameters on a mesh; unchanged if it is None.

    Args:
      params: as `jes.load` returns them. Do not donate them afterwards: replicated
        leaves may share their memory.
      config: of the model.
      mesh: from `jes.core.mesh.make_mesh`.
    """
    if mesh is None:
        return params

    def put(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, leaf_sharding(leaf_path(path), config, mesh))

    return jax.tree_util.tree_map_with_path(put, params)
