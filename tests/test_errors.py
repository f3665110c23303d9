"""What a user can get wrong: one line that names it, and an exit status."""

import ast
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import get_config, run_jobs, train_command

from jes import train
from jes.config import default, freeze
from jes.errors import InputError
from jes.models import safetensors_files
from jes.tasks.rows import read_rows

CONFIGS = Path(__file__).parent.parent / "configs"

SETTINGS = {
    "population=0": "population must be at least 1, not 0",
    "sigma=nan": "sigma must be positive and finite, not nan",
    "sigma=inf": "sigma must be positive and finite, not inf",
    "sigma=-1": "sigma must be positive and finite, not -1.0",
    "alpha=nan": "alpha must be finite, not nan",
    "generations=0": "generations must be at least 1, not 0",
    "eval_every=0": "eval_every must be at least 1, not 0",
    "checkpoint_every=0": "checkpoint_every must be at least 1, not 0",
    "eval_batch=0": "eval_batch must be at least 1, not 0",
    "prompts=-1": "prompts must be at least 0, not -1",
    "prompts=65": "prompts=65, but tiny/reverse has 64 to train on",
    "data.test_examples=-1": "data.test_examples must be at least 0, not -1",
    "memory_gb=nan": "memory_gb must be finite, not nan",
    "seed=-1": "seed must be at least 0, not -1",
    "seed=4294967296": "seed must be below 4294967296, not 4294967296",
    "dtype=float33": "dtype must be one of ('float32', 'bfloat16', 'float16')",
    "dtype=int8": "dtype must be one of ('float32', 'bfloat16', 'float16')",
    "decay=l3": "decay must be one of ('none', 'l2', 'l1'), not 'l3'",
    "decay_coefficient=3": "decay_coefficient does nothing without decay='l2' or",
    "anchor=disk": "anchor must be one of ('device', 'bfloat16', 'host', 'none')",
    "method=ppo": "method must be one of ('es', 'grpo', 'sft'), not 'ppo'",
    "kl_prompts=-1": "kl_prompts must be at least 0, not -1",
    "kl_max_new_tokens=0": "kl_max_new_tokens must be at least 1, not 0",
    "shaping=rank": "shaping must be one of ('zscore', 'centered_rank', ",
    "temperature=nan": "temperature must be finite, not nan",
    "temperature=-1": "temperature",
    "top_p=0": "top_p",
    "buckets=()": "buckets are prompt lengths in tokens, not ()",
    "buckets=(8,)": "tokens, more than the longest bucket (8): add a longer one",
    "mode=guess": "mode must be one of ('generate', 'likelihood'), not 'guess'",
    "mode=likelihood": "task tiny/reverse has no choices: use mode 'generate'",
    "task=tiny/divide": "there is no task 'tiny/divide'; there are arc_c, arc_c_cot",
    "eval_tasks=('tiny/divide',)": "there is no task 'tiny/divide'",
    "task=tiny/mim": "no task 'tiny/mim'; did you mean 'tiny/min'? There are arc_c",
    "model=/no/such/folder": "there is no folder '/no/such/folder'",
    "model=qwen": "there is no folder 'qwen'",
    "model=Qwen/Qwen2.5-0.5B-Instruct": "it could not be downloaded from the",
    "task=arc_c": "allenai/ai2_arc ARC-Challenge train could not be read from the",
    "antithetic=True population=3": "antithetic pairs need an even",
    "decay=l2 decay_coefficient=10": "learning_rate x coefficient must be below 1",
    "decay=l1 decay_coefficient=-1": "the coefficient cannot be negative: -1",
    "method=grpo grpo.minibatch=7": "minibatch must be a divisor of 192, not 7",
    "method=grpo grpo.minibatch=-1": "grpo.minibatch must be at least 0, not -1",
    "method=grpo population=1": "compares answers: population must be at least 2",
    "method=grpo mode=likelihood": "samples its answers: use mode 'generate'",
    "method=sft decay=l2 decay_coefficient=0.1": "decay='l2' is not for method 'sft'",
    "method=sft shuffle_fitness=True": "shuffle_fitness=True is not for method 'sft'",
    "method=sft objective=esma": "objective='esma' is not for method 'sft'",
    "method=sft temperature=1": "temperature=1.0 is not for method 'sft'",
    "method=sft top_k=3": "top_k=3 is not for method 'sft'",
    "method=sft top_p=0.5": "top_p=0.5 is not for method 'sft'",
    "method=sft rounding=replay": "rounding='replay' is not for method 'sft'",
    "method=sft sft.learning_rate=0": "sft.learning_rate must be positive, not 0.0",
    "method=sft sft.learning_rate=nan": "sft.learning_rate must be positive, not nan",
    "method=sft sft.loss=prompt": "sft.loss must be one of ('answer', 'all'), not",
    "method=sft": "SFT is for tasks that ask 'do you know'",
    "method=sft task=tiny/knows mode=likelihood": "use mode 'generate'",
    "rounding=replay alpha_half_life=10": "needs a constant alpha and sigma",
}
"""Settings, and what the message says of them."""


COMMANDS = {
    "{run} --config.sgma=1": "there is no setting 'sgma'. Did you mean \"sigma\"?",
    "{run} --config.data.rot=x": "there is no setting 'rot'",
    "{run} --config.population=many": "population=many: invalid literal for int()",
    "{run} --config.population=2.5": "config.population=2.5: invalid literal for int()",
    "{run} --config.sigma=small": "sigma=small: could not convert string to float",
    "{run} --config.population=0": "population must be at least 1, not 0",
    "{run} --confg=x": "Unknown command line flag 'confg'. Did you mean: config ?",
    "{run} more": "unexpected 'more'",
    "--config=/no/such.py": "--config: there is no file /no/such.py; configs that ship",
    "--config=tyny": "configs that ship: arc_c, ",
    "--config={folder}/broken.py": "division by zero",
    "--config={configs}/tiny.py:huge": "this file has no variants: nothing may follow",
    "--config={configs}/arc_c.py:huge": "there is no variant 'huge', only 'tiny'",
    "{run} --config.model={folder}/empty": "is not a model folder: it holds no config.",
    "{run} --config.task=arc_c --config.data.root=/no": (
        "data.root: there is no /no/ai2_arc/ARC-Challenge/train.parquet"
    ),
    "{run} --workdir={folder}/file": "file cannot be the run folder: File exists",
    "{run} --workdir={folder}/file/x": "x cannot be the run folder: Not a directory",
    "{run} --workdir=gs://bucket/run": "gs:/bucket/run is no folder on a disk, where",
    "{run} --local_devices=0,x --processes=1 --process=0 --coordinator=localhost:1": (
        "--local_devices: numbers as 0,1, not 0,x"
    ),
    "{run} --workdir={folder}/foreign": "is not empty and holds no run: give another",
}
"""Arguments, and what the message says of them; `run` is what is right."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting_is_named(
    setting: str, tmp_path: Path, small_model: Path
) -> None:
    config = get_config(str(small_model))
    for part in setting.split():
        name, _, text = part.partition("=")
        *groups, name = name.split(".")
        group = config[groups[0]] if groups else config
        kind = type(group[name])
        group[name] = ast.literal_eval(text) if kind is tuple else kind(text)
    with pytest.raises(InputError) as caught:
        train.run(config, tmp_path / "run")
    assert SETTINGS[setting] in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_a_config_file_makes_up_is_named() -> None:
    config = default()
    with pytest.raises(AttributeError, match="sigmma"):
        config.sigmma = 0.1
    config.unlock().grpo.clip = 0.3  # as an earlier version had it
    with pytest.raises(InputError, match=r"there is no setting grpo\.clip"):
        freeze(config)


@pytest.fixture(scope="module")
def mistakes(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path
) -> dict[str, dict[str, Any]]:
    """What came of each mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").touch()
    (folder / "file").touch()
    (folder / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    argvs = {}
    for number, name in enumerate(COMMANDS):
        run = " ".join(train_command(small_model, folder / "runs" / str(number))[1:])
        text = name.format(run=run, folder=folder, configs=CONFIGS)
        argvs[name] = ["jes.train", *text.split()]
    results = run_jobs([{"argv": argv} for argv in argvs.values()])
    assert not list((folder / "runs").iterdir())  # nothing is left behind
    return dict(zip(argvs, results, strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line_and_status_2(
    name: str, mistakes: dict[str, dict[str, Any]]
) -> None:
    result = mistakes[name]
    assert result["status"] == 2
    (line,) = result["stderr"].splitlines()
    assert line.startswith("error: ")
    assert COMMANDS[name] in line
    assert result["stdout"] == ""
    assert result["seconds"] < 30


def test_a_run_of_other_settings_lists_them(tmp_path: Path, small_model: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = get_config(str(small_model))
    record = {"config": {**json.loads(config.to_json()), "alpha": 0.2}}
    path = workdir / "config.json"
    path.write_text(json.dumps({**record, "resolved": {}, "versions": {}}))
    with pytest.raises(InputError) as caught:
        train.run(config, workdir)
    assert str(caught.value).splitlines() == [
        f"{workdir} belongs to a run with other settings:",
        "  alpha: 0.2 there, 0.1 here",
        "give another folder, or the same settings",
    ]
    path.write_text("{}")
    with pytest.raises(InputError, match=r"config\.json is not the config of a run"):
        train.run(config, workdir)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """A parquet file as the hub has them."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def test_data_that_is_not_as_expected_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "main"
    write_parquet(folder / "train.parquet", {"question": ["q"], "reply": ["r"]})
    write_parquet(folder / "test-00000-of-00002.parquet", {"question": ["a"]})
    write_parquet(folder / "test-00001-of-00002.parquet", {"question": ["b"]})
    (folder / "validation.parquet").write_bytes(b"PAR1 and no more")

    def read(split: str, *columns: str) -> list[dict[str, Any]]:
        return read_rows("owner/set", "main", split, columns, str(tmp_path))

    assert read("train", "question") == [{"question": "q"}]
    assert read("test", "question") == [{"question": "a"}, {"question": "b"}]
    with pytest.raises(InputError, match="no column answer; the columns are question,"):
        read("train", "question", "answer")
    with pytest.raises(InputError, match="validation cannot be read"):
        read("validation", "question")
    with pytest.raises(InputError, match=r"no .*dev\.parquet; the folder has test-0"):
        read("dev", "question")


def test_a_hub_that_does_not_answer_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A firewall that drops packets looks like this server, which never answers."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(safetensors_files, "_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(InputError, match="no network, or the hub does not answer"):
            safetensors_files.locate("owner/model")
        server.accept()[0].close()  # it was asked
    assert time.monotonic() - began < 30
