"""Accelerators by their data sheets, and their compilers without the devices."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """An accelerator, by its data sheet.

    Attributes:
      memory: bytes of a device.
      rate: bfloat16 operations of its matrix units a second, dense.
      bandwidth: bytes a second of its memory.
      grids: TPUs: topology by number of devices; a device of the smallest stands for 1.
      card: GPUs: fields of a `GpuDeviceInfoProto` that differ between cards.
    """

    memory: float
    rate: float
    bandwidth: float
    grids: dict[int, str] = {}  # noqa: RUF012  not changed
    card: dict[str, Any] = {}  # noqa: RUF012


HOPPER = {
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "core_count": 132,
    "l2_cache_size": 50 * 2**20,
    "clock_rate_ghz": 1.98,
    "compute_capability": (9, 0),
}
AMPERE = {
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "core_count": 108,
    "l2_cache_size": 40 * 2**20,
    "clock_rate_ghz": 1.41,
    "compute_capability": (8, 0),
}
FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
TARGETS = {
    "h100": Target(80e9, 989e12, 3.35e12, card=HOPPER),
    "h200": Target(141e9, 989e12, 4.8e12, card=HOPPER),
    "a100": Target(80e9, 312e12, 2.04e12, card=AMPERE),
    "v5e": Target(16e9, 197e12, 0.82e12, FLAT),
    "v6e": Target(32e9, 918e12, 1.64e12, FLAT),
    "v5p": Target(95e9, 459e12, 2.77e12, DEEP),
    "tpu7x": Target(192e9, 2307e12, 7.4e12, DEEP),
    "cpu": Target(0, 0, 0),  # this machine
}
SHARE = 0.9
"""Of a device's memory that a run uses."""
CARD = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  core_count: {core_count} fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz} device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment of libtpu on a machine without TPUs."""


def devices_of(name: str, count: int) -> Sequence[jax.Device]:
    """Devices to compile for.

    Raises:
      ValueError: for an unknown target, a number of TPUs that there is no grid of, or
        where the compiler is not installed.
    """
    from jax.experimental import topologies

    if name not in TARGETS:
        raise ValueError(f"--target is one of {', '.join(TARGETS)}, not {name!r}")
    target = TARGETS[name]
    if name == "cpu":
        return jax.local_devices()[:count]
    if not target.grids:
        card = target.card
        major, minor = card["compute_capability"]
        fields = card | {"name": name.upper(), "major": major, "minor": minor}
        fields |= {"memory": target.memory, "bandwidth": target.bandwidth}
        text = CARD.format(fpus_per_core=128 if major > 8 else 64, **fields)
        place = importlib.util.find_spec("nvidia")
        for folder in place.submodule_search_locations or [] if place else []:
            os.environ["PATH"] += f"{os.pathsep}{folder}/cuda_nvcc/bin"
        needed = "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12"
        kwargs = {"platform": "cuda", "topology_name": "", "target_config": text}
        kwargs["topology"] = f"1x1x{count}"
    else:
        grids = {n: grid for n, grid in target.grids.items() if n >= count}
        if not grids:
            raise ValueError(f"--target: at most {max(target.grids)} devices of {name}")
        needed = "libtpu"
        kwargs = {"platform": "tpu", "topology_name": f"{name}:{grids[min(grids)]}"}
    try:
        return topologies.get_topology_desc(**kwargs).devices[:count]
    except Exception as error:  # of many kinds: no plugin, no library, an unknown grid
        raise ValueError(
            f"there is no compiler for {name} here ({str(error).splitlines()[0]}): "
            f"pip install --no-deps {needed}"
        ) from error
