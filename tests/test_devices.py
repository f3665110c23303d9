"""Several devices: the same members, scores and updates however they are laid out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jes
from jes.core.mesh import make_mesh
from jes.experiment import make_evaluation
from jes.questions import prepare
from jes.rollout import _groups
from jes.tasks import load_task

MESHES = ["4/1", "8/1", "2/2", "8/4"]
WHOLE = ["4/1", "8/1"]
"""Meshes on which every device has a model of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `layouts.py` has left."""
    folder = tmp_path_factory.mktemp("layouts")
    program = Path(__file__).with_name("layouts.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "results.npz") as file:
        return dict(file)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_members_score_the_same(mesh: str, results: dict[str, np.ndarray]) -> None:
    """Five members, which no number of devices here divides; in float32, greedily."""
    for mode in ("generate", "likelihood"):
        expected = results[f"{mode} 1/1"]
        assert len(np.unique(expected[0])) > 1  # or it would say nothing
        np.testing.assert_array_equal(results[f"{mode} {mesh}"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_devices_evaluate_apart(mesh: str, results: dict[str, np.ndarray]) -> None:
    """15 questions, which no number of devices here divides."""
    for mode in ("generate", "likelihood"):
        expected = results[f"{mode} held out 1/1"]
        np.testing.assert_array_equal(results[f"{mode} held out {mesh}"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_log_likelihoods_are_the_same(
    mesh: str, results: dict[str, np.ndarray]
) -> None:
    """Up to the order of sums: some nats, as sums of some 100 float32 products."""
    np.testing.assert_allclose(
        results[f"log-likelihoods {mesh}"], results["log-likelihoods 1/1"], rtol=1e-5
    )


@pytest.mark.slow
def test_noise_is_drawn_in_the_layers_of_a_spread_model(
    results: dict[str, np.ndarray],
) -> None:
    found = results["log-likelihoods by layer 2/2"]
    np.testing.assert_allclose(found, results["log-likelihoods 1/1"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_updates_are_the_same(mesh: str, results: dict[str, np.ndarray]) -> None:
    """To the bit where a device has the whole model, and else to 2 ulp of a weight."""
    names = [name for name in results if name.startswith("update 1/1 ")]
    assert names
    for name in names:
        got, expected = results[name.replace("1/1", mesh)], results[name]
        if mesh in WHOLE:
            np.testing.assert_array_equal(got, expected, name)
        else:
            np.testing.assert_array_max_ulp(got, expected, 2)


@pytest.mark.slow
def test_a_model_is_shared_among_devices(results: dict[str, np.ndarray]) -> None:
    assert [float(results[f"held {mesh}"]) for mesh in WHOLE] == [1, 1]
    assert float(results["held 2/2"]) == pytest.approx(1 / 2, abs=0.02)
    # 102 words cannot be shared among four; 2 heads of keys and values can.
    assert float(results["held 8/4"]) < 0.6


@pytest.mark.slow
def test_runs_are_the_same(folder: Path) -> None:
    outcomes: dict[str, Any] = json.loads((folder / "outcomes.json").read_text())
    one = outcomes["one"]
    assert outcomes["four"] == one
    assert outcomes["moved"] == one  # begun on one device, ended on four that share it
    assert outcomes["split"]["fitness"] == one["fitness"]


def test_a_mesh_of_one_device_is_none() -> None:
    assert make_mesh(1, jax.devices()[:1]) is None
    mesh = make_mesh(2)
    assert mesh is not None
    assert dict(mesh.shape) == {"population": 1, "model": 2}
    with pytest.raises(ValueError, match="model_parallel=3 does not divide the 2 dev"):
        make_mesh(3)


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (4, 1), (4, 2), (64, 1)])
def test_an_evaluation_is_one_batch_a_device(devices: int, processes: int) -> None:
    """And each question is in one batch; where they are few, batches are small."""
    pretrained = jes.load("tiny")
    task = load_task("tiny/max", root="", seed=0, train_examples=8, test_examples=100)
    evaluation = make_evaluation(pretrained, task)
    questions = prepare(evaluation, task.test)
    groups = _groups(evaluation, questions, 30, devices, processes)
    every = [n for group in groups for each in group for n in each.numbers]
    assert sorted(every) == list(range(100))
    size = min(30, -(-100 // (devices * processes)))
    assert {each.size for group in groups for each in group} == {size}
    turns = -(-100 // (size * devices))
    assert turns <= len(groups) <= turns + 3  # of other lengths, other groups
    if processes > 1:
        assert len(groups) >= processes
