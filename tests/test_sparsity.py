"""Masks of a displacement, their controls, and the command that asks (2602.02605)."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_run import get_config, rows

import jes
from jes import train
from jes.core.noise import leaf_path
from jes.errors import InputError
from jes.export import read_ledger, rebuild
from jes.metacognition import masks
from jes.metacognition.masks import (
    exclude,
    keep_largest,
    keep_like,
    keep_random,
    keep_random_by_tensor,
    keep_smallest,
    norm_of,
    norm_share,
    random_walk,
    rescale,
    shrink,
)
from jes.studies import sparsity
from jes.studies.knowing import Answers

SHARES = (0.0, 0.01, 0.2, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module")
def delta() -> dict[str, Any]:
    """Stacked layers of different sizes of entries, and a leaf beside them."""
    rng = np.random.default_rng(0)
    layers = rng.standard_normal((3, 20, 10)) * np.array([0.1, 1, 3])[:, None, None]
    return {
        "embed": {"embedding": np.float32(rng.standard_normal((40, 10)))},
        "layers": {"kernel": np.float32(layers), "scale": np.ones((3, 10), np.float32)},
    }


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def count(tree: Any) -> int:
    return int(np.count_nonzero(flat(tree)))


def assert_same(got: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("order", ["up", "down", "mixed"])
def test_the_example_of_the_paper(order: str) -> None:
    """1..10 with a share of .2: the threshold is the 8th smallest, and it is kept."""
    values = np.arange(1.0, 11)
    if order == "down":
        values = values[::-1]
    elif order == "mixed":
        values = np.random.default_rng(0).permutation(values)
    values = values * np.where(np.arange(10) % 2, 1, -1)
    tree = {"a": values[:4], "b": values[4:].reshape(2, 3)}
    top, rest = (flat(keep(tree, 0.2)) for keep in (keep_largest, keep_smallest))
    assert sorted(abs(top[top != 0])) == [8, 9, 10]
    assert sorted(abs(rest[rest != 0])) == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(top + rest, values)


@pytest.mark.parametrize("share", SHARES)
def test_the_threshold_is_that_of_a_sort(delta: dict, share: float) -> None:
    sizes = np.abs(flat(delta))
    rank = max(int(sizes.size * (1 - share)), 1)
    kept = sizes >= np.sort(sizes)[rank - 1]
    expected = np.where(kept & (share > 0), flat(delta), 0)
    np.testing.assert_array_equal(flat(keep_largest(delta, share)), expected)


def test_ties_are_kept_and_zeros_are_small() -> None:
    tree = {"a": np.array([0.0, -0.0, 2, -2, 2, 1e-40, 3], np.float32)}
    assert flat(keep_largest(tree, 0.3)).tolist() == [0, 0, 2, -2, 2, 0, 3]
    kept = flat(keep_largest(tree, 0.75))  # the smallest of all that is not 0
    assert kept[5] == np.float32(1e-40)


def test_pieces_make_no_difference(
    delta: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keep_largest(delta, 0.3), keep_random(delta, 0.3, 0), norm_of(delta)
    monkeypatch.setattr(masks, "PIECE", 7)
    assert_same(keep_largest(delta, 0.3), whole[0])
    assert_same(keep_random(delta, 0.3, 0), whole[1])
    assert norm_of(delta) == pytest.approx(whole[2], rel=1e-12)


def test_shares_of_the_norm_of_a_gaussian() -> None:
    """Section 8.4: what the largest of 1e6 i.i.d. entries hold of the squared norm."""
    tree = random_walk({"a": np.ones(10**6, np.float32)}, seed=0)
    expected = {
        0.01: 0.084,
        0.05: 0.279,
        0.1: 0.439,
        0.2: 0.650,
        0.3: 0.783,
        0.4: 0.871,
    }
    for share, held in expected.items():
        top = keep_largest(tree, share)
        assert norm_share(top, tree) == pytest.approx(held, abs=0.002)
        rest = norm_share(keep_smallest(tree, share), tree)
        assert rest == pytest.approx(1 - held, abs=0.002)
        # Of entries drawn evenly it is the share of the entries.
        drawn = norm_share(keep_random(tree, share, 0), tree)
        assert drawn == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("share", SHARES)
def test_parts_add_up_and_have_their_sizes(delta: dict, share: float) -> None:
    top, rest = keep_largest(delta, share), keep_smallest(delta, share)
    assert_same(jax.tree.map(np.add, top, rest), delta)
    other = random_walk(delta, seed=1)
    size = {0.0: 0, 1.0: 1030}.get(share, count(top))
    assert count(top) == size
    for drawn in (
        keep_random(delta, share, 0),
        keep_random_by_tensor(delta, share, 0),
    ):
        assert count(drawn) == size
        assert_same(np.where(flat(drawn), flat(delta), 0), flat(drawn))
    like = flat(keep_like(delta, other, share))
    mask = flat(keep_largest(other, share)) != 0
    np.testing.assert_array_equal(like, np.where(mask, flat(delta), 0))
    goal = norm_of(top)
    scaled = rescale(keep_random(delta, share, 0), goal)
    assert norm_of(scaled) == pytest.approx(goal, rel=1e-6)
    shrunk = shrink(delta, norm_share(top, delta))
    assert norm_of(shrunk) == pytest.approx(goal, rel=1e-6)
    for leaf in jax.tree.leaves((top, rest, scaled, shrunk, like)):
        assert leaf.dtype == np.float32


def test_random_masks_grow_and_depend_on_the_seed(delta: dict) -> None:
    few, many = (flat(keep_random(delta, share, 3)) != 0 for share in (0.1, 0.4))
    assert (many | ~few).all()
    assert (flat(keep_random(delta, 0.1, 4)) != 0).tolist() != few.tolist()
    # 400 of the 1030 entries: a hypergeometric count, within five of its deviations.
    inside = np.count_nonzero(flat(keep_random(delta, 0.4, 3)["embed"]))
    assert abs(inside - 160) < 5 * (400 * 0.4 * 0.6 * 630 / 1030) ** 0.5


def test_layers_keep_their_numbers(delta: dict) -> None:
    top, drawn = keep_largest(delta, 0.2), keep_random_by_tensor(delta, 0.2, 0)
    leaves = jax.tree_util.tree_leaves_with_path(top)
    for (path, a), b in zip(leaves, jax.tree.leaves(drawn), strict=True):
        axes = tuple(range(1, a.ndim)) if leaf_path(path)[:6] == "layers" else None
        numbers = np.count_nonzero(a, axes), np.count_nonzero(b, axes)
        np.testing.assert_array_equal(*numbers)
    kernel = np.count_nonzero(top["layers"]["kernel"], (1, 2))
    assert kernel[0] == 0 < kernel[1] < kernel[2]
    assert (drawn["layers"]["kernel"] != top["layers"]["kernel"]).any()
    reversed_order = {"a": np.asfortranarray(delta["embed"]["embedding"])}
    drawn = keep_random_by_tensor(reversed_order, 0.2, 0)
    assert (flat(drawn) != flat(keep_largest(reversed_order, 0.2))).any()


def test_a_random_walk_has_the_norm_and_no_direction(delta: dict) -> None:
    walk = random_walk(delta, seed=0)
    assert norm_of(walk) == pytest.approx(norm_of(delta), rel=1e-6)
    cosine = flat(walk) @ flat(delta) / norm_of(delta) ** 2
    assert abs(cosine) < 5 / flat(delta).size ** 0.5
    assert_same(walk, random_walk(delta, seed=0))


def test_excluded_tensors_are_neither_counted_nor_moved(delta: dict) -> None:
    part = exclude(delta, ["layers/kernel", "embed"])
    assert flat(part).size == 30
    assert count(keep_largest(part, 0.5)) == 30  # they are all of one size
    moved = sparsity.moved(delta, keep_largest(part, 1.0))
    assert_same(moved["embed"], delta["embed"])
    assert_same(moved["layers"]["scale"], 2 * delta["layers"]["scale"])
    assert_same(exclude(delta, []), delta)
    with pytest.raises(ValueError, match="no tensor is named lm_head"):
        exclude(delta, ["lm_head"])


def test_what_cannot_be_is_refused(delta: dict) -> None:
    for share in (-0.1, 1.1, float("nan")):
        for function in (keep_largest, keep_smallest, shrink):
            with pytest.raises(ValueError, match="a share is from 0 to 1"):
                function(delta, share)
    with pytest.raises(ValueError, match="not of one model"):
        keep_like(delta, {"a": delta["embed"]}, 0.5)
    zero = rescale(delta, 0.0)
    assert count(zero) == 0
    assert count(rescale(zero, 1.0)) == 0
    assert np.isnan(norm_share(delta, zero))


# The command, on runs of a random model of 12,000 weights.


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, finished_run: Path
) -> Path:
    """A run, one of another seed, and one of shuffled fitness."""
    folder = tmp_path_factory.mktemp("sparsity")
    (folder / "run").symlink_to(finished_run)
    for name, setting, value in (
        ("other", "seed", 1),
        ("walk", "shuffle_fitness", True),
    ):
        config = get_config(str(small_model))
        config.generations = 2
        config[setting] = value
        train.run(config, folder / name)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["jes", *map(str, arguments)])
    try:
        sparsity.main()
    except SystemExit as error:
        return error.code
    return None


@pytest.fixture(scope="module")
def results(runs: Path) -> Path:
    """What the command leaves, killed once before its fifth model."""
    out = runs / "results"
    arguments = [f"--{name}={runs / name}" for name in ("run", "other", "walk")]
    arguments += [f"--out={out}", "--task=tiny/knows"]
    arguments += ["--examples=24", "--shares=0,10,50,100"]
    with pytest.MonkeyPatch.context() as patch:
        collect, calls = sparsity.collect, itertools.count(1)

        def interrupted(*args, **kwargs):
            if next(calls) == 5:
                raise KeyboardInterrupt  # where SIGINT is ignored, too
            return collect(*args, **kwargs)

        patch.setattr(sparsity, "collect", interrupted)
        assert command(patch, *arguments) == 130
    path = out / "results.jsonl"
    assert len(rows(path)) == 4
    assert not (out / "results.json").exists()
    (runs / "killed.jsonl").write_bytes(path.read_bytes())
    with path.open("a") as file:
        file.write('{"part": "top", "sha')  # as a kill can leave it
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, *arguments) is None
    return out


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(results: Path, runs: Path) -> None:
    text = (results / "results.jsonl").read_text()
    assert text.startswith((runs / "killed.jsonl").read_text())
    asked = [(row["part"], row["share"]) for row in rows(results / "results.jsonl")]
    # The base, the run, nine parts at two shares, and the two walks whole.
    assert len(asked) == len(set(asked)) == 2 + 9 * 2 + 2


@pytest.mark.slow
def test_results_hold_every_part_and_its_norm(results: Path) -> None:
    report = json.loads((results / "results.json").read_text())
    table = {(row["part"], row["share"]): row for row in report["rows"]}
    assert len(table) == 22
    for row in table.values():
        assert {"d_prime", "d_prime_low", "alignment", "accuracy", "yes_rate"} <= set(
            row
        )
    assert table["top", 0.0]["norm_share"] == 0
    for part in ("top", *sparsity.WALKS):
        assert table[part, 1.0]["norm_share"] == pytest.approx(1)
    for share in (0.1, 0.5):
        held = table["top", share]["norm_share"]
        assert held > share
        assert table["top removed", share]["norm_share"] == pytest.approx(1 - held)
        for part in sparsity.TO_BEAT:
            assert table[part, share]["norm_share"] == pytest.approx(held, rel=1e-5)
    assert [row["share"] for row in report["comparisons"]] == [0.1, 0.5]
    for row in report["comparisons"]:
        for name in sparsity.TO_BEAT:
            assert isinstance(row[name]["beaten"], bool)
    assert report["settings"]["task"] == "tiny/knows"
    assert (results / "sparsity.png").is_file()
    text = (results / "results.md").read_text()
    assert "The top entries beat both random entries of equal norm" in text
    assert text.count("| top removed |") == 2


def test_the_ends_are_the_base_and_the_run(runs: Path, small_model: Path) -> None:
    """To rounding: θ_0 + (θ - θ_0) may be another float32 than θ."""
    base, tuned, config, dtype = sparsity.load_run(runs / "run")
    expected = rebuild(read_ledger(runs / "run")).params
    assert_same(tuned.params, expected)
    assert_same(base.params, jes.load(small_model).params)
    assert (config["task"], dtype) == ("tiny/reverse", "float32")
    delta = sparsity.displacement(tuned.params, base.params, [])
    parts = sparsity.parts_of(delta, seed=0)
    for name, share in (("top", 1.0), ("top removed", 0.0)):
        whole = sparsity.moved(base.params, parts[name](share))
        for got, want in zip(
            jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert_same(sparsity.moved(base.params, parts["top"](0.0)), base.params)


def test_the_report_says_where_the_top_is_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 10 % better than both controls, at 50 % no better than one."""
    right, some, none = "1100" * 30, "1101" * 30, "1010" * 30
    said = {
        ("top", 0.0): none,
        ("top", 1.0): right,
        ("top", 0.1): right,
        ("random of equal norm", 0.1): none,
        ("shrunk", 0.1): none,
        ("top", 0.5): some,
        ("random of equal norm", 0.5): none,
        ("shrunk", 0.5): right,
    }
    table = [
        {
            "part": part,
            "share": share,
            "norm_share": share,
            **sparsity.row_of(answers_of(right, bits)),
        }
        for (part, share), bits in said.items()
    ]
    settings = {"task": "tiny/knows", "examples": 120, "seed": 0}
    sparsity.write_report(tmp_path, table, list(said), settings)
    text = (tmp_path / "results.md").read_text()
    assert "the shrunk displacement at 10 %, by the paired" in text
    ten, half = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert ten["gain"] == 1
    assert 0 < half["gain"] < 1
    assert half["random of equal norm"]["beaten"]
    assert not half["shrunk"]["beaten"]
    assert "tables and figure in" in capsys.readouterr().out


def answers_of(correct: str, yes: str) -> Answers:
    right, said = (np.array(list(bits)) == "1" for bits in (correct, yes))
    texts = [""] * len(right)
    never, unsure = np.zeros(len(right), bool), np.full(len(right), np.nan)
    return Answers(texts, texts, texts, right, right, said, never, unsure)


def test_differences_are_paired_over_questions() -> None:
    """Better on every resample, though each d' alone is as uncertain as the other."""
    correct = "1100" * 20
    top = {"correct_bits": correct, "yes_bits": "1100" * 20}
    worse = {"correct_bits": correct, "yes_bits": "1010" * 20}
    found = sparsity.difference(top, worse)
    assert found["beaten"]
    assert 0 < found["low"] < found["difference"] < found["high"]
    same = sparsity.difference(top, top)
    assert same == {"difference": 0, "low": 0, "high": 0, "beaten": False}
    none = {"correct_bits": "1" * 80, "yes_bits": "1" * 80}
    undefined = sparsity.difference(top, none)
    assert undefined["difference"] is None
    assert not undefined["beaten"]


def test_a_run_without_a_ledger_starts_from_the_model_of_its_config(
    runs: Path, tmp_path: Path, small_model: Path
) -> None:
    """As the baselines leave it: the base is named in config.json."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "run", folder)
    (folder / "ledger.jsonl").unlink()
    base, tuned, config, dtype = sparsity.load_run(folder)
    assert_same(base.params, jes.load(small_model).params)
    assert_same(tuned.params, jes.load(runs / "run" / "model").params)
    assert (config["task"], dtype) == ("tiny/reverse", "float32")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(InputError, match="much of the difference would be rounding"):
        sparsity.load_run(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=/no/such"], "error: /no/such is not a run folder"),
        (["--run=MODEL"], "is not a run folder: give that of a run of jes"),
        (["--other=RUNS/run"], "error: --other is the run itself"),
        (["--walk=RUNS/other"], "other is not a run with shuffle_fitness"),
        (["--task=tiny/divide"], "error: there is no task 'tiny/divide'"),
        (["--task=tiny/max"], "tiny/max does not ask whether the model knows"),
        (["--exclude=lm_head"], "error: --exclude: no tensor is named lm_head"),
        (["--shares=1,101"], "not percentages from 0 to 100: '1,101'"),
        (["--shares=few"], "not percentages from 0 to 100: 'few'"),
        (["--out=MODEL/config.json"], "config.json cannot be the run folder"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    message: str,
    runs: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUNS": str(runs), "MODEL": str(small_model)}
    for name, place in places.items():
        arguments = [text.replace(name, place) for text in arguments]
    common = [f"--run={runs / 'run'}", f"--out={tmp_path / 'out'}", "--task=tiny/knows"]
    common += ["--examples=24", "--seed=1"]
    assert command(monkeypatch, *common, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_results_of_another_seed_are_refused(
    results: Path,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--run={runs / 'run'}", f"--out={results}", "--task=tiny/knows"]
    assert command(monkeypatch, *arguments, "--examples=24", "--seed=1") == 2
    assert "seed: 0 there, 1 here\ngive another folder" in capsys.readouterr().err


def test_quantised_runs_and_other_bases_are_refused(
    runs: Path, tmp_path: Path, small_model: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = json.loads((runs / "run" / "config.json").read_text())
    config["config"] |= {"quantize": "int8", "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").touch()
    with pytest.raises(InputError, match=r"run of a quantised model: .* whole codes"):
        sparsity.load_run(folder)
    base = jes.load(small_model).params
    moved = jax.tree.map(lambda leaf: leaf + 1, base)
    with pytest.raises(InputError, match="starts from another base model"):
        sparsity.load_more(runs / "other", moved, [], shuffled=False)
    with pytest.raises(InputError, match="are those of its base model"):
        sparsity.displacement(base, base, [])
    broken = jax.tree.map(lambda leaf: leaf * np.nan, base)
    with pytest.raises(InputError, match="weights are not finite"):
        sparsity.displacement(broken, base, [])
