"""Says what a run takes on accelerators that are not there: nothing is loaded or run.

    python -m jes.plan --config=configs/arc_c.py --target=h100 [--config.NAME=VALUE ...]
    python -m jes.plan --config.model=qwen2.5-7b --target=v5e:8 \\
      --config.model_parallel=8

The programs of a generation are compiled by the accelerator's own compiler, which says
what they hold: a table of them, how many members fit, and by the rates of the data
sheet the least time of a generation. The model may be a folder, of which only
config.json is read, or one of the shapes in `jes.models.shapes`. All prompts are as
long as `--prompt_tokens` says. Targets: h100, h200, a100, v5e, v5p, v6e, tpu7x, and cpu
for this machine; h100:8 for eight of them in one host.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from rich.table import Table

from jes.config import Settings, freeze
from jes.core.mesh import make_mesh
from jes.core.noise import PyTree
from jes.core.programs import Abstract, Analysis, Compiled, bytes_of
from jes.errors import InputError
from jes.io import command_line
from jes.io.console import console, doing
from jes.memory import analyse, free_bytes
from jes.models.config import ModelConfig
from jes.models.partition import leaf_sharding
from jes.models.qwen import Decoder
from jes.models.safetensors_files import EMBEDDED
from jes.models.shapes import SHAPES
from jes.models.weights import leaf_shapes
from jes.questions import Batch, Evaluation, rows_of, texts_in
from jes.rollout import dtype_of_centre
from jes.sampling.likelihood import pack_choices
from jes.sampling.packing import text_tokens
from jes.sampling.prompts import pad
from jes.tasks.rewards import Reward
from jes.tasks.task import Task
from jes.update import first_state, tell


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


class Plan(NamedTuple):
    """What a run takes on each device.

    Attributes:
      held: bytes by name of what is held over the whole run.
      programs: of a generation, for `chunk` members at once.
      chunk: members held at once; 0 if not even one fits.
      peak: bytes, at most at a time.
      memory: bytes that there are.
      seconds: least time of a generation by the data sheet, by part.
    """

    held: dict[str, int]
    programs: list[Compiled]
    chunk: int
    peak: int
    memory: float
    seconds: dict[str, float]


def devices_of(name: str, count: int) -> Sequence[jax.Device]:
    """Devices to compile for.

    Raises:
      InputError: for an unknown target, a number of TPUs that there is no grid of, or
        where the compiler is not installed.
    """
    from jax.experimental import topologies

    if name not in TARGETS:
        raise InputError(f"--target is one of {', '.join(TARGETS)}, not {name!r}")
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
            raise InputError(f"--target: at most {max(target.grids)} devices of {name}")
        needed = "libtpu"
        kwargs = {"platform": "tpu", "topology_name": f"{name}:{grids[min(grids)]}"}
    try:
        return topologies.get_topology_desc(**kwargs).devices[:count]
    except Exception as error:  # of many kinds: no plugin, no library, an unknown grid
        raise InputError(
            f"there is no compiler for {name} here ({str(error).splitlines()[0]}): "
            f"pip install --no-deps {needed}"
        ) from error


def model_config(name: str) -> ModelConfig:
    """The shape of a model: by name, or that of a folder.

    Raises:
      InputError: if there is none.
    """
    if name in SHAPES:
        return ModelConfig.from_hf(SHAPES[name])
    file = Path(EMBEDDED.get(name, name)) / "config.json"
    if not file.is_file():
        known = ", ".join(SHAPES)
        raise InputError(f"--config.model: no folder {name}, nor a shape: {known}")
    return ModelConfig.from_hf(json.loads(file.read_text()))


def stand_ins(
    analysis: Analysis,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: Any = jnp.float32,
) -> PyTree:
    """θ, or its displacement, of a shape alone."""
    leaves = {
        path: Abstract(
            analysis,
            jax.ShapeDtypeStruct(shape, dtype),
            leaf_sharding(path, config, mesh) if mesh else None,
        )
        for path, shape in leaf_shapes(config).items()
    }
    return unflatten_dict(leaves, sep="/")


def questions(
    settings: Settings, config: ModelConfig, tokens: int
) -> tuple[Evaluation, Batch]:
    """A task of prompts of one length, and a batch of them."""
    new = settings.sampling.max_new_tokens or 64
    task = Task(
        name="plan",
        train=(),
        test=(),
        prompt=lambda example: "",
        reward=lambda example, text: Reward(0.0),
        choices=lambda example: ["a"] * 4,
        answer=lambda example: 0,
        max_new_tokens=new,
    )
    evaluation = Evaluation(
        model=Decoder(config),
        tokenizer=None,
        task=task,
        sampling=dataclasses.replace(settings.sampling, eos_ids=(0,)),
        mode=settings.mode,
        dtype=settings.dtype,
        draw=settings.draw,
        buckets=(tokens,),
        slots=settings.slots,
        slice_tokens=settings.slice_tokens,
    )
    prompts = [[1] * tokens] * (settings.prompts or 64)
    if settings.mode == "likelihood":
        return evaluation, pack_choices(prompts, [[[1], [2], [3], [4]]] * len(prompts))
    return evaluation, pad(prompts, (tokens,))


def plan(settings: Settings, target: str, tokens: int) -> Plan:
    """What a run takes on a target, 'h100' or 'v5e:4', with prompts of so many tokens.

    Raises:
      InputError: as `devices_of` and `model_config`, and for what is not planned yet.
    """
    if settings.method != "es" or settings.quantize:
        raise InputError("--config: jes.plan is for ES on float models")
    name, _, count = target.partition(":")
    if not (count or "1").isdecimal():
        raise InputError(f"--target: {count!r} is no number of devices")
    devices = devices_of(name, int(count or 1))
    config = model_config(settings.model)
    try:
        mesh = make_mesh(settings.model_parallel, devices)
    except ValueError as error:
        raise InputError(str(error)) from error
    evaluation, batch = questions(settings, config, tokens)
    evolution = settings.evolution
    memory = free_bytes() if name == "cpu" else TARGETS[name].memory * SHARE
    share = len(devices) // settings.model_parallel

    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else None
    place = everywhere or SingleDeviceSharding(devices[0])
    analysis = Analysis(elsewhere=place)
    params = stand_ins(analysis, config, mesh, dtype_of_centre(evaluation, evolution))
    held, centre = {"weights": bytes_of(params)}, params
    if evolution.whole_numbers:
        centre = stand_ins(analysis, config, mesh, jnp.int32)
        held["displacement"] = bytes_of(centre)
    if settings.anchor in ("device", "bfloat16"):
        small = settings.anchor == "bfloat16" or settings.dtype == "bfloat16"
        held["anchor"] = bytes_of(stand_ins(analysis, config, mesh)) // (1 + small)
    free = memory - sum(held.values())
    members = -(-settings.population // share)
    chunk = min(settings.chunk or members, members)
    while True:
        asked = Analysis(elsewhere=place)
        own = jax.tree.map(asked.stand_in, params)
        analyse(asked, evaluation, own, evolution.noise, batch, chunk)
        if asked.peak <= free or settings.chunk:
            break
        fewer = int(chunk * free / asked.peak)
        if chunk == 1:
            break
        chunk = max(1, min(chunk - 1, fewer))

    key: Any = Abstract(analysis, jax.eval_shape(jax.random.key, 0), None)
    like = jax.ShapeDtypeStruct((settings.population,), jnp.float32)
    fitness: Any = Abstract(analysis, like, None)
    anchor = None if settings.decay == "none" else params
    if evolution.whole_numbers:
        fitness = np.zeros(settings.population, np.float32)
    state = jax.eval_shape(lambda tree: first_state(evolution, tree), centre)
    state = jax.tree.map(lambda leaf: Abstract(analysis, leaf, None), state)
    tell(evolution, centre, state, key, fitness, anchor, share=settings.share_update)

    peak = sum(held.values()) + int(max(asked.peak, analysis.peak))
    fits = peak <= memory
    programs = [*asked.compiled, *analysis.compiled]
    seconds = least_seconds(settings, config, TARGETS[name], len(devices), batch)
    return Plan(held, programs, chunk if fits else 0, peak, memory, seconds)


def least_seconds(
    settings: Settings, config: ModelConfig, target: Target, devices: int, batch: Batch
) -> dict[str, float]:
    """By the data sheet's rates: of reading, decoding, and the noise of the update.

    Reading is bound by operations; decoding by the weights that each step reads; an
    update by the 110 integer operations of a random number, of which a device does a
    fiftieth of what its matrix units do. Of signs 32 share one.
    """
    if not target.rate:
        return {}
    sizes = leaf_shapes(config)
    every = sum(map(math.prod, sizes.values()))
    table = config.vocab_size * config.hidden_size
    layers = every - table * (1 if config.tie_word_embeddings else 2)
    text, rows = text_tokens(texts_in(batch)), rows_of(batch)
    new = settings.sampling.max_new_tokens or 64
    steps = new if settings.mode == "generate" else 0
    each = settings.population / devices
    width = jnp.dtype(settings.dtype).itemsize
    operations = 4 + 110 / 32 if settings.noise == "sign" else 110
    return {
        "reading": each * 2 * (layers * text + table * rows) / target.rate,
        "decoding": each * steps * width * (layers + table) / target.bandwidth,
        "update": settings.population * every * operations / (target.rate / 50),
    }


def tables(found: Plan, target: str) -> list[Table]:
    """The plan for people."""
    programs = Table(
        "program", "compiled s", *(f"{n} GB" for n in Compiled._fields[2:])
    )
    for each in found.programs:
        sizes = (f"{size / 1e9:.2f}" for size in each[2:])
        programs.add_row(each.name.strip("_"), f"{each.seconds:.0f}", *sizes)
    whole = Table("each device", target)
    for name, size in found.held.items():
        whole.add_row(f"{name} GB", f"{size / 1e9:.2f}")
    whole.add_row("peak GB", f"{found.peak / 1e9:.2f} of {found.memory / 1e9:.1f}")
    whole.add_row("members at once", str(found.chunk or "none fits"))
    for name, seconds in found.seconds.items():
        whole.add_row(f"{name}, at least s", f"{seconds:.3g}")
    return [programs, whole]


def main() -> None:
    """The command line."""
    config_flag = command_line.config_flag()
    target = flags.DEFINE_string("target", "h100", "What to plan for, such as h100:8.")
    tokens = flags.DEFINE_integer("prompt_tokens", 128, "Tokens of a prompt.", 1)
    as_json = flags.DEFINE_bool("json", False, "Print the plan as JSON.")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        with doing(f"compiling for {target.value}"):
            found = plan(freeze(config_flag.value), target.value, tokens.value)
        if as_json.value:
            programs = [each._asdict() for each in found.programs]
            print(json.dumps(found._asdict() | {"programs": programs}))
        else:
            console.print(*tables(found, target.value))

    os.environ.update(TPU, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("jax").setLevel(logging.ERROR)
    command_line.start(command, [Settings])


if __name__ == "__main__":
    main()
