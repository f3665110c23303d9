"""The forgetting study: methods, runs, controls, tables, and the paper's configs."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import get_config, rows, run_jobs

import jes
from jes import evaluate, export, train
from jes.config import freeze
from jes.core import ledger as ledgers
from jes.core.drift import predicted_drift
from jes.errors import InputError
from jes.models.weights import fingerprint
from jes.studies import forgetting
from jes.studies.forgetting import (
    among,
    crossing,
    displacements,
    reach,
    slices,
    systematic,
)
from jes.studies.grid import Grid, mean_error, method_config
from jes.studies.paper_configs import (
    FORGETTING_VARIANTS,
    PARAMETERS,
    TARGETS,
    forgetting_config,
)

CONFIGS = Path(__file__).parent.parent / "configs"
RESULTS = CONFIGS.parent / "notebooks" / "results"


def small_config(model: Path) -> ConfigDict:
    """`tiny/reverse` is the target, two others are watched."""
    config = get_config(str(model))
    config.eval_tasks = ("tiny/sort", "tiny/max")
    config.buckets = (16, 24)
    config.devices = 1
    config.generations = 4
    config.eval_every = 2
    config.kl_prompts = 3
    config.kl_max_new_tokens = 4
    config.grpo.learning_rate = 1e-3
    config.grpo.minibatch = 96
    return config


METHODS = ["es", "l2:5", "l1:0.05", "answers:8", "n:8", "shuffled", "grpo:1e-3"]


@pytest.fixture(scope="module")
def studied(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ConfigDict]:
    workdir = tmp_path_factory.mktemp("study")
    config = small_config(small_model)
    forgetting.collect(Grid(config, METHODS, [0, 1], workdir, workdir))
    forgetting.draw(workdir)
    return workdir, config


def folder_of(workdir: Path, method: str, seed: int) -> Path:
    return workdir / method.replace(":", "-") / f"seed-{seed}"


def summary(workdir: Path, method: str, seed: int = 0) -> dict[str, Any]:
    return json.loads((folder_of(workdir, method, seed) / "summary.json").read_text())


def test_methods_are_settings(small_model: Path) -> None:
    base = small_config(small_model)
    base.decay, base.decay_coefficient = "l2", 3.0
    plain = method_config(base, "es", 7)
    assert (plain.seed, plain.decay, plain.decay_coefficient) == (7, "none", 0.0)
    decayed = method_config(base, "l1:0.05", 0)
    assert (decayed.decay, decayed.decay_coefficient) == ("l1", 0.05)
    larger = method_config(base, "n:8", 0)
    assert (larger.population, larger.generations) == (8, 4)
    equal = method_config(base, "answers:8", 0)
    assert (equal.population, equal.generations, equal.eval_every) == (8, 2, 1)
    assert method_config(base, "shuffled", 0).shuffle_fitness
    baseline = method_config(base, "grpo:0.01", 0)
    assert (baseline.method, baseline.grpo.learning_rate) == ("grpo", 0.01)
    assert base.decay == "l2"  # the study's own settings stay as they are


@pytest.mark.parametrize(
    "name", ["", "l2", "l2:x", "n:1.5", "es:1", "shuffled:1", "l3"]
)
def test_other_methods_are_refused(small_model: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no method of a study"):
        method_config(small_config(small_model), name, 0)


def test_decay_pulls_and_the_ledger_knows_it(
    studied: tuple[Path, ConfigDict], tmp_path: Path
) -> None:
    """Replayed from the ledger, and evaluated from the run folder: the same weights."""
    workdir, _ = studied
    for method in ("l2:5", "l1:0.05"):
        folder = folder_of(workdir, method, 0)
        ledger = export.read_ledger(folder)
        kind, coefficient = method.split(":")
        assert ledger.header["evolution"]["decay"] == kind
        assert ledger.header["evolution"]["decay_coefficient"] == float(coefficient)
        sealed = ledger.fingerprints[4]
        assert fingerprint(export.rebuild(ledger).params) == sealed
        (folder / "checkpoints").rename(tmp_path / f"{kind} checkpoints")
        assert fingerprint(evaluate.load_model(str(folder))[0].params) == sealed
        plain = summary(workdir, "es")["displacement_norm"]
        assert summary(workdir, method)["displacement_norm"] < 0.95 * plain


@pytest.mark.slow
@pytest.mark.parametrize("place", ["host", "bfloat16"])
def test_the_anchor_in_other_places(
    studied: tuple[Path, ConfigDict], tmp_path: Path, place: str
) -> None:
    workdir, base = studied
    config = method_config(base, "l2:5", 0)
    config.anchor = place
    train.run(config, tmp_path / "run")
    ledger = export.read_ledger(tmp_path / "run")
    same = (
        ledger.fingerprints[4]
        == (export.read_ledger(folder_of(workdir, "l2:5", 0)).fingerprints[4])
    )
    assert same == (place == "host")
    assert fingerprint(export.rebuild(ledger).params) == ledger.fingerprints[4]


def test_norms_and_laws_are_logged(studied: tuple[Path, ConfigDict]) -> None:
    workdir, _ = studied
    for method in ("es", "l2:5", "l1:0.05", "n:8"):
        folder = folder_of(workdir, method, 0)
        ledger = export.read_ledger(folder)
        law = predicted_drift(
            export.evolution_of(ledger), ledger.header["parameters"], 4
        )
        last = rows(folder / "metrics.jsonl")[-1]
        assert last["displacement_norm_drift"] == pytest.approx(law)
        # Fitness is all but noise here; 12,000 weights make the norm sharp.
        assert last["displacement_norm"] == pytest.approx(law, rel=0.06)
        distances = rows(folder / "distances.jsonl")
        assert [row["generation"] for row in distances] == [0, 2, 4]
        assert distances[0]["norm"] == 0
        assert distances[-1]["norm"] == pytest.approx(last["displacement_norm"])
        assert distances[0]["kl/tiny/sort/full"] == 0
        assert distances[-1]["kl/tiny/sort/full"] > 0
        parts = [distances[-1][f"norm/{kind}"] for kind in ("mlp", "attention")]
        assert 0 < np.linalg.norm(parts) <= distances[-1]["norm"]


def test_shuffled_fitness_is_that_of_the_members_in_another_order(
    studied: tuple[Path, ConfigDict],
) -> None:
    workdir, _ = studied
    first, shuffled = (
        ledgers.read(folder_of(workdir, m, 0) / "ledger.jsonl").fitness[0]
        for m in ("es", "shuffled")
    )
    assert sorted(first) == sorted(shuffled)
    several = [
        ledgers.read(folder_of(workdir, "shuffled", s) / "ledger.jsonl").fitness[0]
        for s in (0, 1)
    ]
    plain = [
        ledgers.read(folder_of(workdir, "es", s) / "ledger.jsonl").fitness[0]
        for s in (0, 1)
    ]
    pairs = zip(several, plain, strict=True)
    assert any((a != b).any() for a, b in pairs)


def test_plain_es_is_shrunk_to_the_norm_of_others(
    studied: tuple[Path, ConfigDict], small_model: Path
) -> None:
    workdir, config = studied
    shrunk = summary(workdir, "shrunk to l2:5")
    want = summary(workdir, "l2:5")["displacement_norm"]
    assert shrunk["displacement_norm"] == pytest.approx(want)
    base = jes.load(small_model).params
    tuned = jes.load(folder_of(workdir, "es", 0) / "model").params
    share = want / summary(workdir, "es")["displacement_norm"]
    params = jax.tree.map(lambda a, b: a + share * (b - a), base, tuned)
    assert jes.distance(params, base).norm == pytest.approx(want, rel=1e-5)
    model = jes.load(small_model)
    scores = evaluate.evaluate(
        model.__class__(**(vars(model) | {"params": params})),
        ["tiny/max"],
        data={"test_examples": config.data.test_examples},
    )
    assert shrunk["evaluations"]["tiny/max"]["after"] == scores["tiny/max"]["accuracy"]


def test_tables_say_what_the_runs_say(studied: tuple[Path, ConfigDict]) -> None:
    workdir, _ = studied
    with (workdir / "results.csv").open() as file:
        table = {(r["method"], int(r["seed"])): r for r in csv.DictReader(file)}
    for method in METHODS:
        for seed in (0, 1):
            row, one = table[method, seed], summary(workdir, method, seed)
            after = {n: 100 * e["after"] for n, e in one["evaluations"].items()}
            assert float(row["target"]) == pytest.approx(after["tiny/reverse"])
            mean = (after["tiny/sort"] + after["tiny/max"]) / 2
            assert float(row["prior"]) == pytest.approx(mean, rel=1e-5)
            assert float(row["norm"]) == pytest.approx(one["displacement_norm"], 1e-5)
            assert float(row["answers"]) == pytest.approx(one["answers"] / 1000)
    assert {float(table[m, 0]["answers"]) for m in ("es", "answers:8")} == {0.768}
    text = (workdir / "results.md").read_text()
    target = mean_error([float(table["es", seed]["target"]) for seed in (0, 1)], ".1f")
    assert f"| es | 2 | {target} |" in text
    curves = json.loads((workdir / "curves.json").read_text())
    assert set(curves) == set(METHODS)
    assert curves["es"]["0"]["generation"] == [0, 2, 4]
    assert (workdir / "forgetting.png").is_file()


def test_grpo_goes_on_from_its_checkpoint(
    studied: tuple[Path, ConfigDict], tmp_path: Path
) -> None:
    """With the same weights, to the bit, as a run that was not stopped."""
    workdir, base = studied
    config = method_config(base, "grpo:1e-3", 0)
    config.generations = 2
    train.run(config, tmp_path / "run")
    before = rows(tmp_path / "run" / "metrics.jsonl")
    config.generations = 4
    train.run(config, tmp_path / "run")
    # Not done again: the seconds are those of then.
    assert rows(tmp_path / "run" / "metrics.jsonl")[:2] == before
    whole = folder_of(workdir, "grpo:1e-3", 0)
    for name in ("model/model.safetensors",):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert [r["generation"] for r in rows(tmp_path / "run" / "metrics.jsonl")] == [
        *range(4)
    ]
    assert not (whole / "ledger.jsonl").exists()
    assert summary(workdir, "grpo:1e-3")["displacement_norm"] > 0
    config.decay = "l2"
    with pytest.raises(InputError, match="decay='l2' is not for method 'grpo'"):
        train.run(config, tmp_path / "other")


def test_chains_start_where_the_last_stage_ended(
    small_model: Path, tmp_path: Path
) -> None:
    config = small_config(small_model)
    config.eval_tasks = ("tiny/max",)
    config.generations = 2
    tasks, methods = ["tiny/reverse", "tiny/sort"], ["es", "l2:5"]
    forgetting.collect_chain(Grid(config, methods, [0], tmp_path, tmp_path), tasks)
    forgetting.draw_chain(tmp_path)
    first, second = (folder_of(tmp_path, "l2:5", 0) / f"stage-{i}" for i in (0, 1))
    ledger = export.read_ledger(second)
    assert ledger.header["base"] == fingerprint(jes.load(first / "model").params)
    assert rows(second / "distances.jsonl")[0]["norm"] == 0  # anchored anew
    with (tmp_path / "chain.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["method"], r["stage"]) for r in table] == [
        (m, str(i)) for m in methods for i in (0, 1, 2)
    ]
    after = json.loads((second / "summary.json").read_text())["evaluations"]
    for task in (*tasks, "tiny/max"):
        assert float(table[-1][task]) == pytest.approx(100 * after[task]["after"], 1e-5)
    assert "| l2:5 | tiny/sort |" in (tmp_path / "chain.md").read_text()


def load_config(name: str, variant: str | None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("config", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


@pytest.mark.parametrize("target", TARGETS)
def test_configs_of_the_paper(target: str) -> None:
    config = load_config(f"forgetting_{target}", None)
    assert (config.task, config.population, config.generations) == (target, 30, 500)
    assert (config.sigma, config.alpha) == (1e-3, 5e-4)
    assert (config.decay, config.decay_coefficient) == ("l2", 10.0)
    assert len({config.task, *config.eval_tasks}) == 7
    config = load_config(f"forgetting_{target}", "l1")
    assert (config.decay, config.decay_coefficient) == ("l1", 0.01)
    assert load_config(f"forgetting_{target}", "es").decay == "none"
    assert load_config(f"forgetting_{target}", "grpo").method == "grpo"


@pytest.mark.parametrize(("kind", "norm"), [("l2", 67.68), ("l1", 92.13)])
def test_matched_by_norm(kind: str, norm: float) -> None:
    config = forgetting_config("countdown", f"{kind}_norm")
    law = jes.drift_norm(
        alpha=5e-4,
        population=30,
        parameters=PARAMETERS,
        generations=500,
        kind=config.decay,
        coefficient=config.decay_coefficient,
    )
    assert law == pytest.approx(norm, rel=1e-6)


def test_unknown_variants_are_named() -> None:
    for name in ("forgetting_countdown", "forgetting_tiny"):
        with pytest.raises(ValueError, match="there is no variant 'huge'"):
            load_config(name, "huge")
    for variant in FORGETTING_VARIANTS:
        freeze(forgetting_config("gsm8k", variant))


@pytest.mark.slow
def test_command_lines(small_model: Path, tmp_path: Path) -> None:
    small = str(Path(__file__).with_name("small_run.py"))
    config = [f"--config={small}:{small_model}", "--config.generations=2"]
    bare = ["jes.studies.forgetting", *config]
    start = [*bare, "--config.eval_tasks=('tiny/sort',)"]
    work = f"--workdir={tmp_path / 'study'}"
    stored = shutil.copytree(RESULTS / "qes_float4", tmp_path / "stored")
    jobs = [
        [*start, work, "--methods=es,l2:1", f"--out={tmp_path / 'out'}"],
        [*bare, "--redraw", f"--out={stored}"],
        [*start, "--methods=es,l2:x", work],
        [*start, "--methods=es,es", work],
        [*start, "--seeds=1,b", work],
        [*start, "--method=es"],
        [*start, work, "more"],
        [*bare, work],
    ]
    done = run_jobs([{"argv": argv} for argv in jobs])
    assert done[0]["status"] == 0, done[0]["stderr"]
    assert "| l2:1 | 1 |" in done[0]["stdout"]
    assert (tmp_path / "out" / "forgetting.png").is_file()
    assert done[1]["status"] == 0, done[1]["stderr"]
    assert "| es | 3 | 53.7 ± 3.8 |" in done[1]["stdout"]
    messages = [
        "'l2:x' is no method of a study: es, l1, l2",
        "--methods=es,es: an entry is empty or repeated",
        "--seeds: 'b' is not a whole number",
        "Unknown command line flag 'method'",
        "unexpected 'more'",
        "the study needs prior tasks: eval_tasks is empty",
    ]
    for job, message in zip(done[2:], messages, strict=True):
        assert job["status"] != 0
        assert message in job["stderr"]
        assert "Traceback" not in job["stderr"]


def test_systematic_motion_is_told_from_noise() -> None:
    """Runs of common motion 3 along one axis, in a walk of length 30."""
    rng = np.random.default_rng(0)
    size, common = 100_000, 3.0
    goal = np.zeros(size)
    goal[0] = 1
    noise = 30 / size**0.5 * rng.normal(size=(8, size))
    found = systematic(list(noise + common * goal), 5 * goal)
    assert found["along"] == pytest.approx(common, abs=4 * found["along_error"])
    assert found["along_error"] == pytest.approx(30 / (size * 8) ** 0.5, rel=0.02)
    assert found["square"] == pytest.approx(common**2, abs=4 * found["error"])
    assert found["error"] == pytest.approx(900 / (size * 28) ** 0.5, rel=0.03)
    assert systematic(list(noise))["along"] is None


def test_reach_of_systematic_motion() -> None:
    assert reach(0.02, 120) == pytest.approx(2.4)
    assert reach(0.02, 10**6, 10.0) == pytest.approx(0.8 / 10)
    assert reach(0.02, 1, 10.0) == pytest.approx(0.8 * 0.02)
    assert reach(0.02, 120, 1e-9) == pytest.approx(2.4, rel=1e-5)


def test_displacements_are_those_of_the_models(
    studied: tuple[Path, ConfigDict], small_model: Path
) -> None:
    workdir, _ = studied
    folders = [folder_of(workdir, "l2:5", seed) / "model" for seed in (0, 1)]
    moved = displacements(jes.load(small_model).params, folders)
    for seed, vector in enumerate(moved):
        norm = summary(workdir, "l2:5", seed)["displacement_norm"]
        assert np.linalg.norm(vector) == pytest.approx(norm, rel=1e-5)
    text = (workdir / "results.md").read_text()
    assert f"| {reach(0.1, 4, 5.0):.3f} |" in text


def test_slices_are_taken_between_evaluations() -> None:
    curve = {
        "target": [10.0, 30.0, 20.0, 50.0],
        "prior": [100.0, 90.0, 80.0, 70.0],
        "answers": [0.0, 1.0, 2.0, 3.0],
        "norm": [0.0, 2.0, 4.0, 6.0],
    }
    first = {"target": 15.0, "prior": 97.5, "answers": 0.25, "norm": 0.5}
    assert crossing(curve, "target", 15.0) == first
    assert crossing(curve, "answers", 3.0)["target"] == 50.0
    assert crossing(curve, "target", 60.0) is None
    flat = {key: [5.0, 5.0] for key in curve}
    assert crossing(flat, "target", 5.0)["prior"] == 5.0
    faster = {**curve, "target": [10.0, 40.0, 50.0, 50.0]}
    text = slices({"es": {"0": curve, "1": faster}})
    # Of 10 -> 50: the goal is 40, reached at 2.67 and at 1 thousand answers.
    assert "After 3 thousand answers, and where the target reaches 40.0 %:" in text
    assert "| es | 50.0 ± 0.0 | 70.0 ± 0.0 | 81.7 ± 8.3 | 1.8 ± 0.8 |" in text
    assert among([None, first], "prior") == "97.5 (1 of 2)"
    assert among([None, None], "prior") == "not reached"


def test_a_run_of_the_baseline_is_evaluated_by_its_model(
    studied: tuple[Path, ConfigDict], tmp_path: Path
) -> None:
    workdir, _ = studied
    folder = folder_of(workdir, "grpo:1e-3", 0)
    pretrained, dtype = evaluate.load_model(str(folder))
    assert dtype == "float32"
    result = jes.load(folder / "model").params
    assert fingerprint(pretrained.params) == fingerprint(result)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="without a ledger that is not finished"):
        evaluate.load_model(str(tmp_path))


def test_studies_do_not_take_the_runs_of_others(
    studied: tuple[Path, ConfigDict],
) -> None:
    workdir, config = studied
    config = config.copy_and_resolve_references()
    config.sigma = 0.2
    with pytest.raises(InputError, match="belongs to a run with other settings"):
        Grid(config, ["es"], [0], workdir, workdir).run()
