"""The probe of a random model: what it leaves, continues from and refuses."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from ml_collections import ConfigDict
from small_run import rows, run_jobs, write_model

import jes
from jes.core.noise import Noise
from jes.io.interrupts import StopRequest
from jes.landscape.probes import best_of
from jes.questions import MODES, Evaluation, prepare
from jes.rollout import answer_each, ask
from jes.sampling.generate import Sampling
from jes.studies import probe
from jes.studies.probe import check_probe, default, from_hex, to_hex
from jes.tasks import load_task


def get_config(model: str) -> ConfigDict:
    """Eight candidates at two σ on a handful of prompts."""
    config = default()
    config.models = (model,)
    config.task = "tiny/max"
    config.buckets = (32,)
    config.eval_batch = 8
    config.chunk = 3
    config.probe.sigmas = (0.1, 0.5)
    config.probe.candidates = 8
    config.probe.batches = 2
    config.probe.pool = 10
    config.probe.fresh = 10
    return config


def command(model: Path, workdir: Path, *changes: str) -> list[str]:
    return [
        "jes.studies.probe",
        f"--config={__file__}:{model}",
        f"--workdir={workdir}",
        *(f"--config.{change}" for change in changes),
    ]


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Folder of a model and of a probe of it."""
    folder = tmp_path_factory.mktemp("probed")
    model = write_model(folder / "model")
    (folder / "whole").mkdir()
    probe.run(get_config(str(model)), folder / "whole", StopRequest())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a probe, one that was stopped and went on, and what others said."""
    folder = tmp_path_factory.mktemp("probe")
    model = write_model(folder / "model")
    stopped = {"at": "jes.studies.probe:append_row", "call": 20, "do": "SIGKILL"}
    asked = {"at": "jes.studies.probe:append_row", "call": 9, "do": "SIGINT"}
    jobs = [
        {"argv": command(model, folder / "whole")},
        {"argv": command(model, folder / "parts"), "fault": stopped},
    ]
    more = [
        {"argv": command(model, folder / "parts"), "fault": asked},
        {"argv": command(model, folder / "whole", "probe.pool=5")},
        {"argv": command(model, folder / "small", "probe.candidates=4")},
        {"argv": command(model, folder / "big", "probe.fresh=100000")},
        {"argv": command(model, folder / "none", "probe.sigmas=(0.1, -1.0)")},
        {"argv": command(folder / "absent", folder / "none")},
    ]
    last = [
        {"argv": command(model, folder / "parts")},
        {"argv": command(model, folder / "parts", "probe.batches=1")},
    ]
    first, killed = run_jobs(jobs)
    rest = run_jobs(more)
    end = run_jobs(last)
    return folder, first, killed, rest, end


def test_what_a_probe_leaves(probed):
    folder = probed
    found = rows(folder / "whole" / "candidates.jsonl")
    assert len(found) == 1 + 2 * 2 * 8 + 8  # itself, batches, sham
    assert (folder / "whole" / "probe.png").is_file()
    results = json.loads((folder / "whole" / "probe.json").read_text())["results"]
    assert [one["sigma"] for one in results] == [0.1, 0.5, "sham"]
    assert "| best of 5 |" in (folder / "whole" / "probe.md").read_text()
    # The table is of the rows.
    base = from_hex(found[0]["right"], 20)
    gains = [
        from_hex(row["right"], 20)[:10].mean() - base[:10].mean()
        for row in found
        if (row["sigma"], row["batch"]) == (0.5, 1)
    ]
    other = [
        from_hex(row["right"], 20)[:10].mean() - base[:10].mean()
        for row in found
        if (row["sigma"], row["batch"]) == (0.5, 0)
    ]
    mean = (
        sum(best_of(np.array(one), np.array(one), 5)[0] for one in (gains, other)) / 2
    )
    assert results[1]["best"][0] == pytest.approx(mean)
    assert results[1]["mean"] == pytest.approx(np.mean(gains + other))


def test_a_candidate_is_the_perturbed_model(probed):
    folder = probed
    pretrained = jes.load(folder / "model")
    task = load_task("tiny/max")
    evaluation = Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        sampling=Sampling(eos_ids=pretrained.eos_ids),
        buckets=(32,),
    )
    chosen = np.random.default_rng(0).choice(len(task.train), 20, replace=False)
    key = jax.random.fold_in(jax.random.key(0), 2 + 1)  # batch 1
    member = jes.perturb(pretrained.params, jax.random.fold_in(key, 3), 0.5)
    prompts = [pretrained.tokenizer.encode(task.prompt(task.train[i])) for i in chosen]
    answers = jes.generate(
        pretrained.model,
        member,
        prompts,
        task.max_new_tokens,
        eos_ids=pretrained.eos_ids,
    )
    right = [
        task.reward(task.train[i], pretrained.tokenizer.decode(answer)).correct
        for i, answer in zip(chosen, answers, strict=True)
    ]
    (row,) = (
        row
        for row in rows(folder / "whole" / "candidates.jsonl")
        if (row["sigma"], row["batch"], row["candidate"]) == (0.5, 1, 3)
    )
    assert from_hex(row["right"], 20).tolist() == right
    assert evaluation.task.name == "tiny/max"


@pytest.mark.slow
def test_stopped_at_any_moment_it_goes_on(runs):
    folder, first, killed, (interrupted, *_), (ended, _) = runs
    assert first["status"] == 0, first["stderr"]
    assert "best of 5" in first["stdout"]
    assert killed["status"] == -9
    assert interrupted["status"] == 130
    assert "goes on" in interrupted["stdout"]
    assert ended["status"] == 0, ended["stderr"]
    whole, parts = (
        {
            (row["sigma"], row["batch"], row["candidate"]): row
            for row in rows(folder / name / "candidates.jsonl")
        }
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert len(rows(folder / "parts" / "candidates.jsonl")) == len(whole)


@pytest.mark.slow
def test_what_the_user_got_wrong_is_said(runs):
    *_, (_, other, few, many, negative, absent), (_, fewer) = runs
    for result, said in (
        (other, "pool: 10 there, 5 here"),
        (few, "probe.candidates must be at least 5, not 4"),
        (many, "tiny/max has 4096 training examples"),
        (negative, "probe.sigmas: sigma must be positive"),
        (absent, "absent"),
    ):
        assert result["status"] == 2, result
        assert said in result["stderr"]
        assert "Traceback" not in result["stderr"]
    assert fewer["status"] == 0  # of what has been asked, a part
    assert "8 candidates x 1 batches" in fewer["stdout"]


def test_bits_come_back():
    bits = np.random.default_rng(0).random(33) < 0.5
    np.testing.assert_array_equal(from_hex(to_hex(bits), 33), bits)


@pytest.mark.parametrize("mode", slow_except({"likelihood"}, MODES))
def test_single_answers_are_those_that_a_score_is_of(mode):
    pretrained = jes.load("tiny")
    task = load_task("tiny/rules")
    evaluation = Evaluation(
        model=pretrained.model,
        tokenizer=pretrained.tokenizer,
        task=task,
        sampling=Sampling(eos_ids=pretrained.eos_ids),
        mode=mode,
    )
    questions = prepare(evaluation, task.train[:10])
    key, noise = jax.random.key(5), Noise(sigma=0.02)
    scores = ask(
        evaluation,
        pretrained.params,
        key,
        questions,
        noise=noise,
        population=3,
        chunk=3,
    )
    answered = answer_each(
        evaluation,
        pretrained.params,
        key,
        questions,
        np.arange(3),
        noise=noise,
        batch_size=4,
    )
    np.testing.assert_allclose(answered.correct.mean(-1), scores.accuracy)
    assert answered.tokens.shape[:2] == (3, 10)
    itself = answer_each(
        evaluation, pretrained.params, key, questions, np.arange(2), noise=None
    )
    assert (itself.tokens[0] == itself.tokens[1]).all()
    assert (itself.tokens[0] != answered.tokens[0]).any()
    assert jnp.isfinite(scores.reward).all()


@pytest.mark.parametrize("name", ["gsm8k", "arc_c", "winogrande"])
def test_the_configs_have_the_recipe_of_the_paper(name):
    module = load_config(f"probe_{name}")
    config = module.get_config("published")
    probe = config.probe
    assert (probe.pool, probe.candidates, probe.fresh) == (320, 240, 0)
    assert probe.sigmas == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert (config.task, config.max_new_tokens, config.temperature) == (name, 512, 0.0)
    assert [model.split("-")[1] for model in config.models] == [
        "0.5B",
        "1.5B",
        "3B",
        "7B",
    ]
    tiny = module.get_config("tiny")
    assert tiny.models == ("tiny",)
    check_probe(tiny.probe)
    pool = tiny.probe.pool + tiny.probe.fresh
    assert len(load_task(tiny.task).train) >= pool
    with pytest.raises(ValueError, match="no variant 'tny'"):
        module.get_config("tny")


def load_config(name: str):
    path = Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
