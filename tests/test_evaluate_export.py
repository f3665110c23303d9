"""`jes.export` rebuilds a run from its ledger; `jes.evaluate` scores what there is."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from small_run import outcome, rows, write_model

import jes
from jes import evaluate, export
from jes.errors import InputError
from jes.io import checkpoints
from jes.models.weights import fingerprint
from jes.update import first_state


@pytest.fixture
def ledger(tmp_path: Path, finished_run: Path) -> Path:
    """A copy of a run's ledger, alone in a folder."""
    path = tmp_path / "ledger.jsonl"
    shutil.copyfile(finished_run / "ledger.jsonl", path)
    return path


def command(
    main: object, monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> int | str | None:
    """Runs a `main` with these arguments; returns its exit status, None for 0."""
    monkeypatch.setattr("sys.argv", ["jes", *map(str, arguments)])
    try:
        main()
    except SystemExit as error:
        return error.code
    return None


def test_export_rebuilds_the_model_from_the_ledger_alone(
    ledger: Path,
    tmp_path: Path,
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rebuilt"
    assert command(export.main, monkeypatch, f"--run={ledger}", f"--out={out}") is None
    assert "fingerprint after 6 generations is right" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        expected = (finished_run / "model" / name).read_bytes()
        assert (out / name).read_bytes() == expected


def test_part_of_a_run_is_its_state_then(finished_run: Path, small_model: Path) -> None:
    """The checkpoint after four generations, bit for bit."""
    ledger = export.read_ledger(finished_run)
    base = jes.load(small_model)
    like = (
        base.params,
        first_state(export.evolution_of(ledger), base.params),
    )
    at, (params, _) = checkpoints.restore_latest(finished_run / "checkpoints", like, 5)
    assert at == 4
    rebuilt = export.rebuild(ledger, generations=4).params
    assert fingerprint(rebuilt) == fingerprint(params)
    assert fingerprint(export.rebuild(ledger, generations=0).params) == fingerprint(
        base.params
    )


def test_export_writes_the_dtype_asked_for(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "half"
    arguments = [f"--run={ledger}", f"--out={out}", "--dtype=bfloat16"]
    assert command(export.main, monkeypatch, *arguments) is None
    assert (out / "model.safetensors").stat().st_size < 30_000 * 2
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_changed_fitness_is_found_out(ledger: Path) -> None:
    lines = ledger.read_text().splitlines()
    row = json.loads(lines[3])
    best = max(range(4), key=row["fitness"].__getitem__)
    row["fitness"][best] += 1e-3
    lines[3] = json.dumps(row)
    ledger.write_text("\n".join(lines) + "\n")
    changed = export.read_ledger(ledger)
    with pytest.raises(InputError, match=r"not bit for bit .* was the ledger changed"):
        export.rebuild(changed)


def test_another_version_is_named_where_the_bits_differ(ledger: Path) -> None:
    text = ledger.read_text()
    versions = f'"jax": "{jax.__version__}"'
    assert versions in text
    lines = text.replace(versions, '"jax": "0.1"').splitlines()
    row = json.loads(lines[1])
    lines[1] = json.dumps({**row, "fitness": row["fitness"][::-1]})
    ledger.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"jax 0\.1 then, {jax.__version__} now"):
        export.rebuild(export.read_ledger(ledger))


def test_another_base_model_is_refused(ledger: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="is not the model that the run started from"):
        export.rebuild(export.read_ledger(ledger), model=str(other))


def test_the_base_may_have_moved(
    ledger: Path, tmp_path: Path, small_model: Path, finished_run: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(small_model, moved)
    rebuilt = export.rebuild(export.read_ledger(ledger), model=str(moved))
    assert fingerprint(rebuilt.params) == outcome(finished_run).fingerprint


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--run=/no/such"], 2, "error: there is no ledger at /no/such"),
        (["--generations=7"], 2, "there is no state after 7 generations"),
        (["--generations=-1"], 2, "must be a whole number of at least 0, not '-1'"),
        (["--dtype=int8"], 2, "invalid choice: 'int8'"),
        (["--model=/no/such"], 2, "error: there is no folder '/no/such'"),
        (["--out=RUN"], 2, "it holds more than a model"),
    ],
)
def test_export_says_what_is_wrong(
    arguments: list[str],
    status: int,
    message: str,
    ledger: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [text.replace("RUN", str(finished_run)) for text in arguments]
    common = [f"--run={ledger}", f"--out={tmp_path / 'out'}"]
    assert command(export.main, monkeypatch, *common, *arguments) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_header_without_what_a_replay_needs_is_refused(ledger: Path) -> None:
    text = ledger.read_text()
    ledger.write_text(text.replace('"antithetic"', '"antithetics"'))
    with pytest.raises(InputError, match="unexpected keyword argument 'antithetics'"):
        export.rebuild(export.read_ledger(ledger))
    ledger.write_text(text.replace('"seed"', '"root"'))
    with pytest.raises(InputError, match="the header lacks seed"):
        export.read_ledger(ledger)


def test_evaluate_repeats_what_the_run_reported(
    finished_run: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base, the model folder, and the run folder itself."""
    reported = rows(finished_run / "evaluations.jsonl")
    for model, row in (
        (small_model, reported[0]),
        (finished_run / "model", reported[-1]),
        (finished_run, reported[-1]),
    ):
        out = tmp_path / "new" / "scores.json"
        arguments = [f"--model={model}", "--tasks=tiny/reverse", "--examples=16"]
        assert command(evaluate.main, monkeypatch, *arguments, f"--out={out}") is None
        score = json.loads(out.read_text())["tiny/reverse"]
        for name, value in score.items():
            assert value == pytest.approx(row[name]), name
        shown = capsys.readouterr().out
        assert "accuracy %" in shown
    assert "after 6 generations" in shown


def test_an_unfinished_run_is_evaluated_and_left_alone(
    finished_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    for name in ("summary.json", "curves.png"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()  # being written
    path = workdir / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:-5])
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    pretrained, dtype = evaluate.load_model(str(workdir))
    assert dtype == "float32"
    expected = export.rebuild(export.read_ledger(finished_run), generations=5)
    assert fingerprint(pretrained.params) == fingerprint(expected.params)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_a_run_is_evaluated_in_its_dtype(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "ledger.jsonl"
    path.write_text(
        path.read_text().replace('"dtype": "float32"', '"dtype": "float16"')
    )
    _, dtype = evaluate.load_model(str(tmp_path / "run"))
    assert dtype == "float16"


def test_likelihood_takes_the_best_choice(small_model: Path) -> None:
    pretrained = jes.load(small_model)
    scores = evaluate.evaluate(
        pretrained,
        ["tiny/max", "tiny/min"],
        data={"test_examples": 32},
        mode="likelihood",
    )
    for score in scores.values():
        # One of three labels: a random model is right on a third, and never formless.
        assert 0 < score["accuracy"] < 0.8
        assert score["formatted"] == 1
        assert score["tokens"] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--tasks=tiny/divide"], 2, "error: there is no task 'tiny/divide'"),
        (["--tasks=arc_c", "--root=/no"], 2, "error: data.root: there is no /no/ai2"),
        (["--model=/no/such"], 2, "error: there is no folder '/no/such'"),
        (["--mode=likelihood", "--tasks=tiny/add"], 2, "tiny/add has no choices"),
        (["--batch-size=0"], 2, "must be a whole number of at least 1, not '0'"),
        (["--examples=few"], 2, "must be a whole number of at least 0, not 'few'"),
        (["--dtype=float33"], 2, "invalid choice: 'float33'"),
        (["--out=MODEL/config.json/x.json"], 1, "config.json'"),
    ],
)
def test_evaluate_says_what_is_wrong(
    arguments: list[str],
    status: int,
    message: str,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [text.replace("MODEL", str(small_model)) for text in arguments]
    common = [f"--model={small_model}", "--tasks=tiny/add", "--examples=2"]
    assert command(evaluate.main, monkeypatch, *common, *arguments) == status
    assert message in capsys.readouterr().err
