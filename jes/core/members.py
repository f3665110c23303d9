"""Members of a population as one value, and functions that devices share by member."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jes.core.mesh import POPULATION, model_is_spread
from jes.core.noise import PyTree

EACH, ALL = PartitionSpec(POPULATION), PartitionSpec()
"""How devices share arrays: by member, or all of them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Members:
    """The members of a chunk as variables of a Flax model, with their vmap axes.

    Attributes:
      variables: {'params': θ_k}, each leaf with a leading axis [M, ...]; or
        {'params': θ, 'noise': ε_k}, where members share θ and 'noise' has the axis.
        An empty 'noise' is the unperturbed model.
      keys: typed PRNG keys [M], which sampled answers draw from.
      mesh: that members are spread over; None for one device.
    """

    variables: dict[str, PyTree]
    keys: jax.Array
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def count(self) -> int:
        """M."""
        return self.keys.shape[0]

    @property
    def share_params(self) -> bool:
        """Whether all members have the same params and differ by 'noise'."""
        return "noise" in self.variables

    @property
    def axes(self) -> dict[str, int | None]:
        """The `in_axes` of `variables`."""
        return {"params": None, "noise": 0} if self.share_params else {"params": 0}

    def __getitem__(self, member: int) -> dict[str, PyTree]:
        """The variables of one member."""
        variables = dict(self.variables)
        own = "noise" if self.share_params else "params"
        variables[own] = jax.tree.map(lambda leaf: leaf[member], variables[own])
        return variables

    def replace(self, **collections: PyTree) -> "Members":
        """The same members with other 'params' or 'noise'."""
        return dataclasses.replace(self, variables=self.variables | collections)


def unperturbed(params: PyTree, key: jax.Array | None = None) -> Members:
    """The model itself as the only member; `key` for sampling its answers."""
    key = jax.random.key(0) if key is None else key
    return Members({"params": params, "noise": {}}, key[None])


def by_member(own: Sequence[str] = (), shared: Sequence[str] = ()) -> Callable:
    """Decorator: on a mesh, every device computes its own members by `shard_map`.

    The function returns arrays with a leading axis of members, and is to be jitted.
    The mesh is that of its `Members` argument, or a keyword argument `mesh` (static
    under `jit`).

    Args:
      own: names of arguments with a leading axis of members.
      shared: names of arguments that are the same for all members; others are static.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def spread(*args: Any, mesh: Mesh | None = None, **kwargs: Any) -> Any:
            settings = dict(signature.bind(*args, **kwargs).arguments)
            arrays: dict[str, Any] = {}
            specs: dict[str, Any] = {}
            for name in list(settings):
                if isinstance(settings[name], Members):
                    mesh = settings[name].mesh
                    settings[name] = dataclasses.replace(settings[name], mesh=None)
                    specs[name] = _specs_of(settings[name])
                elif name in own or name in shared:
                    specs[name] = EACH if name in own else ALL
                else:
                    continue
                arrays[name] = settings.pop(name)
            if mesh is None:
                return function(*args, **kwargs)
            # Leaving an axis of size 1 to the compiler changes how it rounds.
            partitioned = model_is_spread(mesh)
            return jax.shard_map(
                lambda arrays: function(**settings, **arrays),
                mesh=mesh,
                in_specs=(specs,),
                out_specs=EACH,
                axis_names={POPULATION} if partitioned else set(mesh.axis_names),
                # Loops may carry values that become per-member later.
                check_vma=partitioned,
            )(arrays)

        kind = inspect.Parameter.KEYWORD_ONLY
        keyword = inspect.Parameter("mesh", kind, default=None)
        parameters = [*signature.parameters.values(), keyword]
        spread.__signature__ = signature.replace(parameters=parameters)  # type: ignore
        return spread

    return decorate


def _specs_of(members: Members) -> Any:
    axes = members.axes.items()
    variables = {name: ALL if axis is None else EACH for name, axis in axes}
    return dataclasses.replace(members, variables=variables, keys=EACH)  # type: ignore
