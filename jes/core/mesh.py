"""Several devices: a mesh with the axes 'population' and 'model'.

Members are spread over 'population', and the arrays of one model over 'model'.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

POPULATION, MODEL = "population", "model"


def make_mesh(
    model_parallel: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """The devices, by default all of this process, as a mesh; None for a single one.

    Raises:
      ValueError: if `model_parallel`, the size of 'model', does not divide them.
    """
    devices = jax.local_devices() if devices is None else devices
    if model_parallel < 1 or len(devices) % model_parallel:
        raise ValueError(
            f"model_parallel={model_parallel} does not divide the {len(devices)} "
            "devices of a process"
        )
    if len(devices) == 1:
        return None
    grid = np.array(devices).reshape(-1, model_parallel)
    return Mesh(grid, (POPULATION, MODEL), axis_types=(AxisType.Auto,) * 2)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays are on; None where they are on one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays on every device of a mesh; those that are there stay as they are."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: leaf if mesh_of(leaf) else jax.device_put(leaf, everywhere), tree
    )


def model_is_spread(mesh: Mesh | None) -> bool:
    """Whether the arrays of a model on this mesh are spread over several devices."""
    return mesh is not None and mesh.shape.get(MODEL, 1) > 1
