"""Jitted functions that, given shapes in place of arrays, are analysed, not run.

    @program(static_argnames="model")
    def decode(model, members, prompts): ...

    analysis = Analysis()
    decode(model, jax.tree.map(analysis.stand_in, members), prompts)
    analysis.peak  # bytes
    analysis.compiled  # a `Compiled` for each program

JAX keeps the compiled program: the same function called with arrays of these shapes
runs it, and nothing is compiled twice.
"""

import functools
import math
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class TooLargeError(Exception):
    """A program takes more memory than an analysis allows."""


class Compiled(NamedTuple):
    """What the compiler says of a program: seconds, and bytes of each device."""

    name: str
    seconds: float
    arguments: int
    results: int
    temporaries: int


class Abstract(jax.ShapeDtypeStruct):
    """Stands in for an array in an `Analysis`."""

    def __init__(self, analysis: "Analysis", like: Any, sharding: Any) -> None:
        # That of a single device is left out, as where arrays are given; a device that
        # is not there has to be named.
        on_mesh = sharding if isinstance(sharding, jax.NamedSharding) else None
        place = on_mesh or analysis.elsewhere
        super().__init__(like.shape, like.dtype, sharding=place)
        self.analysis = analysis


class Analysis:
    """Adds up the memory of each device that programs take, as the compiler says.

    Python drops abstract arrays when it would drop the arrays, which says what is held
    while a program runs.

    Attributes:
      budget: bytes; `TooLargeError` is raised as soon as more are needed, or where
        the compiler says that a program does not fit the device.
      elsewhere: the sharding of what has none, if devices are none of this machine.
      peak: most bytes at a time so far, without what `stand_in` stands for.
      compiled: the programs so far.
    """

    def __init__(self, budget: float = math.inf, elsewhere: Any = None) -> None:
        self.budget, self.elsewhere = budget, elsewhere
        self.peak, self._held = 0, 0
        self.compiled: list[Compiled] = []

    def stand_in(self, array: jax.Array) -> Abstract:
        """For an array that is there, and is not counted."""
        return Abstract(self, array, array.sharding)

    def run(self, jitted: Any, args: Any, settings: Any) -> Any:
        """The results of a program as abstract arrays."""
        lowered = jitted.lower(*args, **settings)
        donated = [arg for arg in jax.tree.leaves(lowered.args_info) if arg.donated]
        # Raises before compiling where the results alone are too large.
        self._need(max(0, bytes_of(lowered.out_info) - bytes_of(donated)))
        began = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            # TPUs: their compiler refuses what is larger than the device.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.peak = int(max(self.peak, self.budget + 1))
            raise TooLargeError from error
        seconds = time.perf_counter() - began
        found = compiled.memory_analysis()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        size = found.argument_size_in_bytes, new, found.temp_size_in_bytes
        known = {each._replace(seconds=0) for each in self.compiled}
        if Compiled(jitted.__name__, 0, *size) not in known:  # as for the next layer
            self.compiled.append(Compiled(jitted.__name__, seconds, *size))
        self._need(new + found.temp_size_in_bytes)
        return jax.tree.map(self._hold, lowered.out_info, compiled.output_shardings)

    def _need(self, new: int) -> None:
        self.peak = max(self.peak, self._held + new)
        if self.peak > self.budget:
            raise TooLargeError

    def _hold(self, like: Any, sharding: Any) -> Abstract:
        array = Abstract(self, like, sharding)
        self._change(bytes_of(array))
        weakref.finalize(array, self._change, -bytes_of(array))
        return array

    def _change(self, size: int) -> None:
        self._held += size


def program(function: Callable | None = None, **settings: Any) -> Any:
    """`jax.jit` with these settings, whose programs can be analysed."""
    if function is None:
        return functools.partial(program, **settings)
    jitted = jax.jit(function, **settings)

    @functools.wraps(jitted)
    def call(*args: Any, **kwargs: Any) -> Any:
        for leaf in jax.tree.leaves((args, kwargs)):
            if isinstance(leaf, Abstract):
                return leaf.analysis.run(jitted, args, kwargs)
        return jitted(*args, **kwargs)

    for name in ("lower", "clear_cache", "_cache_size"):
        setattr(call, name, getattr(jitted, name))
    return call


def bytes_of(tree: Any) -> int:
    """Size of the arrays of a tree, or of their parts on each device."""
    size = 0
    for leaf in jax.tree.leaves(tree):
        shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.NamedSharding):
            shape = sharding.shard_shape(shape)
        size += math.prod(shape) * leaf.dtype.itemsize
    return size
