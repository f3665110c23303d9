"""Members and prompts that are held at once: what is useful, and what fits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from marks import slow_except

from jes import memory, train
from jes.config import default, freeze
from jes.core.noise import generation_key
from jes.core.programs import Analysis, TooLargeError, program
from jes.errors import InputError
from jes.experiment import Experiment, make_experiment, pick, settled
from jes.memory import Held, Peak, choose, most_that_fit, slot_choices
from jes.plan import model_config, stand_ins
from jes.questions import Evaluation, batch_of, rows_of
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


def with_settings(experiment: Experiment, **changes: Any) -> Experiment:
    settings = dataclasses.replace(experiment.settings, **changes)
    return experiment._replace(settings=settings)


class Machine:
    """Stands in for the compiler: a member takes 100 bytes, and 10 a prompt at a time.

    Attributes:
      analysed: members and slots that were asked about.
    """

    def __init__(self) -> None:
        self.analysed: list[tuple[int, int]] = []

    def peak_of(
        self, evaluation: Evaluation, params: Any, noise: Any, batch: Any, *sizes: int
    ) -> Peak:
        budget, members = sizes
        self.analysed.append((members, evaluation.slots))
        rows = evaluation.slots or rows_of(batch)
        weights, rest = 100 * members, 10 * members * rows
        complete = weights <= budget
        return Peak(weights + rest * complete, complete)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(memory, "peak_of", made.peak_of)
    return made


@pytest.mark.parametrize(
    ("settings", "budget", "expected", "analysed"),
    [
        # With 4 prompts all 12 members are useful, and each takes 140 bytes.
        ({}, 1680, Held(12, 0), [12]),
        # 10 fit: two chunks of 6.
        ({}, 1400, Held(6, 0), [12, 1, 6]),
        ({}, 600, Held(4, 0), [12, 1, 4]),
        ({}, 140, Held(1, 0), [12, 1]),
        # One prompt at a time is what fits.
        ({}, 110, Held(1, 1), [12, 1, 1]),
        # As set, without an analysis.
        ({"chunk": 3, "slots": 4}, 1, Held(3, 0), []),
        ({"chunk": 50, "slots": 2}, 1, Held(12, 2), []),
        # Slots for the members that are set; members for the slots that are set.
        ({"chunk": 3, "prompts": 64}, 3 * 260, Held(3, 16), [3, 3]),
        ({"chunk": 3, "prompts": 64}, 3 * 740, Held(3, 0), [3]),
        ({"slots": 2}, 250, Held(2, 2), [12, 1, 2]),
        # 64 prompts: one member is enough.
        ({"prompts": 64}, 10**9, Held(1, 0), [1]),
    ],
)
def test_what_is_held(
    settings: dict[str, Any],
    budget: int,
    expected: Held,
    analysed: list[int],
    small_model: Path,
    machine: Machine,
) -> None:
    experiment = make(small_model, **settings)
    assert choose(with_settings(experiment, memory_gb=budget / 1e9)) == expected
    assert [members for members, _ in machine.analysed] == analysed


def test_a_budget_that_is_too_small_is_an_error(
    small_model: Path, machine: Machine
) -> None:
    experiment = make(small_model)
    with pytest.raises(InputError, match=r"1 prompts .* at least 1e-07 GB, and 9e-08"):
        choose(with_settings(experiment, memory_gb=90e-9))
    with pytest.raises(InputError, match=r"3 member.* least 3.3e-07 GB, and 3.2e-07"):
        choose(with_settings(experiment, memory_gb=320e-9, chunk=3))


def test_a_line_finds_what_fits_beside_what_members_share() -> None:
    """1000 bytes for all, 50 a member; more than one line where it bends."""
    tried: list[int] = []

    def peak(members: int) -> Peak:
        tried.append(members)
        return Peak(1000 + 50 * members + members**2, complete=True)

    chunk, one = most_that_fit(peak, 100, 100, budget=2000)
    assert one.bytes == 1051
    assert chunk == max(n for n in tried if 1000 + 50 * n + n * n <= 2000) > 4
    assert len(tried) <= 5


def test_slots() -> None:
    assert slot_choices(64, 5) == [0, 16, 8, 4, 2, 1]
    assert slot_choices(200, 300) == [50, 25, 13, 7, 4, 2, 1]
    assert slot_choices(1000, 300)[0] == 64  # on a CPU
    assert slot_choices(1, 300) == [0]


def test_an_analysis_follows_what_is_held() -> None:
    double = program(lambda x: 2 * x)
    add = program(jnp.add, donate_argnums=0)
    analysis = Analysis()
    x = analysis.stand_in(jnp.ones(1000))
    y = double(x)
    assert (y.shape, analysis.peak) == ((1000,), 4000)
    z = double(y)
    assert analysis.peak == 8000
    z = add(z, y)  # in place
    assert analysis.peak == 8000
    del y
    double(z)
    assert analysis.peak == 8000
    with pytest.raises(TooLargeError):
        double(Analysis(budget=3999).stand_in(jnp.ones(1000)))
    np.testing.assert_array_equal(double(jnp.ones(3)), [2, 2, 2])


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {}),
        (1, {"slots": 2, "memory_gb": 1.0}),
        (2, {}),
    ],
)
def test_what_is_analysed_is_what_runs(
    devices: int, changes: dict[str, Any], small_model: Path
) -> None:
    """A rollout of the members that are chosen compiles nothing new."""
    jax.clear_caches()
    experiment = make(small_model, devices=devices, **changes)
    compiled: list[str] = []

    def note(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        held = choose(experiment)
        assert any("decode" in name for name in compiled)
        compiled.clear()
        settings, evolution = experiment.settings, experiment.evolution
        experiment = settled(experiment, held._asdict())
        ask(
            experiment.evaluation,
            experiment.pretrained.params,
            generation_key(settings.root, 0),
            pick(experiment, 0),
            noise=evolution.noise,
            population=evolution.population,
            chunk=held.chunk,
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    heavy = ("draw", "unrolled", "decode", "prefill", "insert", "empty", "take")
    assert not [name for name in compiled if any(word in name for word in heavy)]


CHOICES = {"task": "tiny/rules", "mode": "likelihood", "buckets": (96,)}


@pytest.mark.parametrize("mode", slow_except({"generate"}, ["generate", "likelihood"]))
def test_what_is_chosen_fits(mode: str, small_model: Path) -> None:
    changes = CHOICES if mode == "likelihood" else {}
    experiment = make(small_model, **changes)
    evaluation, params = experiment.evaluation, experiment.pretrained.params
    batch = batch_of(evaluation, pick(experiment, 0))

    def bytes_of(members: int) -> int:
        noise = experiment.evolution.noise
        return memory.peak_of(evaluation, params, noise, batch, 10**12, members).bytes

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert bytes_of(1) >= weights
    experiment = with_settings(experiment, memory_gb=3.5 * bytes_of(1) / 1e9)
    held = choose(experiment)
    assert 1 < held.chunk < 12
    assert bytes_of(held.chunk) <= 1e9 * experiment.settings.memory_gb


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\n"}
    monkeypatch.setattr(memory, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert memory.free_bytes() == int(0.6 * 1024_000)
    group = "/sys/fs/cgroup/memory"
    files |= {f"{group}.max": "1000000\n", f"{group}.current": "300000\n"}
    assert memory.free_bytes() == int(0.6 * 350_000)
    files[f"{group}.stat"] = "anon 5\ninactive_file 100000\n"
    assert memory.free_bytes() == int(0.6 * 400_000)
    files[f"{group}.max"] = "max\n"
    assert memory.free_bytes() == int(0.6 * 1024_000)


def test_free_memory_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert memory.free_bytes() == 810
    assert memory.useful_members(12, 64) == 12

    # Not the host's memory, where the allocator says nothing.
    monkeypatch.setattr(Device, "memory_stats", lambda device: None)
    with pytest.raises(InputError, match="how much to use with memory_gb"):
        memory.free_bytes()


def test_where_nothing_fits_a_gpu_the_part_that_jax_takes_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    least = Peak(3 * 10**9, complete=True)
    assert "JAX takes" not in str(memory.too_large(1, 8, least, -(10**9)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    said = str(memory.too_large(1, 8, least, -(10**9)))
    assert "take at least 3 GB, and 0 GB can be used" in said
    assert "three quarters of a GPU; XLA_CLIENT_MEM_FRACTION=0.95" in said
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert "JAX takes" not in str(memory.too_large(1, 8, least, 0))


@pytest.mark.parametrize(
    ("shape", "limit", "anchor", "budget"),
    [
        # GB by hand: 0.9 of what the weights leave, less the anchor. Of files in
        # bfloat16 an anchor is half as large as the weights.
        ("qwen2.5-1.5b", 32, "device", 0.9 * (32 - 6.17) - 3.09),
        ("qwen2.5-1.5b", 32, "none", 0.9 * (32 - 6.17)),
        ("qwen2.5-3b", 80, "device", 0.9 * (80 - 12.34) - 6.17),
        ("qwen2.5-7b", 80, "host", 0.9 * (80 - 30.46)),
        ("qwen2.5-7b", 80, "bfloat16", 0.9 * (80 - 30.46) - 15.23),
        ("qwen2.5-7b", 32, "none", 0.9 * (32 - 30.46)),
    ],
)
def test_the_budget_is_what_is_still_free(
    shape: str,
    limit: float,
    anchor: str,
    budget: float,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, place = (
        model_config(shape),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place),
        stand_ins(Analysis(elsewhere=place), config, None),
    )
    in_use = memory.bytes_of(params)

    class Device:
        def memory_stats(self) -> dict[str, float]:
            return {"bytes_limit": limit * 1e9, "bytes_in_use": in_use}

    experiment = make(small_model, anchor=anchor, chunk=1)
    files = dict(experiment.pretrained.hf_config) | {"dtype": "bfloat16"}
    pretrained = dataclasses.replace(
        experiment.pretrained, params=params, hf_config=files
    )
    experiment = experiment._replace(pretrained=pretrained)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert memory.budget_for_members(experiment) == pytest.approx(
        budget * 1e9, rel=2e-3
    )


def test_the_anchor_is_to_come(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**9)
    experiment = make(small_model)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(experiment.pretrained.params))
    assert memory.budget_for_members(experiment) == pytest.approx(
        10**9 - weights, abs=9
    )
    experiment = with_settings(experiment, anchor="host")
    assert memory.budget_for_members(experiment) == pytest.approx(10**9, abs=9)


def test_a_run_chooses_once(
    small_model: Path, tmp_path: Path, machine: Machine
) -> None:
    experiment = make(small_model, prompts=48, population=4, memory_gb=580e-9)

    def claim(**changes: Any) -> dict[str, Any]:
        changed = with_settings(experiment, **changes)
        settings = dataclasses.asdict(changed.settings)
        return claim_run(tmp_path, settings, lambda _: choose(changed)._asdict())

    expected = {"chunk": 1, "slots": 0}
    assert claim() == expected
    count = len(machine.analysed)
    # The run goes on, also for longer.
    assert claim(generations=7) == expected
    assert len(machine.analysed) == count
    # Other settings of memory are chosen for anew.
    assert claim(generations=7, chunk=1, memory_gb=250e-9) == {"chunk": 1, "slots": 12}
    assert len(machine.analysed) > count


def test_a_run_that_goes_on_with_other_versions_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = default().to_dict()
    assert claim_run(tmp_path, config, lambda _: {}) == {}
    kept = (tmp_path / "constraints.txt").read_text()
    assert f"jax=={jax.__version__}\n" in kept
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    record["versions"] |= {"jax": "0.1", "device": "TPU v9"}
    path.write_text(json.dumps(record))
    capsys.readouterr()
    claim_run(tmp_path, config, lambda _: {})
    out = " ".join(capsys.readouterr().out.split())
    assert f"jax 0.1 then, {jax.__version__} now; device TPU v9 then, cpu now" in out
    assert (tmp_path / "constraints.txt").read_text() == kept


@pytest.mark.slow
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
