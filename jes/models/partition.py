"""How the parameters of one model are distributed over the axis 'model' of a mesh.

Linear layers that read the residual stream are split by columns and those that write to
it by rows, so that attention and feed-forward each end in one sum over the devices. (A
head that two devices share costs them a sum of its scores too.) Embeddings are split by
tokens. Norms, and axes that do not divide evenly, are replicated.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jes.core.mesh import MODEL
from jes.core.noise import leaf_path

SPLIT = (
    ("embed/embedding", P(MODEL)),
    ("lm_head", P(None, MODEL)),
    ("layers/attention/[qkv]/kernel", P(None, None, MODEL)),
    ("layers/attention/[qkv]/bias", P(None, MODEL)),
    ("layers/attention/o/kernel", P(None, MODEL)),
    ("layers/mlp/(gate|up)/kernel", P(None, None, MODEL)),
    ("layers/mlp/down/kernel", P(None, MODEL)),
)
"""Path of a leaf, and how it is split."""


def leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of the leaf at a path ('layers/mlp/up/kernel')."""
    count = mesh.shape[MODEL]
    for pattern, spec in SPLIT:
        if re.fullmatch(pattern, path) and shape[spec.index(MODEL)] % count == 0:
            return NamedSharding(mesh, spec if count > 1 else P())
    return NamedSharding(mesh, P())


def place(params: Any, mesh: Mesh | None) -> Any:
    """The parameters on a mesh; unchanged if it is None.

    Args:
      params: as `jes.load` returns them. Do not donate them afterwards: replicated
        leaves may share their memory.
      mesh: from `jes.core.mesh.make_mesh`.
    """
    if mesh is None:
        return params

    def put(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        sharding = leaf_sharding(leaf_path(path), leaf.shape, mesh)
        return jax.device_put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(put, params)
