"""The folder of a run: who may run there, what it writes, and where it stands.

config.json        all settings, what was chosen where they leave it open, versions
constraints.txt    all packages that were installed when the run began
ledger.jsonl       fitness of every generation (method 'es'), see `jes.core.ledger`
metrics.jsonl, evaluations.jsonl, distances.jsonl, tensorboard/, curves.png
answers.jsonl      to some held-out prompts, the same at each evaluation
checkpoints/       the newest states
model/             the result; then summary.json, written last
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jes.config import Settings, default, freeze
from jes.core import ledger as ledgers
from jes.core.anchor import distance
from jes.core.ledger import append_row
from jes.core.noise import PyTree
from jes.errors import InputError
from jes.experiment import ON_TRAIN, Experiment, State, settled
from jes.io import checkpoints, hosts
from jes.io.console import console
from jes.io.interrupts import Before
from jes.io.metrics import Board, finite, keep_rows, read_rows, write_json
from jes.io.model_card import beside_model
from jes.io.plots import training_curves
from jes.io.tracker import Tracker
from jes.io.versions import changed_since, constraints, versions
from jes.models.weights import fingerprint
from jes.questions import Question
from jes.rollout import examine
from jes.sampling.kl import divergence
from jes.scoring import Score
from jes.tasks import Example, Prompt, Task

KL_ROWS = 8
"""Answers whose logits, of base and tuned model, are in memory at once for the KL."""

MEMORY = ("chunk", "slots", "slice_tokens", "memory_gb", "devices", "model_parallel")
MAY_CHANGE = (
    *("eval_every", "eval_batch", "checkpoint_every", "share_update", *MEMORY),
    *("reward_timeout", "reward_concurrency", "accept_changes", "tracker"),
    *("keep", "patience"),
)
"""Settings that a run may go on with other values of: they decide when it evaluates and
saves, and how much memory it takes on which devices, not what it computes (beyond the
order of sums, for the last). So may `generations`, except with method 'sft', whose
learning rates depend on it."""

REMOVED = {"grpo.clip": 0.2, "grpo.kl": 0.001, "grpo.epochs": 1}
"""Former settings, with the value that is fixed now."""
RENAMED = {"data.train": "data.train_examples", "data.test": "data.test_examples"}
"""Former names of whole numbers; the old names have text now."""
ANSWERS = 8
"""Held-out prompts of each task whose answers are written down."""


class RunFolder:
    """What a run writes, and what it finds when it goes on.

    The first process of a run alone reads and writes; in others, nothing happens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger, self.checkpoints = path / "ledger.jsonl", path / "checkpoints"
        self.saved = 0  # generations of the newest checkpoint
        self.keeps_ledger = False
        self.ended = False  # before its last generation, by patience
        self.tracker: Tracker | None = None
        self.writes = hosts.first()

    def open(
        self,
        experiment: Experiment,
        resolve: Callable[[Experiment, Mapping[str, Any]], dict[str, Any]],
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Claims the folder; deletes partial checkpoints and those beyond the ledger.

        Returns:
          What `resolve` chose where the settings leave something open, now or before,
          and the fitness of the generations in the ledger.

        Raises:
          InputError: if the folder is that of another run, or of a longer one.
        """
        settings = experiment.settings
        self.keeps_ledger = settings.method == "es"

        def opened() -> tuple[dict[str, Any], list[list[float]]]:
            config, made = dataclasses.asdict(settings), partial(resolve, experiment)
            resolved = claim(self.path, config, made, experiment.identity)
            done, fitness = max(checkpoints.saved(self.checkpoints), default=0), []
            if self.keeps_ledger:
                now = settled(experiment, resolved)
                fitness = open_ledger(now, self.ledger).fitness
                done = len(fitness)
            check_length(self.path, done, settings.generations)
            checkpoints.tidy(self.checkpoints, done)
            return resolved, [row.tolist() for row in fitness]

        resolved, fitness = hosts.from_first(opened)
        return resolved, [np.array(row, np.float32) for row in fitness]

    def restore(self, state: State, at_most: int) -> State:
        """The state of the newest checkpoint that can be read; else `state`.

        The first process reads it, and sends it to the others.
        """
        like, found = (state.params, state.opt_state), None
        if self.writes:
            found = checkpoints.restore_latest(self.checkpoints, like, at_most)
        saved, values = found or (0, like)
        self.saved = hosts.from_first(lambda: saved)
        if self.saved:
            values = hosts.sent_by_first(values)
        return State(state.root, self.saved, *values)

    def save(self, state: State) -> None:
        """Writes a checkpoint, unless there is one of this state.

        Raises:
          OSError: if the disk is full and no ledger has the generations as well.
        """
        if not self.writes or state.generation <= self.saved:
            return
        values = state.params, state.opt_state
        try:
            checkpoints.save(self.checkpoints, state.generation, values)
            self.saved = state.generation
        except OSError as error:
            if not self.keeps_ledger:
                raise
            console.print(f"no checkpoint written ({error}); the ledger has everything")

    def stopped(self, state: State, done: int, generations: int) -> None:
        """Saves where a run was asked to stop, and says so."""
        self.save(state)
        console.print(
            f"stopped after {done} of {generations} generations; the same command goes "
            f"on from {self.path}"
        )
        if self.keeps_ledger and done and self.writes:
            export = f"python -m jes.export --run={self.path} --out=FOLDER"
            console.print(f"what it has learned so far: {export}")
        if self.writes and (self.path / "model").exists():
            console.print(f"{self.path / 'model'} is older: of when the run had ended")

    def keep(self, experiment: Experiment, state: State) -> bool:
        """Saves the best centre, where asked; whether patience has come to its end."""
        settings = experiment.settings
        if settings.keep == "last" and not settings.patience:
            return False

        def decide() -> bool:
            rewards = self.held_out(settings)
            best = max(rewards, key=rewards.__getitem__)
            if settings.keep == "best" and best == state.generation:
                trained = dataclasses.replace(
                    experiment.pretrained, params=state.params
                )
                trained.save(self.path / "model-best", dtype=settings.dtype)
            since = sum(generation > best for generation in rewards)
            ends = 0 < settings.patience <= since
            if ends:
                console.print(
                    f"the held-out reward was best after {best} generations; with "
                    f"patience={settings.patience} the run ends here"
                )
            return ends

        return hosts.from_first(decide)

    def held_out(self, settings: Settings) -> dict[int, float]:
        """The held-out reward of the task by generation; the first best is first."""
        rows = read_rows(self.path / "evaluations.jsonl")
        return {
            row["generation"]: row["reward"]
            for row in rows
            if row["task"] == settings.task and row.get("reward") is not None
        }

    @contextmanager
    def writing(self, settings: Settings, done: int) -> Iterator[None]:
        """Opens the files of rows, cut back to the first `done` generations.

        Raises:
          InputError: if the tracker of the settings is not installed.
        """
        if not self.writes:
            yield
            return
        if settings.tracker:
            config = _flat(dataclasses.asdict(settings))
            self.tracker = Tracker(settings.tracker, self.path, config)
        # Its presence says that the run is complete: this one goes on.
        (self.path / "summary.json").unlink(missing_ok=True)
        keep_rows(self.path / "metrics.jsonl", lambda row: row["generation"] < done)
        self.board = Board(self.path / "tensorboard", done)
        answers = self.path / "answers.jsonl"
        keep_rows(answers, lambda row: row["generation"] <= done)
        for name in ("evaluations", "distances"):
            path = self.path / f"{name}.jsonl"
            keep_rows(path, lambda row: row["generation"] <= done)
            # The new events supersede those from `done` on: write these again.
            for row in read_rows(path):
                if row["generation"] >= done:
                    self.board.write(name, row["generation"], row)
        try:
            yield
        finally:
            self.board.close()
            if self.tracker is not None:
                self.tracker.close()

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends a row to `<name>.jsonl` and to TensorBoard, NaN as null."""
        append_row(self.path / f"{name}.jsonl", finite(row))
        for board in (self.board, self.tracker):
            if board is not None:
                board.write(name, row["generation"], row)

    def record(self, row: Mapping[str, Any], fitness: Any) -> None:
        """Writes a generation: its metrics, then the ledger, from when it counts."""
        if not self.writes:
            return
        self.write("metrics", row)
        if self.keeps_ledger:
            ledgers.append_generation(self.ledger, row["generation"], fitness)

    def evaluate(
        self,
        experiment: Experiment,
        base: PyTree,
        check_stop: Before,
        generation: int,
        params: PyTree,
    ) -> None:
        """Scores the centre on held-out examples, and measures its way from the base.

        Rows that an earlier start of the run has written are not made again.

        Args:
          experiment: of the run.
          base: the anchor; None if none is kept.
          check_stop: called before every batch; may raise.
          generation, params: how many generations led to this centre.
        """

        def missing() -> list[str]:
            rows = read_rows(self.path / "evaluations.jsonl")
            done = {row["task"] for row in rows if row["generation"] == generation}
            return [name for name in experiment.evaluations if name not in done]

        for name in hosts.from_first(missing):
            evaluation, questions = experiment.evaluations[name]
            answers: dict[int, dict[str, Any]] = {}
            note = partial(note_answer, answers, evaluation.task, questions)
            score = examine(
                evaluation,
                params,
                questions,
                batch_size=experiment.settings.eval_batch,
                before_batch=check_stop,
                listen=note,
                shown=0 if name.endswith(ON_TRAIN) else ANSWERS,
                together=True,
            )
            if not math.isfinite(score.reward):
                raise InputError(
                    f"after {generation} generations the answers to {name} have no "
                    "finite reward: the weights have diverged, or they overflow in "
                    f"{experiment.settings.dtype} (bfloat16 overflows later)"
                )
            if not self.writes:
                continue
            row = {"generation": generation, "task": name}
            said = [finite(row | answers[number]) for number in sorted(answers)]
            for one in said:
                append_row(self.path / "answers.jsonl", one)
            if said and self.tracker is not None:
                self.tracker.answers(generation, said)
            row |= {"examples": len(questions)} | score_row(
                score, evaluation.task.parts
            )
            self.write("evaluations", row)
            console.print(
                f"after {generation} generations: {name} {result_of(row)} on "
                f"{len(questions)} {_kind(name)} examples"
            )
        if not self.writes:
            return
        rows = read_rows(self.path / "distances.jsonl")
        if base is not None and generation not in {row["generation"] for row in rows}:
            row = distance_row(experiment, params, base, check_stop)
            self.write("distances", {"generation": generation} | row)

    def finish(self, experiment: Experiment, state: State) -> dict[str, Any]:
        """Saves the model and the curves, and writes the summary last."""
        if not self.writes:
            found, number = fingerprint(state.params), jax.process_index()
            console.print(f"process {number} has reached the weights {found}")
            return {}
        if self.keeps_ledger:
            found = fingerprint(state.params)
            if ledgers.read(self.ledger).fingerprints.get(state.generation) != found:
                ledgers.append_fingerprint(self.ledger, state.generation, found)
        training_curves(self.path)
        summary = summarize(experiment, state.generation, self.path)
        rewards = self.held_out(experiment.settings)
        if experiment.settings.keep == "best" and rewards:
            best = max(rewards, key=rewards.__getitem__)
            summary["best"] = {"generation": best, "reward": rewards[best]}
        if self.ended:
            summary["ended"] = "patience"
        config = plain(dataclasses.asdict(experiment.settings))
        standard, now = _flat(default().to_dict()), _flat(config)
        changed = {name: now[name] for name in now if now[name] != standard[name]}
        beside = beside_model(self.path, config, changed, summary, versions())
        trained = dataclasses.replace(
            experiment.pretrained,
            params=state.params,
            files=dict(experiment.pretrained.files) | beside,
        )
        # In the dtype that the members answered in, so that it answers as evaluated.
        trained.save(self.path / "model", dtype=experiment.settings.dtype)
        write_json(self.path / "summary.json", summary)
        report(self.path, summary)
        return summary


def score_row(score: Score, parts: Sequence[str] = ()) -> dict[str, Any]:
    """A score as a row, without what the task does not say of its answers.

    `parts` are the names of `Task.parts`, whose means are added.
    """
    row = score._asdict()
    values, row["reward_error"] = row.pop("parts"), row.pop("error")
    unsaid = [name for name, one in row.items() if math.isnan(one)]
    if not math.isnan(score.reward):
        row = {name: one for name, one in row.items() if name not in unsaid}
    return row | {
        f"reward/{name}": one for name, one in zip(parts, values, strict=False)
    }


def result_of(row: Mapping[str, Any]) -> str:
    """What a row of `evaluations.jsonl` says: accuracy, or reward, or both."""
    reward, accuracy = row.get("reward"), row.get("accuracy")
    if reward is None or math.isnan(reward):
        return "not finite"
    if accuracy is None:
        return f"reward {reward:.3f}"
    percent = f"{100 * accuracy:.1f} %"
    same = math.isclose(reward, accuracy)
    return percent if same else f"{percent} (reward {reward:.3f})"


def note_answer(
    answers: dict[int, dict[str, Any]],
    task: Task,
    questions: Sequence[Question],
    number: int,
    text: str,
    reward: Any,
) -> None:
    """Keeps what a row of `answers.jsonl` says of one of the first questions."""
    correct = None if math.isnan(reward[1]) else bool(reward[1])
    row = answer_row(task, questions[number].example, text, reward)
    answers[number] = row | {"correct": correct}


def answer_row(task: Task, example: Example, text: str, reward: Any) -> dict[str, Any]:
    """An answer for people: its prompt, its reward, and the right one."""
    return {
        "prompt": prompt_text(task.prompt(example)),
        "answer": text,
        "reward": float(reward[0]),
        "right": right_answer(task, example),
    }


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people: the text, or the user's last message."""
    if isinstance(prompt, str):
        return prompt
    said = [one["content"] for one in prompt if one["role"] == "user"]
    return (said or [prompt[-1]["content"]])[-1]


def right_answer(task: Task, example: Example) -> str | None:
    """The right answer to an example, where its row or its choices say it."""
    if task.choices is not None and task.answer is not None:
        return task.choices(example)[task.answer(example)]
    found = example.get("answer", example.get("solution"))
    return None if found is None else str(found)


def distance_row(
    experiment: Experiment,
    params: PyTree,
    base: PyTree,
    check_stop: Before,
) -> dict[str, Any]:
    """One row of `distances.jsonl`: ‖θ - θ_0‖, by kind of tensor, and KL(base || θ)."""
    row = distance(params, base)._asdict()
    norms, shares = row.pop("norms"), row.pop("moved_shares")
    row |= {f"norm/{kind}": norm for kind, norm in norms.items()}
    row |= {f"moved/{kind}": share for kind, share in shares.items()}
    for name, answers in experiment.base_answers.items():
        check_stop(f"KL of {name}")
        evaluation, _ = experiment.evaluations[name]
        kl = divergence(
            experiment.pretrained.model,
            base,
            params,
            answers,
            batch_size=min(experiment.settings.eval_batch, KL_ROWS),
            buckets=experiment.settings.buckets,
            dtype=evaluation.dtype,
        )
        row |= {f"kl/{name}/{key}": value for key, value in kl._asdict().items()}
    return row


def summarize(experiment: Experiment, generations: int, path: Path) -> dict[str, Any]:
    """The contents of `summary.json`, from the rows in the folder."""
    rows = read_rows(path / "evaluations.jsonl")
    evaluations = {}
    for name in experiment.evaluations:
        of_task = {row["generation"]: row for row in rows if row["task"] == name}
        first, last = of_task[0], of_task[generations]
        evaluations[name] = {
            "before": first.get("accuracy"),
            "after": last.get("accuracy"),
            "lowest": min(row.get("accuracy") or 0 for row in of_task.values()),
            "examples": first["examples"],
            "reward": {"before": first.get("reward"), "after": last.get("reward")},
        }
    metrics = read_rows(path / "metrics.jsonl")
    distances = read_rows(path / "distances.jsonl")
    last = metrics[-1] if metrics else {}
    return {
        "evaluations": evaluations,
        "generations": generations,
        "answers": experiment.answers_a_generation * generations,
        "seconds": sum(row["seconds"] for row in metrics),
        "tokens": sum(row["tokens"] for row in metrics),
        "displacement_norm": last.get("displacement_norm"),
        "displacement_norm_drift": last.get("displacement_norm_drift"),
        "distance": distances[-1] if distances else None,
    }


def finished(settings: Settings, workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None for any other.

    Raises:
      InputError: if the folder is another run's, or a longer one's.
    """
    path = workdir / "summary.json"
    if check(workdir, dataclasses.asdict(settings)) is None or not path.is_file():
        return None
    summary = json.loads(path.read_text())
    check_length(workdir, summary["generations"], settings.generations)
    ended = summary["generations"] == settings.generations or "ended" in summary
    return summary if ended else None


def check_length(workdir: Path, done: int, generations: int) -> None:
    """Raises InputError if a run has more generations than it is to have."""
    if done <= generations:
        return
    text = f"{workdir} has {done} generations, more than {generations}"
    if (workdir / "ledger.jsonl").exists():
        text += (
            f"; an earlier state is rebuilt by: python -m jes.export --run={workdir} "
            f"--out=FOLDER --generations={generations}"
        )
    raise InputError(text)


def report(workdir: Path, summary: Mapping[str, Any]) -> None:
    """Prints what changed and where everything is."""
    for name, one in summary["evaluations"].items():
        before, after = (
            result_of({"accuracy": one[when], "reward": one.get("reward", one)[when]})
            for when in ("before", "after")
        )
        console.print(
            f"{name}: {before} -> {after} on {one['examples']} {_kind(name)} examples"
        )
    show_answer(workdir, summary["generations"])
    console.print(
        f"{summary['generations']} generations in {summary['seconds']:.0f} s; model in "
        f"{workdir / 'model'}, curves in {workdir / 'curves.png'}"
    )


def show_answer(workdir: Path, generations: int) -> None:
    """Prints a held-out prompt with its answers before and after: one that changed."""
    rows = read_rows(workdir / "answers.jsonl")
    before, after = (
        {(row["task"], row["prompt"]): row for row in rows if row["generation"] == at}
        for at in (0, generations)
    )
    pairs = [(before[key], after[key]) for key in before if key in after]
    changed = [pair for pair in pairs if pair[0]["answer"] != pair[1]["answer"]]
    for first, last in (changed or pairs)[:1]:
        right = "" if first["right"] is None else f", right: {first['right']!r}"
        lines = [f"{first['task']}: {first['prompt']!r}{right}"]
        lines += [f"before: {first['answer']!r}", f"after:  {last['answer']!r}"]
        console.print("\n  ".join(lines), markup=False)


def _kind(name: str) -> str:
    return "training" if name.endswith(ON_TRAIN) else "held-out"


def open_ledger(experiment: Experiment, path: Path) -> ledgers.Ledger:
    """The run's ledger, started if there is none.

    Raises:
      InputError: if it is damaged, or starts from another base model.
    """
    settings = experiment.settings
    base = fingerprint(experiment.pretrained.params)
    if not path.exists():
        header = {
            "model": settings.model,
            "quantize": settings.quantize,
            "group_size": settings.group_size,
            "base": base,
            "seed": settings.seed,
            "evolution": dataclasses.asdict(settings.evolution),
            "identity": experiment.identity,
            "dtype": settings.dtype,
            "parameters": experiment.parameters,
            "versions": versions(),
        }
        ledgers.create(path, header)
    try:
        ledger = ledgers.repair(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if ledger.header["base"] != base:
        raise InputError(
            f"{path} starts from other weights than those of {settings.model}"
        )
    return ledger


@contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Makes the folder and locks it against other processes until this one ends.

    A folder that it made and that is still empty in the end is removed.

    Raises:
      InputError: if another process runs in the folder, or it cannot be made.
    """
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{workdir} cannot be the run folder: {error.strerror}"
        ) from None
    folder = os.open(workdir, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is running in {workdir}") from None
        yield
    finally:
        if made and not any(workdir.iterdir()):
            workdir.rmdir()
        os.close(folder)


def check(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json of the folder, where these settings may go on; None for a start.

    Raises:
      InputError: if the folder belongs to a run with other settings, or holds
        something that is not a run.
    """
    record = recorded(workdir)
    if record is None:
        # A run that was killed before `claim` can have left such files.
        # Systems leave files of theirs in folders that are looked at (.DS_Store).
        names = [file.name for file in workdir.iterdir()]
        if any(not (n.endswith(".part") or n.startswith(".")) for n in names):
            raise InputError(
                f"{workdir} is not empty and holds no run: give another --workdir"
            )
        return None
    before = REMOVED | flat_settings(record)
    now = REMOVED | _flat(config)
    may_change = {*MAY_CHANGE, *(["generations"] if config["method"] != "sft" else [])}
    refuse(workdir, before, now, (before.keys() | now.keys()) - may_change)
    return record


def claim(
    workdir: Path,
    config: Mapping[str, Any],
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]],
    identity: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Makes the folder, which exists, that of this run, or finds that it is: `check`.

    Args:
      workdir: the folder.
      config: all settings.
      resolve: chooses where they leave something open; takes what it chose before.
      identity: hashes of what is asked, see `Experiment.identity`.

    Returns:
      What `resolve` chose when the run started, or now if a setting of memory has
      changed.

    Raises:
      InputError: if it is the folder of a run with other settings or questions.
    """
    record = check(workdir, config) or {"config": {}, "versions": versions()}
    known, found = record.get("identity", {}), identity or {}
    other = [name for name in found if known.get(name, found[name]) != found[name]]
    if other and not config.get("accept_changes"):
        raise InputError(
            f"{workdir}: not the same as when the run began: {', '.join(other)}; put "
            "it back, give another folder, or go on with --config.accept_changes=True"
        )
    if found:
        record["identity"] = dict(found)
    before, now = default().to_dict() | record["config"], plain(config)
    changed = any(before.get(name) != now.get(name) for name in MEMORY)
    if changed or "resolved" not in record:
        record["resolved"] = resolve(record.get("resolved", {}))
    if others := changed_since(record["versions"]):
        console.print(
            f"{workdir} was begun with other versions ({others}): steps may differ in "
            f"their last bits; pip install -c {workdir}/constraints.txt -e . goes back"
        )
    write_json(workdir / "config.json", {**record, "config": now})
    if not (others or (workdir / "constraints.txt").exists()):
        (workdir / "constraints.txt").write_text(constraints())
    return record["resolved"]


def claim_results(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes in settings.json what the rows in a folder of results depend on.

    Raises:
      InputError: if there are rows of other settings, by the names that both have.
    """
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = plain(settings)
    refuse(folder, before, now, before.keys() & now.keys())
    write_json(path, before | now)


def refuse(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable
) -> None:
    """Raises InputError, with a list, if any of these settings differ."""
    differing = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} here\n"
        for name in sorted(names)
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(
            f"{folder} belongs to a run with other settings:\n{''.join(differing)}"
            "give another folder, or the same settings"
        )


def recorded(workdir: Path) -> dict[str, Any] | None:
    """The contents of a run's config.json; None where there is none.

    Raises:
      InputError: if it is not one.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        if not {"config", "resolved", "versions"} <= record.keys():
            raise ValueError("entries are missing")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the config of a run ({error})") from error
    return record


def flat_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config.json, by the dotted names of today.

    Settings that are newer than the folder had their defaults then.
    """
    then = _flat(record["config"])
    for old, new in RENAMED.items():
        if isinstance(then.get(old), int):
            then[new] = then.pop(old)
    return _flat(default().to_dict()) | then


def settings_in(record: Mapping[str, Any]) -> Settings:
    """The settings of a run, from its config.json."""
    return freeze(unflatten_dict(flat_settings(record), sep="."))


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back from JSON."""
    return json.loads(json.dumps(config))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, as they come back from JSON, with dotted names."""
    return flatten_dict(plain(config), sep=".")
