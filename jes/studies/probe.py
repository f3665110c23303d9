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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from jes.core.noise import Noise, PyTree, generation_key
from jes.core.population import chunks
from jes.core.tree import is_quantized
from jes.errors import InputError
from jes.experiment import one_shape, task_evaluation
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
Row = dict[str, Any]


def default() -> ml_collections.ConfigDict:
    """The settings of `jes.train`, of this study and of `jes.studies.spectrum`."""
    config = run_config.default().unlock()
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
    """Candidates with the same settings."""

    sigma: float  # of the perturbation; 0 for the model itself and for the sham
    number: int  # from 0; -1 for the model itself, -2 for the sham
    candidates: int

    def __str__(self) -> str:
        if self.number < 0:
            return "sham" if self.number == -2 else "the model itself"
        return f"sigma {self.sigma:g}, batch {self.number}"


MODEL = Batch(0.0, -1, 1)


def plan(probe: ml_collections.ConfigDict) -> list[Batch]:
    """The batches of a model: the model itself, every batch at every σ, the sham."""
    pairs = [(sigma, i) for i in range(probe.batches) for sigma in probe.sigmas]
    pairs += [(0.0, -2)] if probe.sham_temperature else []
    return [MODEL, *(Batch(*pair, probe.candidates) for pair in pairs)]


def check_least(section: str, settings: Any, least: Mapping[str, int]) -> None:
    """Raises InputError for a setting below its least value."""
    for name, lowest in least.items():
        if settings[name] < lowest:
            raise InputError(
                f"{section}.{name} must be at least {lowest}, not {settings[name]}"
            )


def check_probe(probe: ml_collections.ConfigDict) -> None:
    """Raises InputError for settings out of range."""
    least = {"candidates": min(probes.SIZES), "batches": 1, "pool": 1, "fresh": 0}
    check_least("probe", probe, least | {"pool_seed": 0, "sham_temperature": 0})
    if not np.isfinite(probe.sham_temperature):
        raise InputError("probe.sham_temperature must be finite")
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
        params, evaluation = self.pretrained.params, self.evaluation
        if batch.number == -2:
            temperature = self.config.probe.sham_temperature
            sham = dataclasses.replace(evaluation.sampling, temperature=temperature)
            evaluation = dataclasses.replace(evaluation, sampling=sham)
        # Batch numbers start at -2, keys at 0.
        key = generation_key(jax.random.key(self.config.seed), batch.number + 2)
        count = len(candidates)
        chunk = choose_chunk(
            self.config, params, evaluation, self.questions, noise, count
        )
        for members in chunks(np.asarray(candidates), min(chunk, count)):
            answered = answer_each(
                evaluation,
                params,
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
    params: PyTree,
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
    return chunk_of(evaluation, params, noise, batch, members, config.memory_gb)


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


def make_subject(
    config: ml_collections.ConfigDict, name: str, stop: StopRequest
) -> Subject:
    """Loads a model, and prepares the questions of the pool and the fresh ones."""
    probe, pretrained = config.probe, load_floats(name)
    evaluation = task_evaluation(
        run_config.freeze(config),
        pretrained,
        config.task,
        mode=config.mode,
        sampling=Sampling(max_new_tokens=config.max_new_tokens),
    )
    needed = f"probe.pool={probe.pool} and probe.fresh={probe.fresh}"
    count = probe.pool + probe.fresh
    questions = draw_questions(evaluation, count, probe.pool_seed, needed)
    cuts = np.array_split(np.arange(count), -(-count // config.eval_batch))
    evaluation = one_shape(evaluation, questions, [cut.tolist() for cut in cuts])
    return Subject(config, pretrained, evaluation, questions, stop)


def probe_model(subject: Subject, name: str, path: Path) -> None:
    """Appends the missing rows of one model to candidates.jsonl."""
    config, probe = subject.config, subject.config.probe
    depends = {k: config[k] for k in ("mode", "max_new_tokens", "task", "dtype")}
    own = ("pool", "pool_seed", "fresh", "sham_temperature")
    depends |= {"seed": config.seed} | {key: probe[key] for key in own}
    depends[f"model {name}"] = fingerprint(subject.pretrained.params)
    claim_results(path.parent, depends)
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
            row = {
                "model": name,
                "sigma": batch.sigma,
                "batch": batch.number,
                "candidate": candidate,
                "right": to_hex(answered.correct),
                "other_answers": float(
                    (answered.tokens != itself.tokens).any(-1).mean()
                ),
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


def collect(config: ml_collections.ConfigDict, rows: list[Row]) -> Row:
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


def statistics(bits: np.ndarray, other: np.ndarray, base: np.ndarray, pool: int) -> Row:
    """What the candidates of one model at one σ do, as shares of the prompts.

    Args:
      bits: bool [S, M, P + F], correct answers of S batches of M candidates.
      other: float [S, M], shares of answers that differ from the model's.
      base: [P + F], of the model itself, bool or shares.
      pool: P.

    Returns:
      By N of `sizes`: `best`, its standard error over batches and its deviation over
      draws, the `null`, and the same winners on `fresh` prompts; `enough` is N_90,
      `own` and `noise` are deviations of candidates and of the finite pool.
    """
    rng = np.random.default_rng(0)
    answers, start = bits[..., :pool], base[:pool]
    gains = probes.gains_of(answers, start)
    dealt = [probes.deal_out(one, rng) for one in answers for _ in range(DEALS)]
    nulls = probes.gains_of(np.array(dealt), start)
    sizes = [n for n in probes.SIZES if n <= gains.shape[1]]
    (best, variances), (null, _) = (best_of(x, x, sizes) for x in (gains, nulls))
    halves = [probes.halves(one, start, rng) for one in answers]
    own, noise = np.sqrt(np.maximum(0, np.mean(halves, 0))).tolist()
    every = gains.ravel()
    return {
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
        "best_spread": np.sqrt(variances.T.copy().mean(-1)).tolist(),
        "null": null.T.copy().mean(-1).tolist(),
        "enough": probes.enough(best.mean(0), sizes),
        "q95": probes.headroom(float(np.quantile(every, 0.95)), float(start.mean())),
        "own": own,
        "noise": noise,
    } | fresh_gains(bits[..., pool:], base[pool:], gains, sizes)


def fresh_gains(
    bits: np.ndarray, base: np.ndarray, gains: np.ndarray, sizes: Sequence[int]
) -> Row:
    """Gains on fresh prompts, of the candidates that win on the pool."""
    if not len(base):
        return {}
    fresh = probes.gains_of(bits, base)
    found, _ = best_of(gains, fresh, sizes)
    errors, mean = standard_error(found), float(fresh.mean())
    return {"fresh": found.mean(0).tolist(), "fresh_error": errors, "fresh_mean": mean}


def best_of(
    gains: np.ndarray, measured: np.ndarray, sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of `measured` [S, M] for the best of N, [S, sizes] each."""
    pairs = zip(gains, measured, strict=True)
    found = [[probes.best_of(*one, n) for n in sizes] for one in pairs]
    mean, variance = np.moveaxis(np.array(found), -1, 0)
    return mean, variance


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


CAPTION = """\
Task `{task}`: {candidates} candidates x {batches} batches, {pool} prompts. Gains in
percentage points, ± one standard error over batches, [95 %] over candidates. The sham
is the model sampling, and its gains are from its own mean.{interval} N_90 is 30 for
Gaussian gains with a mean from -0.19 to 1.57 standard deviations: an N_90 of 30 says
nothing of the landscape."""
INTERVAL = " A 95 % interval over batches is ± {:.1f} of these errors, by Student's t."
COLUMNS = {
    "model": "{model}",
    "sigma": "{sigma}",
    "reward %": "{base:.1f}",
    "other answers %": "{other:.1f}",
    "mean gain": "{mean:.2f}",
    "p(gain > 0) %": "{improving:.1f} [{low:.1f}, {high:.1f}]",
    "best of {}": "{best}",
    "of the null": "{null:.2f}",
    "on fresh prompts": "{fresh}",
    "mean on these": "{fresh_mean}",
    "sd own": "{own:.2f}",
    "sd noise": "{noise:.2f}",
    "N_90": "{enough}",
    "q95 of headroom %": "{q95:.1f}",
}


def markdown(data: Row) -> str:
    """All results, in percent."""
    lines = []
    for one in data["results"]:
        at, sigma = one["sizes"].index(picked(one)), one["sigma"]
        values: Row = {k: 100 * v for k, v in one.items() if isinstance(v, float)}
        values["low"], values["high"] = (100 * v for v in one["improving_interval"])
        values["best"] = plus_minus(one["best"][at], one["best_error"][at])
        values |= {"fresh": "-", "fresh_mean": "-", "null": 100 * one["null"][at]}
        if "fresh" in one:
            values["fresh"] = plus_minus(one["fresh"][at], one["fresh_error"][at])
            values["fresh_mean"] = f"{100 * one['fresh_mean']:.2f}"
        values |= {"model": one["model"], "enough": one["enough"] or "-"}
        values["sigma"] = sigma if sigma == SHAM else f"{sigma:g}"
        lines.append([cell.format(**values) for cell in COLUMNS.values()])
    batches = data["batches"]
    interval = INTERVAL.format(grid.t_factor(batches)) if batches > 1 else ""
    caption = CAPTION.replace("\n", " ").format(**data, interval=interval)
    heads = [head.format(picked(data["results"][0])) for head in COLUMNS]
    return f"{caption}\n\n{grid.table(heads, lines)}"


def picked(one: Row) -> int:
    """N of the table."""
    return PICK if PICK in one["sizes"] else one["sizes"][-1]


def plus_minus(value: float, error: float | None) -> str:
    """In percentage points; the error of a single batch is None."""
    return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def figure(data: Row) -> Figure:
    """Best of N, where it saturates, and how many perturbations improve."""
    made = Figure(figsize=(13, 7.6), layout="constrained")
    panels = made.subplots(2, 3).ravel()
    best, relative, share, mean, honest, change = panels
    found = [one for one in data["results"] if one["sigma"] != SHAM]
    for number, (model, rows) in enumerate(grid.grouped(found, "model").items()):
        style = {"color": f"C{number}", "label": Path(model).name}
        draw_best(best, relative, rows, style["color"], labelled=number == 0)
        draw_gains(panels[2:], rows, style, labelled=number == 0)
    sizes, n = found[0]["sizes"], picked(found[0])
    chance = np.array([probes.gaussian_best(n) for n in sizes])
    gray: Any = {"color": "0.5", "linewidth": 4, "alpha": 0.4}
    relative.plot(sizes, chance / chance[-1], **gray, label="any Gaussian")
    relative.axhline(0.9, color="0.7", linewidth=0.8)
    bottom, top = best.get_ylim()
    best.set_ylim(bottom, top + 0.15 * (top - bottom))  # for the legend
    above: Any = {"loc": "upper center", "ncols": 2}
    title = f"best of N on the pool, {data['task']}"
    for axes, texts, options in (
        (best, (title, "N", "gain, points; bars 1.96 SE"), above),
        (relative, ("the same, relative to the largest N", "N", "share"), {}),
        (share, ("perturbations that improve; bars 95 %", "sigma", "%"), {}),
        (mean, ("mean gain; bars 95 %", "sigma", "points"), {}),
        (honest, (f"best of {n}", "sigma", "gain, points"), {}),
        (change, (EQUAL_CHANGE, "other answers, %", "improving, %"), {}),
    ):
        grid.tidy(axes, *texts, fontsize="x-small", **options)
    for axes in (share, mean, honest, change):
        axes.set_xscale("log")
    for axes in (mean, honest, best):
        axes.axhline(0, color="0.7", linewidth=0.8)
    return made


EQUAL_CHANGE = "improving, at equal change of answers"
MEASURED = {
    "best": ("o-", "on the pool"),
    "null": ("x:", "null"),
    "fresh": ("s--", "on fresh prompts"),
}


def draw_gains(
    panels: Sequence[Axes],
    rows: Sequence[Row],
    style: Any,
    *,
    labelled: bool,
) -> None:
    """Of one model by σ: improving share, mean gain, best of N, and change."""
    share, mean, honest, change = panels
    sigmas = [one["sigma"] for one in rows]
    for axes, key in ((share, "improving"), (mean, "mean")):
        middle = 100 * np.array([one[key] for one in rows])
        ends = 100 * np.array([one[f"{key}_interval"] for one in rows]).T
        axes.errorbar(
            sigmas, middle, abs(ends - middle), capsize=3, marker="o", **style
        )
    at = rows[0]["sizes"].index(picked(rows[0]))
    for key, (mark, name) in MEASURED.items():
        if key in rows[0]:
            label: Any = {"label": name} if labelled else {}
            values = [100 * one[key][at] for one in rows]
            honest.plot(sigmas, values, mark, color=style["color"], **label)
    other, improving = ([100 * one[k] for one in rows] for k in ("other", "improving"))
    change.plot(other, improving, "o-", **style)


def draw_best(
    best: Axes,
    relative: Axes,
    rows: Sequence[Row],
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
            probe_model(make_subject(config, name, stop), name, path)
    except Stopped:
        console.print(f"stopped; the same command goes on from {workdir}")
        raise
    write_json(workdir / "probe.json", collect(config, read_rows(path)))
    console.print(draw(workdir))
    console.print(f"table and figure in {workdir}")


def main() -> None:
    """The command line."""

    def study(config: ml_collections.ConfigDict, workdir: Path) -> None:
        with stop_request() as stop:
            run(config, workdir, stop)

    start(study, lambda config: check_probe(config.probe))


def start(
    study: Callable[[ml_collections.ConfigDict, Path], None],
    check: Callable[[ml_collections.ConfigDict], None],
    kind: str = "",
) -> None:
    """The command line of a study of models, whose config is from `default`.

    Args:
      study: takes the config and the folder of results, which it has for itself.
      check: of the config, before there is a folder.
      kind: end of the default name of the folder.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings: a configs/probe_*.py.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", f"Of results; by default runs/<config>{kind}.")
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
        check(config)
        default = f"runs/{command_line.config_name()}{kind}"
        workdir = Path(flags.FLAGS.workdir or default)
        with alone(workdir):
            study(config, workdir)

    command_line.start(command)


if __name__ == "__main__":
    main()
