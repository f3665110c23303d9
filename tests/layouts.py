"""The same work on meshes of different shapes; run with 8 devices of the CPU.

    python tests/layouts.py FOLDER > results.json

For each mesh what members answer, how likely they find choices, and where an update
leads; then runs of three generations, one of them begun on one device and continued on
four, which share its updates. `tests/test_devices.py` compares.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import small_run
from random_checkpoint import write_checkpoint

import jes
from jes import train
from jes.core.anchor import keep_anchor
from jes.core.evolution import Evolution
from jes.core.mesh import make_mesh, mesh_of
from jes.models.shapes import QWEN2
from jes.models.weights import Pretrained
from jes.questions import MODES, Evaluation, batch_of, prepare
from jes.rollout import answer, ask, examine, prepare_rollout
from jes.sampling.generate import Sampling
from jes.update import _tell, first_state, tell

SHAPE = small_run.SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
MESHES = [(1, 1), (4, 1), (8, 1), (2, 2), (8, 4)]
"""Devices, and how many of them a model is spread over."""

POPULATION = 5
EVOLUTION = Evolution(
    population=POPULATION, sigma=0.1, alpha=0.1, decay="l2", decay_coefficient=0.5
)


def evaluation(pretrained: Pretrained, mode: str) -> Evaluation:
    task = jes.tasks.load_task(
        "tiny/max", root="", seed=0, train_examples=12, test_examples=4
    )
    return Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        sampling=Sampling(eos_ids=pretrained.eos_ids),
        mode=mode,
        buckets=(32,),
    )


def on_mesh(model: Path, devices: int, model_parallel: int, results: dict) -> None:
    """Everything that one generation computes, into `results`."""
    mesh = make_mesh(model_parallel, jax.devices()[:devices])
    pretrained = jes.load(model, mesh=mesh)
    params, key = pretrained.params, jax.random.key(7)
    name = f"{devices}/{model_parallel}"
    for mode in MODES:
        each = evaluation(pretrained, mode)
        questions = prepare(each, each.task.train)
        score = ask(
            each,
            params,
            key,
            questions,
            noise=EVOLUTION.noise,
            population=POPULATION,
            chunk=2,
        )
        results[f"{mode} {name}"] = np.array(jax.tree.leaves(score))
        held_out = [*questions, *prepare(each, each.task.test)]  # 16: not in even parts
        score = examine(each, params, held_out[:-1], batch_size=4)
        results[f"{mode} held out {name}"] = np.array(jax.tree.leaves(score))
    # The numbers behind the choices, of the members that `ask` has asked first.
    devices = 1 if mesh is None else mesh.shape["population"]
    members = np.arange(devices * min(2, -(-POPULATION // devices)))
    batch = batch_of(each, questions)
    for draw in ("member", "layer") if name == "2/2" else ("member",):
        chosen = dataclasses.replace(each, draw=draw)
        rollout = prepare_rollout(chosen, params, EVOLUTION.noise, mesh)
        found = answer(rollout, key, members, batch)
        kind = "log-likelihoods" + " by layer" * (draw == "layer")
        results[f"{kind} {name}"] = np.asarray(found)[:2]
    state = first_state(EVOLUTION, params)
    anchor = keep_anchor(params, "host")
    for generation in range(2):
        key = jes.generation_key(jax.random.key(7), generation)
        fitness = np.random.default_rng(generation).normal(size=POPULATION)
        before = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        params, state = tell(
            EVOLUTION, params, state, key, fitness.astype("float32"), anchor
        )
        after = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        assert before == after, (before, after)
    # On one device weights are where JAX likes them, until the anchor's place is given.
    assert mesh is None or _tell._cache_size() == 1
    _tell.clear_cache()
    assert mesh_of(params) == mesh
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        copies = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
        parts = {str(shard.index) for shard in leaf.addressable_shards}
        assert len(copies) == len(parts), (path, "differs from device to device")
        results[f"update {name} {jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    share = [leaf.addressable_shards[0].data.size / leaf.size for _, leaf in leaves]
    sizes = [leaf.size for _, leaf in leaves]
    results[f"held {name}"] = np.average(share, weights=sizes)


def run(model: Path, workdir: Path, **settings: Any) -> dict[str, Any]:
    """A small run, and what came of it: its ledger, but for the header."""
    config = small_run.get_config(str(model))
    config.update({"generations": 3, "population": POPULATION, "devices": 1})
    config.update(settings)
    train.run(config, workdir)
    rows = small_run.rows(workdir / "ledger.jsonl")[1:]
    return {
        "fitness": [row["fitness"] for row in rows if "fitness" in row],
        "fingerprint": rows[-1]["fingerprint"],
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    folder = Path(sys.argv[1])
    vocabulary = json.loads((small_run.EMBEDDED / "config.json").read_text())
    shape = QWEN2 | SHAPE | {"vocab_size": vocabulary["vocab_size"]}
    model = folder / "model"
    write_checkpoint(
        model, shape, tokenizer=small_run.EMBEDDED, dtype="float32", seed=0
    )
    results: dict[str, Any] = {}
    for devices, model_parallel in MESHES:
        on_mesh(model, devices, model_parallel, results)
    np.savez(folder / "results.npz", **results)
    run(model, folder / "moved", generations=2)
    # Its arrays are small: parts of them are to be, too.
    jes.transforms._in_place.PART = 64
    outcomes = {
        "one": run(model, folder / "one"),
        "four": run(model, folder / "four", devices=4),
        "split": run(model, folder / "split", devices=4, model_parallel=2),
    }
    outcomes["moved"] = run(model, folder / "moved", devices=4, share_update=True)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
