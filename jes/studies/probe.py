r"""Probes the landscape at a model: what random perturbations do to the reward.

    python -m jes.studies.probe --config=configs/probe_gsm8k.py:tiny [--workdir=FOLDER]

For each of `config.models`, each σ of `config.probe.sigmas` and each batch, candidates
:math:`\theta + \sigma u` answer a pool of training prompts, and fresh prompts on which
the winners of the pool are scored again (2602.00170, section 5 and App. G). Every σ
uses the same directions u. The last batch is a control, the sham: the unperturbed model
with sampled answers, where all differences are chance.

FOLDER has settings.json, candidates.jsonl (a row a candidate: its correct answers as
hexadecimal bits, and the share of answers that differ from the model's), probe.json,
and probe.md and probe.png drawn from it. Interrupted, the same command continues; it
may be repeated with more models, σ or batches.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import config_flags

from jes import config as run_config
from jes.core.ledger import append_row
from jes.core.noise import Noise, generation_key
from jes.core.population import chunks
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.experiment import one_bucket, task_evaluation
from jes.io import command_line
from jes.io.console import console
from jes.io.interrupts import Stopped, StopRequest, stop_request
from jes.io.metrics import keep_rows, read_rows, write_json
from jes.landscape import probes
from jes.memory import chunk_of, give_back_freed_blocks
from jes.models.weights import Pretrained, fingerprint, load
from jes.questions import Evaluation, Question, batch_of, prepare
from jes.rollout import answer_each
from jes.run_folder import alone, claim_results
from jes.sampling.generate import Sampling
from jes.scoring import Answered
from jes.studies import grid

DEALS = 20
"""Random permutations that the null is a mean over."""
PICK = 30
"""N of the table, or the largest there is: the paper's population."""
SHAM = "sham"


def default() -> ml_collections.ConfigDict:
    """The settings of `jes.train`, of this study and of `jes.studies.spectrum`."""
    config = run_config.default()
    config.models = ("tiny",)  # folders or hub ids, by size; each is probed

    # Random perturbations, scored on one pool of prompts (2602.00170, Eq. 51 to 54).
    config.probe = ml_collections.ConfigDict()
    config.probe.sigmas = (3e-4, 1e-3, 3e-3)
    config.probe.candidates = 240  # M, perturbations a batch
    config.probe.batches = 5  # S, independent batches
    config.probe.pool = 320  # P, training prompts, the same for all models
    config.probe.pool_seed = 0
    config.probe.fresh = 320  # other training prompts, to score winners again
    config.probe.sham_temperature = 0.7  # of the sham's answers; 0 for no sham

    # Curvature at the model: of the smoothed reward, and of a differentiable surrogate.
    # Its examples are of the training set, drawn by `probe.pool_seed`.
    config.curvature = ml_collections.ConfigDict()
    config.curvature.examples = 64  # of both, with reference answers
    config.curvature.microbatch = 16  # examples per gradient computation
    config.curvature.probes = 4  # random starts of Lanczos
    config.curvature.steps = 40  # Lanczos steps from each
    config.curvature.top = 20  # eigenvectors of the top subspace
    config.curvature.exact = 5  # eigenvalues computed again by ARPACK; 0 for none
    config.curvature.dense = 3000  # largest model whose whole Hessian is computed
    config.curvature.sigmas = (3e-4, 1e-3, 3e-3)
    config.curvature.directions = 256  # antithetic pairs of perturbations
    config.curvature.shuffles = 20  # controls with permuted rewards
    config.curvature.extreme = 0.1  # share of the members that are best, or worst
    return config


class Batch(NamedTuple):
    """Candidates with the same settings.

    Attributes:
      sigma: of the perturbation; 0 for the model itself and for the sham.
      number: from 0; -1 for the model itself, -2 for the sham.
      candidates: how many.
    """

    sigma: float
    number: int
    candidates: int

    def __str__(self) -> str:
        if self.number < 0:
            return "sham" if self.number == -2 else "the model itself"
        return f"sigma {self.sigma:g}, batch {self.number}"


MODEL = Batch(0.0, -1, 1)


def plan(probe: ml_collections.ConfigDict) -> list[Batch]:
    """The batches of a model: the model itself, every batch at every σ, the sham."""
    batches = [
        Batch(sigma, batch, probe.candidates)
        for batch in range(probe.batches)
        for sigma in probe.sigmas
    ]
    sham = [Batch(0.0, -2, probe.candidates)] if probe.sham_temperature else []
    return [MODEL, *batches, *sham]


def check_probe(probe: ml_collections.ConfigDict) -> None:
    """Raises InputError for settings out of range."""
    least = {"candidates": min(probes.SIZES), "batches": 1, "pool": 1}
    for name, lowest in (least | {"fresh": 0, "pool_seed": 0}).items():
        if probe[name] < lowest:
            raise InputError(f"probe.{name} must be at least {lowest}: {probe[name]}")
    if not np.isfinite(probe.sham_temperature) or probe.sham_temperature < 0:
        raise InputError(
            f"probe.sham_temperature must be 0 or more: {probe.sham_temperature}"
        )
    if not probe.sigmas or len(set(probe.sigmas)) < len(probe.sigmas):
        raise InputError(f"probe.sigmas must be distinct: {probe.sigmas}")
    try:
        for sigma in probe.sigmas:
            Noise(sigma=float(sigma))
    except (ValueError, TypeError) as error:
        raise InputError(f"probe.sigmas: {error}") from error


def load_floats(name: str) -> Pretrained:
    """A model that takes Gaussian noise, with a tokenizer."""
    pretrained = load(name)
    if pretrained.tokenizer is None:
        raise InputError(f"{name} has no tokenizer, which tasks need")
    if is_quantized(pretrained.params):
        raise InputError(f"{name} is quantised: give a model of floats")
    return pretrained


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the questions it is asked; `stop` is checked before every batch."""

    config: ml_collections.ConfigDict
    pretrained: Pretrained
    evaluation: Evaluation
    questions: list[Question]
    stop: StopRequest

    def answers(
        self, batch: Batch, candidates: Sequence[int]
    ) -> Iterator[tuple[int, Answered]]:
        """Each candidate's number and answers, in chunks that fit the memory."""
        noise = Noise(sigma=float(batch.sigma)) if batch.sigma else None
        evaluation = self.evaluation
        if batch.number == -2:
            temperature = self.config.probe.sham_temperature
            sham = dataclasses.replace(evaluation.sampling, temperature=temperature)
            evaluation = dataclasses.replace(evaluation, sampling=sham)
        # Batch numbers start at -2, keys at 0.
        key = generation_key(jax.random.key(self.config.seed), batch.number + 2)
        chunk = choose_chunk(
            self.config,
            self.pretrained,
            evaluation,
            self.questions,
            noise,
            len(candidates),
        )
        for members in chunks(np.asarray(candidates), min(chunk, len(candidates))):
            answered = answer_each(
                evaluation,
                self.pretrained.params,
                key,
                self.questions,
                members,
                noise=noise,
                batch_size=self.config.eval_batch,
                before_batch=self.stop.check,
            )
            # The last chunk is padded with copies of its last member.
            for i in range(len(set(members.tolist()))):
                yield int(members[i]), Answered(*(each[i] for each in answered))


def choose_chunk(
    config: ml_collections.ConfigDict,
    pretrained: Pretrained,
    evaluation: Evaluation,
    questions: Sequence[Question],
    noise: Noise | None,
    members: int,
) -> int:
    """Members to hold at once: `config.chunk`, or what fits beside the weights."""
    if config.chunk:
        return config.chunk
    size = -(-len(questions) // -(-len(questions) // config.eval_batch))
    batch = batch_of(evaluation, questions[:size])  # as `answer_each` cuts them
    given = evaluation, pretrained.params, noise, batch, members
    return chunk_of(*given, config.memory_gb)


def draw_questions(
    evaluation: Evaluation, count: int, seed: int, needed: str
) -> list[Question]:
    """Training questions, the same for all models.

    Raises:
      InputError: if the task has too few; `needed` says what they are for.
    """
    examples = evaluation.task.train
    if count > len(examples):
        raise InputError(
            f"{needed}, but {evaluation.task.name} has {len(examples)} training "
            "examples"
        )
    chosen = np.random.default_rng(seed).choice(len(examples), count, replace=False)
    return prepare(evaluation, [examples[i] for i in chosen])


def probe_model(
    config: ml_collections.ConfigDict, name: str, path: Path, stop: StopRequest
) -> None:
    """Appends the missing rows of one model to candidates.jsonl."""
    probe = config.probe
    pretrained = load_floats(name)
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    evaluation = task_evaluation(
        run_config.freeze(config),
        pretrained,
        config.task,
        mode=config.mode,
        sampling=sampling,
    )
    questions = draw_questions(
        evaluation,
        probe.pool + probe.fresh,
        probe.pool_seed,
        f"probe.pool={probe.pool} and probe.fresh={probe.fresh}",
    )
    subject = Subject(
        config, pretrained, one_bucket(evaluation, questions), questions, stop
    )
    names = ("mode", "max_new_tokens", "task", "dtype", "seed")
    depends = {key: config[key] for key in names}
    depends |= {key: probe[key] for key in ("pool", "pool_seed", "fresh")}
    depends |= {"sham_temperature": probe.sham_temperature}
    print_of = {f"model {name}": fingerprint(pretrained.params)}
    claim_results(path.parent, depends | print_of)
    done = {
        (row["sigma"], row["batch"], row["candidate"])
        for row in read_rows(path)
        if row["model"] == name
    }
    # The model itself always answers: the others are compared with it.
    ((_, itself),) = subject.answers(MODEL, [0])
    for batch in plan(probe):
        key = batch.sigma, batch.number
        missing = [i for i in range(batch.candidates) if (*key, i) not in done]
        for candidate, answered in subject.answers(batch, missing) if missing else ():
            other = (answered.tokens != itself.tokens).any(-1).mean()
            row = {
                "model": name,
                "sigma": batch.sigma,
                "batch": batch.number,
                "candidate": candidate,
                "right": to_hex(answered.correct),
                "other_answers": float(other),
            }
            append_row(path, row)
        if missing:
            console.print(f"{name}: {batch.candidates} candidates, {batch}")


def to_hex(bits: np.ndarray) -> str:
    """Bools [P] as hexadecimal digits, the first in the highest bit."""
    return np.packbits(bits).tobytes().hex()


def from_hex(text: str, count: int) -> np.ndarray:
    """Bools [count], the inverse of `to_hex`."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed)[:count].astype(bool)


# Statistics.


def collect(
    config: ml_collections.ConfigDict, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The contents of probe.json, from the rows of candidates.jsonl."""
    probe, results = config.probe, []
    named = grid.grouped(rows, "model", "sigma", "batch")

    def read(*batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """Correct answers [M, P + F], and shares of changed answers [M]."""
        found = sorted(named[batch], key=lambda row: row["candidate"])
        found = found[: probe.candidates]
        bits = [from_hex(row["right"], probe.pool + probe.fresh) for row in found]
        return np.array(bits), np.array([row["other_answers"] for row in found])

    for name in config.models:
        base = read(name, 0.0, -1)[0][0]
        for sigma in probe.sigmas:
            batches = [read(name, sigma, number) for number in range(probe.batches)]
            bits, other = map(np.array, zip(*batches, strict=True))
            found = statistics(bits, other, base, probe.pool)
            results.append({"model": name, "sigma": sigma} | found)
        if probe.sham_temperature:
            bits, other = read(name, 0.0, -2)
            # Sampling is worse than greedy: gains are from the mean of the sham.
            found = statistics(bits[None], other[None], bits.mean(0), probe.pool)
            results.append({"model": name, "sigma": SHAM} | found)
    shape = {key: probe[key] for key in ("candidates", "batches", "pool")}
    return {"task": config.task, **shape, "results": results}


def statistics(
    bits: np.ndarray, other: np.ndarray, base: np.ndarray, pool: int
) -> dict[str, Any]:
    """What the candidates of one model at one σ do.

    Args:
      bits: bool [S, M, P + F], correct answers of S batches of M candidates.
      other: float [S, M], shares of answers that differ from the model's.
      base: [P + F], of the model itself, bool or shares.
      pool: P.

    Returns:
      Rewards and gains as shares of the prompts: `base`, `mean` with its 95 % interval
      over candidates, `improving` with its, `other` answers; by N of the grid `best`,
      `best_error` (standard error over batches, NaN for one), `best_spread` (standard
      deviation of the best of one draw), `null`, and `fresh`, the gain of the same
      winners on fresh prompts (absent without); `enough` (N_90), `q95` of the gain as a
      share of the headroom, standard deviations `own` and `noise` of candidates and of
      the finite pool.
    """
    rng = np.random.default_rng(0)
    answers, start = bits[..., :pool], base[:pool]
    gains = np.array([probes.gains_of(one, start) for one in answers])
    sizes = [n for n in probes.SIZES if n <= gains.shape[1]]

    def best_of(measured: np.ndarray) -> np.ndarray:
        """Mean of `measured` for the best of N, [S, sizes]."""
        pairs = zip(gains, measured, strict=True)
        return np.array([[probes.best_of(*one, n)[0] for n in sizes] for one in pairs])

    dealt = [probes.deal_out(one, rng) for one in answers for _ in range(DEALS)]
    nulls = [probes.gains_of(one, start) for one in dealt]
    every = gains.ravel()
    halves = [probes.halves(one, start, rng) for one in answers]
    own, noise = np.sqrt(np.maximum(0, np.mean(halves, 0))).tolist()
    best = best_of(gains)
    variances = [
        np.mean([probes.best_of(one, one, n)[1] for one in gains]) for n in sizes
    ]
    found: dict[str, Any] = {
        "base": float(start.mean()),
        "batches": len(gains),
        "mean": float(every.mean()),
        "mean_interval": probes.bootstrap(np.mean, every, rng),
        "improving": probes.improving(every),
        "improving_interval": probes.bootstrap(probes.improving, every, rng),
        "other": float(other.mean()),
        "sizes": sizes,
        "best": best.mean(0).tolist(),
        "best_error": standard_error(best),
        "best_spread": np.sqrt(variances).tolist(),
        "null": [
            float(np.mean([probes.best_of(one, one, n)[0] for one in nulls]))
            for n in sizes
        ],
        "enough": probes.enough(best.mean(0), sizes),
        "q95": probes.headroom(float(np.quantile(every, 0.95)), float(start.mean())),
        "own": own,
        "noise": noise,
    }
    if len(base) > pool:
        fresh = bits[..., pool:].mean(-1) - base[pool:].mean()
        honest = best_of(fresh)
        found["fresh"] = honest.mean(0).tolist()
        found["fresh_error"] = standard_error(honest)
        found["fresh_mean"] = float(fresh.mean())
    return found


def standard_error(values: np.ndarray) -> list[float]:
    """Of the mean over the first axis; NaN for one."""
    if len(values) < 2:
        return [float("nan")] * values.shape[1]
    return (values.std(0, ddof=1) / np.sqrt(len(values))).tolist()


# Table and figure.


def draw(out: Path) -> str:
    """Writes probe.md and probe.png from probe.json; returns the text."""
    data = json.loads((out / "probe.json").read_text())
    text = markdown(data)
    (out / "probe.md").write_text(text)
    figure(data).savefig(out / "probe.png", dpi=120)
    return text


HEADS = (
    "model|sigma|reward %|other answers %|mean gain|p(gain > 0) %|best of {}|"
    "of the null|on fresh prompts|mean on these|sd own|sd noise|N_90|"
    "q95 of headroom %"
)


def markdown(data: dict[str, Any]) -> str:
    """All results, in percent."""
    lines = []
    for one in data["results"]:
        at = one["sizes"].index(picked(one))
        low, high = one["improving_interval"]
        fresh = mean = "-"
        if "fresh" in one:
            fresh = plus_minus(one["fresh"][at], one["fresh_error"][at])
            mean = f"{100 * one['fresh_mean']:.2f}"
        line = [
            one["model"],
            one["sigma"] if one["sigma"] == SHAM else f"{one['sigma']:g}",
            f"{100 * one['base']:.1f}",
            f"{100 * one['other']:.1f}",
            f"{100 * one['mean']:.2f}",
            f"{100 * one['improving']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            plus_minus(one["best"][at], one["best_error"][at]),
            f"{100 * one['null'][at]:.2f}",
            fresh,
            mean,
            f"{100 * one['own']:.2f}",
            f"{100 * one['noise']:.2f}",
            str(one["enough"] or "-"),
            f"{100 * one['q95']:.1f}",
        ]
        lines.append(line)
    batches, candidates = data["batches"], data["candidates"]
    caption = (
        f"Task `{data['task']}`: {candidates} candidates x {batches} batches, "
        f"{data['pool']} prompts. Gains in percentage points, ± one standard error "
        "over batches, [95 %] over candidates. The sham is the model sampling, and "
        "its gains are from its own mean."
    )
    if batches > 1:
        caption += (
            f" A 95 % interval over batches is ± {grid.t_factor(batches):.1f} of these "
            "errors, by Student's t."
        )
    caption += (
        " N_90 is 30 for Gaussian gains with a mean from -0.19 to 1.57 standard "
        "deviations: an N_90 of 30 says nothing of the landscape."
    )
    heads = HEADS.format(picked(data["results"][0])).split("|")
    return f"{caption}\n\n{grid.table(heads, lines)}"


def picked(one: dict[str, Any]) -> int:
    """N of the table."""
    return PICK if PICK in one["sizes"] else one["sizes"][-1]


def plus_minus(value: float, error: float | None) -> str:
    """In percentage points; the error of a single batch is None."""
    return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def figure(data: dict[str, Any]) -> Figure:
    """Best of N, where it saturates, and how many perturbations improve."""
    made = Figure(figsize=(13, 7.6), layout="constrained")
    best, relative, share, mean, honest, change = made.subplots(2, 3).ravel()
    found = [one for one in data["results"] if one["sigma"] != SHAM]
    for number, (model, rows) in enumerate(grid.grouped(found, "model").items()):
        color, label = f"C{number}", Path(model).name
        curves(best, relative, rows, color, labelled=number == 0)
        sigmas = [one["sigma"] for one in rows]
        for axes, key in ((share, "improving"), (mean, "mean")):
            middle = 100 * np.array([one[key] for one in rows])
            ends = 100 * np.array([one[f"{key}_interval"] for one in rows]).T
            bars: Any = {"color": color, "label": label, "marker": "o"}
            axes.errorbar(sigmas, middle, abs(ends - middle), capsize=3, **bars)
        pick = [one["sizes"].index(picked(one)) for one in rows]
        for key, (mark, name) in MEASURED.items():
            if key in rows[0]:
                values = [100 * r[key][at] for r, at in zip(rows, pick, strict=True)]
                text = {"label": name} if number == 0 else {}
                honest.plot(sigmas, values, mark, color=color, **text)
        other, improving = (
            [100 * one[key] for one in rows] for key in ("other", "improving")
        )
        change.plot(other, improving, "o-", color=color, label=label)
    sizes = found[0]["sizes"]
    chance = np.array([probes.gaussian_best(n) for n in sizes])
    style = {"color": "0.5", "linewidth": 4, "alpha": 0.4, "label": "any Gaussian"}
    relative.plot(sizes, chance / chance[-1], **style)
    relative.axhline(0.9, color="0.7", linewidth=0.8)
    bottom, top = best.get_ylim()
    best.set_ylim(bottom, top + 0.15 * (top - bottom))  # for the legend
    small: Any = {"fontsize": "x-small"}
    gain = "gain, points"
    title = f"best of N on the pool, {data['task']}"
    above: Any = {"loc": "upper center", "ncols": 2}
    grid.tidy(best, title, "N", f"{gain}; bars 1.96 SE", **small, **above)
    grid.tidy(relative, "the same, relative to the largest N", "N", "share", **small)
    title = "perturbations that improve; bars 95 %"
    grid.tidy(share, title, "sigma", "%", **small)
    grid.tidy(mean, "mean gain; bars 95 %", "sigma", "points", **small)
    grid.tidy(honest, f"best of {picked(found[0])}", "sigma", gain, **small)
    title = "improving, at equal change of answers"
    grid.tidy(change, title, "other answers, %", "improving, %", **small)
    for axes in (share, mean, honest, change):
        axes.set_xscale("log")
    for axes in (mean, honest, best):
        axes.axhline(0, color="0.7", linewidth=0.8)
    return made


MEASURED = {
    "best": ("o-", "on the pool"),
    "null": ("x:", "null"),
    "fresh": ("s--", "on fresh prompts"),
}


def curves(
    best: Axes,
    relative: Axes,
    rows: Sequence[dict[str, Any]],
    color: str,
    *,
    labelled: bool,
) -> None:
    """Best of N of one model by σ, and relative to the largest N."""
    for one, style in zip(rows, ("-", "--", ":", "-.") * len(rows), strict=False):
        line: Any = {"color": color, "linestyle": style}
        text: Any = {"label": f"sigma {one['sigma']:g}"} if labelled else {}
        points = 100 * np.array(one["best"])
        errors = 196 * np.array(one["best_error"], float)
        best.errorbar(one["sizes"], points, errors, capsize=2, **line, **text)
        if points[-1] > 0:
            relative.plot(one["sizes"], points / points[-1], **line)


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopRequest) -> None:
    """Probes every model, and writes the report."""
    path = workdir / "candidates.jsonl"
    keep_rows(path, lambda row: True)  # drops a row that a kill cut short
    try:
        for name in config.models:
            probe_model(config, name, path, stop)
    except Stopped:
        console.print(f"stopped; the same command goes on from {workdir}")
        raise
    write_json(workdir / "probe.json", collect(config, read_rows(path)))
    console.print(draw(workdir))
    console.print(f"table and figure in {workdir}")


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings: a configs/probe_*.py.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", "Of the results; by default runs/<config>.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        give_back_freed_blocks()
        config = config_flag.value
        if "probe" not in config:
            raise InputError(
                "the config has no settings of a probe: see configs/probe_*"
            )
        run_config.freeze(config)
        check_probe(config.probe)
        workdir = Path(flags.FLAGS.workdir or f"runs/{command_line.config_name()}")
        with alone(workdir), stop_request() as stop:
            run(config, workdir, stop)

    command_line.start(command)


if __name__ == "__main__":
    main()
