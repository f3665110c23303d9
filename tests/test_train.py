"""`jes.train`: what a run leaves, and that its numbers are what they say."""

import dataclasses
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import get_config, outcome, rows
from tensorboardX.proto.event_pb2 import Event

import jes
from jes import experiment, train
from jes.config import freeze
from jes.core import ledger as ledgers
from jes.core.anchor import displacement
from jes.core.evolution import Evolution
from jes.errors import InputError
from jes.io import checkpoints
from jes.models.weights import fingerprint
from jes.run_folder import RunFolder
from jes.tasks import TASKS
from jes.tasks.task import Reward, Task
from jes.update import first_state

CONTRACT = {
    "generation",
    "fitness_mean",
    "fitness_max",
    "fitness_std",
    "displacement_norm",
    "displacement_norm_drift",
    "tokens_per_second",
    "seconds",
}


def test_run_folder_has_what_the_contract_says(
    finished_run: Path, small_model: Path
) -> None:
    config = json.loads((finished_run / "config.json").read_text())
    assert config["config"] == json.loads(get_config(str(small_model)).to_json())
    assert config["resolved"] == {"chunk": 2, "slots": 0}
    assert {"jes", "jax", "python", "device"} <= config["versions"].keys()
    packages = (finished_run / "constraints.txt").read_text().splitlines()
    assert f"jax=={config['versions']['jax']}" in packages
    assert not any(line.startswith("jes==") for line in packages)

    metrics = rows(finished_run / "metrics.jsonl")
    assert [row["generation"] for row in metrics] == list(range(6))
    assert all(row.keys() >= CONTRACT for row in metrics)
    evaluations = rows(finished_run / "evaluations.jsonl")
    assert [row["generation"] for row in evaluations] == [0, 3, 6]
    assert checkpoints.saved(finished_run / "checkpoints") == [6, 4]
    ledger = ledgers.read(finished_run / "ledger.jsonl")
    assert ledger.header["base"] == fingerprint(jes.load(small_model).params)
    assert list(ledger.fingerprints) == [6]

    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["generations"] == 6
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in metrics))
    assert summary["evaluations"] == {
        "tiny/reverse": {
            "before": evaluations[0]["accuracy"],
            "after": evaluations[2]["accuracy"],
            "lowest": min(row["accuracy"] for row in evaluations),
            "examples": 16,
            "reward": {
                "before": evaluations[0]["reward"],
                "after": evaluations[2]["reward"],
            },
        }
    }
    assert summary["answers"] == 6 * 4 * 48
    distances = rows(finished_run / "distances.jsonl")
    assert [row["generation"] for row in distances] == [0, 3, 6]
    assert summary["distance"] == distances[-1]


def test_the_summary_is_written_last(finished_run: Path) -> None:
    times = {
        path: path.stat().st_mtime_ns
        for path in finished_run.rglob("*")
        if path.is_file()
    }
    assert max(times, key=times.__getitem__).name == "summary.json"


def test_metrics_say_what_happened(finished_run: Path, small_model: Path) -> None:
    ledger = ledgers.read(finished_run / "ledger.jsonl")
    metrics = rows(finished_run / "metrics.jsonl")
    for row, fitness in zip(metrics, ledger.fitness, strict=True):
        assert row["fitness_mean"] == pytest.approx(fitness.mean(), abs=1e-6)
        assert row["fitness_max"] == pytest.approx(fitness.max(), abs=1e-6)
        assert row["fitness_std"] == pytest.approx(fitness.std(), abs=1e-6)
        assert row["members_dropped"] == 0
    # Otherwise the runs here would say nothing about updates.
    assert min(fitness.std() for fitness in ledger.fitness) > 0
    base = jes.load(small_model).params
    final = jes.load(finished_run / "model").params
    moved = float(displacement(final, base))
    assert metrics[-1]["displacement_norm"] == pytest.approx(moved, rel=1e-6)
    d = sum(leaf.size for leaf in jax.tree.leaves(base))
    law = 0.1 * (6 * d / 4) ** 0.5
    assert metrics[-1]["displacement_norm_drift"] == pytest.approx(law)
    # Fitness is all but noise here, and 12,000 weights make the norm sharp.
    assert moved == pytest.approx(law, rel=0.05)


def test_the_model_is_the_one_in_the_ledger(finished_run: Path) -> None:
    ledger = ledgers.read(finished_run / "ledger.jsonl")
    pretrained = jes.load(finished_run / "model")
    assert fingerprint(pretrained.params) == ledger.fingerprints[6]
    assert pretrained.tokenizer.decode(pretrained.tokenizer.encode("12+3=")) == "12+3="


def test_transformers_reads_the_model(finished_run: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokens = np.array([[5, 9, 13, 40, 41]])
    pretrained = jes.load(finished_run / "model")
    ours, *_ = pretrained.model.apply(
        {"params": pretrained.params}, jnp.asarray(tokens)
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        finished_run / "model", dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)


def events(folder: Path) -> list[Event]:
    """The events of a TensorBoard folder: records of a length, a sum, data, a sum."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def test_tensorboard_shows_the_metrics(finished_run: Path) -> None:
    shown = {
        (value.tag, event.step): value.simple_value
        for event in events(finished_run / "tensorboard")
        for value in event.summary.value
    }
    for row in rows(finished_run / "metrics.jsonl"):
        for key in CONTRACT:
            at = (f"metrics/{key}", row["generation"])
            assert shown[at] == pytest.approx(row[key], rel=1e-6)
    for row in rows(finished_run / "evaluations.jsonl"):
        at = ("evaluations/tiny/reverse/reward", row["generation"])
        assert shown[at] == pytest.approx(row["reward"], rel=1e-6)


def toy(reward: Callable[[str], float], choices: bool = False) -> Task:
    """A task with any function of the answer as reward, in shapes of small runs."""
    letters = ("a", "b", "c")
    prompts = [{"prompt": f"say {n}:"} for n in range(64)]
    return Task(
        name="toy",
        train=prompts[:48],
        test=prompts[48:],
        prompt=lambda example: example["prompt"],
        reward=lambda _, text: Reward(reward(text), False, False, False),
        max_new_tokens=6,
        choices=(lambda _: letters) if choices else None,
        answer=(lambda _: 1) if choices else None,
    )


@pytest.fixture
def run_toy(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs a toy task with some settings changed; returns the run folder."""

    def go(reward: Callable[[str], float], **settings: object) -> Path:
        task = toy(reward, settings.get("mode") == "likelihood")
        monkeypatch.setitem(TASKS, "toy", lambda root: task)
        config = get_config(str(small_model))
        config.update_from_flattened_dict(
            {
                "task": "toy",
                "generations": 3,
                "data.train_examples": 0,
                "data.test_examples": 0,
            }
        )
        config.update_from_flattened_dict(settings)
        workdir = tmp_path / "run"
        train.run(config, workdir)
        return workdir

    return go


def vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / 6


def test_a_tie_changes_no_weight(run_toy: Callable, small_model: Path) -> None:
    workdir = run_toy(lambda text: 0.3)
    after = fingerprint(jes.load(workdir / "model").params)
    assert after == fingerprint(jes.load(small_model).params)
    assert rows(workdir / "metrics.jsonl")[-1]["displacement_norm"] == 0


def test_members_without_a_finite_reward_are_dropped(run_toy: Callable) -> None:
    answers = 0

    def sometimes(text: str) -> float:
        nonlocal answers
        answers += 1
        return float("nan") if answers % 90 == 0 else vowels(text)

    workdir = run_toy(sometimes)
    dropped = [row["members_dropped"] for row in rows(workdir / "metrics.jsonl")]
    assert 0 < sum(dropped) < 12
    ledger = ledgers.read(workdir / "ledger.jsonl")
    assert [int(np.isnan(f).sum()) for f in ledger.fitness] == dropped
    assert rows(workdir / "metrics.jsonl")[-1]["displacement_norm"] > 0


def test_a_generation_of_nothing_but_nan_is_named_and_costs_nothing(
    run_toy: Callable, tmp_path: Path
) -> None:
    asked = 0
    broken = True

    def reward(text: str) -> float:
        nonlocal asked
        asked += 1
        # 16 to evaluate, then 4 members of 48 answers, few of them the same.
        return float("nan") if broken and asked > 16 + 4 * 48 else vowels(text)

    with pytest.raises(InputError, match="generation 1: no member has a finite reward"):
        run_toy(reward)
    assert len(ledgers.read(tmp_path / "run" / "ledger.jsonl").fitness) == 1
    broken = False
    workdir = run_toy(reward)
    assert len(ledgers.read(workdir / "ledger.jsonl").fitness) == 3


def test_prompts_are_drawn_anew_without_replacement(
    finished_run: Path, small_model: Path
) -> None:
    config = get_config(str(small_model))
    made = experiment.make_experiment(freeze(config))
    drawn = [
        [question.example["prompt"] for question in experiment.pick(made, generation)]
        for generation in range(3)
    ]
    assert all(len(set(prompts)) == 48 for prompts in drawn)
    assert len({tuple(prompts) for prompts in drawn}) == 3
    again = [question.example["prompt"] for question in experiment.pick(made, 1)]
    assert again == drawn[1]


@pytest.mark.slow
def test_antithetic_pairs_train_and_replay(run_toy: Callable) -> None:
    workdir = run_toy(vowels, antithetic=True)
    from jes.export import rebuild

    rebuilt = rebuild(ledgers.read(workdir / "ledger.jsonl"))
    assert fingerprint(rebuilt.params) == outcome(workdir).fingerprint
    assert rows(workdir / "metrics.jsonl")[-1]["displacement_norm"] > 0


def test_halved_rates_train_and_replay(run_toy: Callable, small_model: Path) -> None:
    """Steps of half the length after two generations; the rebuilt weights know it."""
    workdir = run_toy(
        vowels, generations=4, alpha_half_life=2, sigma_half_life=3, eval_train=True
    )
    from jes.export import rebuild

    ledger = ledgers.read(workdir / "ledger.jsonl")
    assert fingerprint(rebuild(ledger).params) == outcome(workdir).fingerprint
    settings = [evolution(workdir).at(generation) for generation in range(4)]
    assert [each.alpha for each in settings] == [0.1, 0.1, 0.05, 0.05]
    assert [each.sigma for each in settings] == [0.1, 0.1, 0.1, 0.05]
    d = sum(leaf.size for leaf in jax.tree.leaves(jes.load(small_model).params))
    last = rows(workdir / "metrics.jsonl")[-1]
    law = (d / 4 * (2 * 0.1**2 + 2 * 0.05**2)) ** 0.5
    assert last["displacement_norm_drift"] == pytest.approx(law)
    assert last["displacement_norm"] == pytest.approx(law, rel=0.1)
    evaluated = {
        row["task"]: row["examples"] for row in rows(workdir / "evaluations.jsonl")
    }
    assert evaluated == {"toy": 16, "toy (train)": 48}


def test_bfloat16_answers_of_a_float32_master(
    run_toy: Callable, small_model: Path
) -> None:
    """Steps of 5e-5 are below half an ulp of most bfloat16 weights."""
    workdir = run_toy(vowels, dtype="bfloat16", sigma=0.05, alpha=1e-4)
    base = jes.load(small_model)
    like = (base.params, first_state(evolution(workdir), base.params))
    at, (params, _) = checkpoints.restore_latest(workdir / "checkpoints", like, 2)
    assert at == 2
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    config = json.loads((workdir / "model" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    moved = rows(workdir / "metrics.jsonl")[-1]["displacement_norm"]
    d = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    assert moved == pytest.approx(1e-4 * (3 * d / 4) ** 0.5, rel=0.1)


def evolution(workdir: Path) -> Evolution:
    header = ledgers.read(workdir / "ledger.jsonl").header
    return Evolution(**header["evolution"])


def test_likelihood_mode_rewards_the_likeliest_choice(run_toy: Callable) -> None:
    workdir = run_toy(vowels, mode="likelihood", sigma=0.3)
    fitness = np.stack(ledgers.read(workdir / "ledger.jsonl").fitness)
    # Each of the 48 prompts is right or wrong.
    np.testing.assert_allclose(fitness * 48, np.round(fitness * 48), atol=1e-5)
    assert fitness.std() > 0
    for row in rows(workdir / "metrics.jsonl"):
        assert row["accuracy"] == pytest.approx(row["fitness_mean"])
        assert row["tokens"] == 0


def test_sampled_answers_are_reproducible_and_evaluation_stays_greedy(
    tmp_path: Path, finished_run: Path, small_model: Path
) -> None:
    config = get_config(str(small_model))
    config.update({"temperature": 1.0, "generations": 2})
    train.run(config, tmp_path / "a")
    train.run(config, tmp_path / "b")
    first, second = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    greedy = outcome(finished_run)
    assert first.fitness[0] != greedy.fitness[0]
    assert first.evaluations[0] == greedy.evaluations[0]


def test_nothing_is_compiled_after_the_first_generation_and_evaluation(
    run_toy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    at: dict[str, int] = {}

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    write = RunFolder.write

    def noting(folder: RunFolder, name: str, row: dict) -> None:
        at[f"{name} {row['generation']}"] = len(compiled)
        write(folder, name, row)

    monkeypatch.setattr(RunFolder, "write", noting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # Shapes that no other test has compiled.
        settings = {"prompts": 40, "data.test_examples": 12, "eval_every": 2}
        settings["population"] = 6
        settings |= {"decay": "l2", "decay_coefficient": 1.0}
        run_toy(vowels, generations=5, **settings)
    finally:
        jax.monitoring.clear_event_listeners()
    assert at["evaluations 0"] > 0
    assert at["metrics 0"] > at["evaluations 0"]
    later = [f"metrics {g}" for g in range(1, 5)]
    later += [f"evaluations {g}" for g in (2, 4, 5)]
    assert {name: at[name] for name in later} == dict.fromkeys(later, at["metrics 0"])


def test_progress_is_readable_without_a_terminal(
    run_toy: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run_toy(vowels)
    out = capsys.readouterr().out
    assert re.search(r"generation 3/3 reward \d\.\d{3} best \d\.\d{3}", out)
    found = re.search(
        r"toy: 0\.0 % \(reward (\S+)\) -> 0\.0 % \(reward (\S+)\) on", out
    )
    assert found is not None
    assert 0 < float(found[1]) < float(found[2])
    assert "\x1b" not in out
