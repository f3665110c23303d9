"""Several devices: a mesh with the axes 'population' and 'model'.

Members are spread over 'population', and the arrays of one model over 'model'. Where
the parameters are decides where work is done: placed on a mesh, the same functions
use all of its devices; anywhere else, one device and the programs for one device.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

POPULATION, MODEL = "population", "model"


def make_mesh(
    model_parallel: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """The devices as a mesh [population, model]; None for a single one.

    Args:
      model_parallel: size of the axis 'model'; 'population' takes the rest.
      devices: by default all of this process.

    Raises:
      ValueError: if `model_parallel` does not divide the number of devices.
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

    def put(leaf: jax.Array) -> jax.Array:
        there = isinstance(leaf.sharding, NamedSharding)
        return leaf if there else jax.device_put(leaf, everywhere)

    return jax.tree.map(put, tree)


@contextmanager
def on_mesh_of(tree: Any) -> Iterator[int]:
    """Runs what is inside on the mesh of these arrays, if they are on one.

    Yields:
      the number of devices that members are spread over.
    """
    mesh = mesh_of(tree)
    if mesh is None:
        yield 1
        return
    with jax.set_mesh(mesh):
        yield mesh.shape[POPULATION]


def by_member(own: Sequence[str], shared: Sequence[str] = ()) -> Callable:
    """Decorator: on a mesh, every device computes its own members.

    The function gives arrays with a leading axis of members, and is to be jitted.
    Inside `on_mesh_of` each device runs it on its part of that axis; nothing goes from
    device to device but what a model that is spread over 'model' needs.

    Args:
      own: names of arguments with a leading axis of members, of a length that the axis
        'population' divides.
      shared: names of arguments that are the same for all members.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def spread(*args: Any, **kwargs: Any) -> Any:
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                return function(*args, **kwargs)
            settings = dict(signature.bind(*args, **kwargs).arguments)
            names = [name for name in (*own, *shared) if name in settings]
            arrays = {name: settings.pop(name) for name in names}
            whole, parts = PartitionSpec(), PartitionSpec(POPULATION)
            # With an axis of size 1 left to the compiler, it makes another program of
            # the same function, which rounds differently.
            spread_out = mesh.shape.get(MODEL, 1) > 1
            if spread_out and settings.get("noise") is not None:
                settings["noise"] = replace(settings["noise"], partitioned=True)
            manual = {POPULATION} if spread_out else set(mesh.axis_names)
            return jax.shard_map(
                lambda arrays: function(**settings, **arrays),
                in_specs=({name: parts if name in own else whole for name in names},),
                out_specs=parts,
                axis_names=manual,
                # Every result is of a device's own members: nothing to check, and
                # loops may carry what only their later turns make of them.
                check_vma=spread_out,
            )(arrays)

        return spread

    return decorate


def model_is_spread(mesh: Mesh | None) -> bool:
    """Whether the arrays of a model on this mesh are spread over several devices."""
    return mesh is not None and mesh.shape.get(MODEL, 1) > 1
