"""Members and prompts that are held at once: by an estimate, and by what is taken."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import small_run

from jes import train
from jes.chunk import (
    Held,
    budget_for_members,
    choose,
    fitting,
    member_shape,
    rows_of_member,
)
from jes.config import freeze
from jes.experiment import Experiment, make_experiment
from jes.io import memory
from jes.questions import Evaluation
from jes.rollout import ask
from jes.run_folder import claim as claim_run
from jes.scoring import Score


def make(model: Path, **changes: Any) -> Experiment:
    """A set-up of a small run that leaves the chunk open."""
    config = small_run.get_config(str(model))
    config.chunk, config.prompts, config.population = 0, 4, 12
    config.devices = 1
    config.update(changes)
    return make_experiment(freeze(config))


def estimate(experiment: Experiment) -> int:
    """Of what a member takes with all its prompts at once."""
    return memory.bytes_per_member(
        *member_shape(experiment, rows_of_member(experiment))
    )


def with_memory(experiment: Experiment, members: float) -> Experiment:
    """With as much memory as the estimate of so many members."""
    return with_settings(experiment, memory_gb=members * estimate(experiment) / 1e9)


def with_settings(experiment: Experiment, **changes: Any) -> Experiment:
    settings = dataclasses.replace(experiment.settings, **changes)
    return experiment._replace(settings=settings)


class Taken:
    """Stands in for what a member takes, and notes how often that was measured."""

    def __init__(self) -> None:
        self.bytes: float | None = 0.0
        self.times = 0

    def growth(self, work: Callable[[], Any], devices: int) -> int | None:
        self.times += 1
        assert devices == 1
        return None if self.bytes is None else int(self.bytes)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    made = Taken()
    monkeypatch.setattr(memory, "growth", made.growth)
    return made


@pytest.fixture
def counted() -> None:
    """Skips a test where the system does not say what is in use."""
    if not Path("/proc/self/clear_refs").exists() or jax.devices()[0].memory_stats():
        pytest.skip("for a CPU, on Linux")


@pytest.mark.usefixtures("counted")
def test_growth_is_what_a_program_takes() -> None:
    x = jnp.ones(10_000_000)
    grown = memory.growth(lambda: x + 1)
    assert grown is not None
    assert grown == pytest.approx(x.nbytes, rel=0.05)


@pytest.mark.usefixtures("counted")
def test_what_is_there_for_all_is_not_counted() -> None:
    kept: list[jax.Array] = []

    def work() -> jax.Array:
        if not kept:
            kept.append(jnp.ones(10_000_000))
        return kept[0] + 1

    assert memory.growth(work) == pytest.approx(4e7, rel=0.05)
    assert memory.growth(work, devices=2) == pytest.approx(2e7, rel=0.05)


@pytest.mark.parametrize(("before", "expected"), [(0, 70), (160, 70), (180, None)])
def test_growth_on_an_accelerator(
    before: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the counters of its allocator, unless it has seen a higher peak before."""

    class Device:
        def __init__(self, peak: int) -> None:
            self.highest, self.peak = before, peak

        def memory_stats(self) -> dict[str, int]:
            used = {"bytes_in_use": 80, "peak_bytes_in_use": 0}
            return used | {"bytes_reserved": 20, "peak_bytes_reserved": self.highest}

    devices = [Device(150), Device(170)]
    ran = []

    def work() -> None:
        ran.append(1)
        for device in devices:
            device.highest = max(device.highest, device.peak)

    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.growth(work) == expected
    assert ran == [1]


def test_growth_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> int:
        raise FileNotFoundError("/proc/self/clear_refs")

    monkeypatch.setattr(memory, "start_of_growth", nowhere)
    assert memory.growth(lambda: jnp.ones(3)) is None


@pytest.mark.parametrize(
    ("takes", "expected"),
    [(1.0, 4), (2.0, 2), (0.7, 6), (0.0, 6), (9.0, 1), (None, 4)],
)
def test_the_chunk_is_what_fits_by_measure(
    small_model: Path, taken: Taken, takes: float | None, expected: int
) -> None:
    # 4.5 members by the estimate; chunks of one size: 3 times 4, 2 times 6. What seems
    # to take nothing is taken to be half of it: 9, or 2 times 6.
    experiment = with_memory(make(small_model, slots=4), 4.5)
    assert fitting(experiment, budget_for_members(experiment)).chunk == 4
    taken.bytes = None if takes is None else takes * estimate(experiment)
    assert choose(experiment) == Held(expected, 0)
    assert taken.times == 1


def test_the_estimate_is_enough_where_there_is_room(
    small_model: Path, taken: Taken
) -> None:
    assert choose(with_memory(make(small_model), 25)) == Held(12, 0)
    # As is what was set.
    assert choose(with_memory(make(small_model, slots=4, chunk=3), 1.1)) == Held(3, 0)
    assert choose(with_memory(make(small_model, slots=9, chunk=50), 1)) == Held(12, 0)
    assert not taken.times


def test_slots_follow_what_a_member_takes(small_model: Path, taken: Taken) -> None:
    experiment = with_memory(make(small_model, prompts=64, chunk=1), 1.5)
    taken.bytes = estimate(experiment)
    assert choose(experiment) == Held(1, 0)
    taken.bytes = 2 * estimate(experiment)
    assert choose(experiment) == Held(1, 16)
    assert taken.times == 2


def test_where_one_member_hardly_fits_it_is_tried(
    small_model: Path, taken: Taken
) -> None:
    experiment = with_memory(make(small_model, slots=4), 1.5)
    assert fitting(experiment, budget_for_members(experiment)).chunk == 1
    taken.bytes = 0.5 * estimate(experiment)
    assert choose(experiment) == Held(3, 0)
    assert taken.times == 1


def test_slots_leave_room_for_the_members_that_are_set(small_model: Path) -> None:
    experiment = make(small_model, prompts=64, chunk=4)
    budget = 2 * estimate(experiment)
    assert fitting(experiment, 2 * budget) == Held(4, 0)
    assert fitting(experiment, budget) == Held(4, 16)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("changes", [{}, {"rank": 1}, {"draw": "layer"}, {"slots": 2}])
def test_a_real_member(
    small_model: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, not stood in for: what is held of them fits."""
    experiment = with_memory(make(small_model, **changes), 3.5)
    found = []

    def noted(work: Callable[[], Any], devices: int) -> int | None:
        assert work().shape == (1, 4, experiment.evaluation.max_new_tokens)
        found.append(growth(work, devices))
        return found[0]

    growth = memory.growth
    monkeypatch.setattr(memory, "growth", noted)
    held = choose(experiment)
    assert held.slots == changes.get("slots", 0)
    (taken,) = found
    assert taken is not None
    assert held.chunk * taken <= budget_for_members(experiment)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_measures_once(
    devices: int, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make(small_model, prompts=48, population=4, devices=devices)
    experiment = with_memory(experiment, 1.1)
    measured = []

    def growth(work: Callable[[], Any], busy: int) -> int:
        assert busy == devices
        measured.append(work().shape)
        return 1

    def claim() -> dict[str, Any]:
        settings = dataclasses.asdict(experiment.settings)
        return claim_run(tmp_path, settings, lambda: choose(experiment)._asdict())

    monkeypatch.setattr(memory, "growth", growth)
    expected = {"chunk": 2, "slots": 0}
    assert claim() == expected
    assert measured == [(devices, 48, experiment.evaluation.max_new_tokens)]
    # The run goes on, also for longer.
    experiment = with_settings(experiment, generations=101)
    assert claim() == expected
    assert len(measured) == 1
    # Other settings of memory are chosen for anew.
    experiment = with_settings(experiment, chunk=1)
    assert claim() == expected | {"chunk": 1}
    assert len(measured) == 2


def test_a_run_holds_what_is_chosen(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(evaluation: Evaluation, *args: Any, chunk: int, **settings: Any) -> Score:
        asked.append((chunk, evaluation.slots))
        return ask(evaluation, *args, chunk=chunk, **settings)

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(train, "ask", noted)
    monkeypatch.setattr(train, "choose", lambda experiment: Held(1, 20))
    config = small_run.get_config(str(small_model))
    config.generations = 1
    train.run(config, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["resolved"] == {"chunk": 1, "slots": 20}
    assert asked == [(1, 20)]
