r"""The forgetting study of 2605.30148: methods and seeds, then a table and figures.

    python -m jes.forgetting --config=configs/forgetting_tiny.py:quick
    python -m jes.forgetting --config=configs/forgetting_tiny.py --seeds=0,1,2 \
        --methods=es,l2:1,l1:0.02,n:128,grpo:1e-5 --workdir=runs/study --out=RESULTS

The config is one of `jes.train`: the target task, the prior tasks (`eval_tasks`), how
long. Every method and seed is a run of its own in `WORKDIR/METHOD/seed-S`; stopped at
any moment, the same command goes on. The methods:

    es            plain evolution strategies
    l2:λ  l1:λ    the same with anchored weight decay
    n:N           a population of N for as many generations
    answers:N     a population of N for as many answers in all
    shuffled      rewards dealt out at random: a walk of the same length
    replay[:K:γ]  of a quantised model: the residual of rounding replayed over K
                  generations with decay γ, by default as the config says
    residual[:γ]  the same, kept
    naive  quzo   rounding without a residual, and QuZO
    rate:FACTOR   so many times the learning rate, with another: quzo+rate:0.5
    half_alpha:G  α halved every G generations; half_sigma:G, the same of σ
    grpo:RATE     the policy gradient, as many prompts and answers a generation, for
                  as many generations, or grpo:RATE:ITERATIONS

And what follows from finished runs, for every decay and for GRPO: the result of plain
ES shrunk towards the start to their norm, and ES stopped early at their accuracy on
the target. `--chain=TASK,TASK,...` studies tasks learned one after another instead:
each stage starts from the model of the one before and is anchored there.
"""

from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from jes import train
from jes.config import freeze
from jes.errors import InputError
from jes.experiment import make_experiment
from jes.forgetting.chain import chain_report, run_chain
from jes.forgetting.methods import (
    folder_of,
    is_finished,
    matched,
    method_config,
    summary_of,
)
from jes.forgetting.report import study_report
from jes.io import command_line, memory
from jes.io.console import console
from jes.io.metrics import write_json
from jes.models.weights import load
from jes.rollout import examine

METHODS = "es,l2:1,l1:0.02,answers:128,shuffled,grpo:1e-5"
"""Of the quick form."""


def run_all(
    base: ml_collections.ConfigDict,
    methods: list[str],
    seeds: list[int],
    workdir: Path,
) -> None:
    """Runs what is not finished: seed by seed, so that a part is a whole study too."""
    # All settings are looked at before the first run, which may take long.
    configs = {(m, s): method_config(base, m, s) for s in seeds for m in methods}
    for config in configs.values():
        freeze(config)
    for number, ((method, seed), config) in enumerate(configs.items(), 1):
        folder = folder_of(workdir, method, seed)
        if is_finished(config, folder):
            continue
        console.print(f"run {number} of {len(configs)}: {method}, seed {seed}")
        train.run(config, folder)


def shrink_all(
    base: ml_collections.ConfigDict,
    methods: list[str],
    seeds: list[int],
    workdir: Path,
) -> None:
    """Evaluates plain ES moved back towards the start, to the norm of other methods."""
    to = matched(base, methods)
    if not to:
        return
    for seed in seeds:
        config = method_config(base, "es", seed)
        config.kl_prompts = 0  # nothing of it is measured here
        paths = {m: folder_of(workdir, f"shrunk to {m}", seed) for m in to}
        missing = {m: p for m, p in paths.items() if not (p / "summary.json").is_file()}
        if not missing:
            continue
        experiment = make_experiment(freeze(config))
        tuned = load(folder_of(workdir, "es", seed) / "model").params
        far = summary_of(workdir, "es", seed)["displacement_norm"]
        for method, folder in missing.items():
            norm = summary_of(workdir, method, seed)["displacement_norm"]
            share = min(1.0, norm / far)
            params = jax.tree.map(
                lambda start, end, share=share: start + share * (end - start),
                experiment.pretrained.params,
                tuned,
            )
            folder.mkdir(parents=True, exist_ok=True)
            write_json(
                folder / "summary.json", examined(experiment, params, share * far)
            )


def examined(experiment: Any, params: Any, norm: float) -> dict[str, Any]:
    """Accuracies of weights that no run has come to, as a summary has them."""
    evaluations = {}
    for name, (evaluation, questions) in experiment.evaluations.items():
        size = experiment.settings.eval_batch
        score = examine(evaluation, params, questions, batch_size=size)
        evaluations[name] = {"after": score.accuracy, "examples": len(questions)}
    return {"evaluations": evaluations, "displacement_norm": norm}


def main() -> None:
    """The command line."""
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Settings of a run: a file in configs/.", lock_config=True
    )
    flags.DEFINE_string("workdir", "", "Of all runs; by default runs/<config>_study.")
    flags.DEFINE_string("out", "", "Of tables and figures; by default the workdir.")
    flags.DEFINE_string("methods", METHODS, "Comma-separated.")
    flags.DEFINE_string("seeds", "0", "Comma-separated.")
    flags.DEFINE_string("chain", "", "Tasks to learn one after another.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected {' '.join(argv[1:])!r}")
        memory.give_back_freed_blocks()
        values = flags.FLAGS
        config = config_flag.value
        if config.anchor == "none":
            raise InputError("the study measures distances: anchor='none' cannot be")
        if not config.eval_tasks:
            raise InputError("the study needs prior tasks: eval_tasks is empty")
        methods = split(values.methods, "methods")
        seeds = [whole(seed) for seed in split(values.seeds, "seeds")]
        workdir, out = folders(values, "chain" if values.chain else "study")
        if values.chain:
            tasks = split(values.chain, "chain")
            run_chain(config, tasks, methods, seeds, workdir)
            chain_report(config, tasks, methods, seeds, workdir, out)
        else:
            run_all(config, methods, seeds, workdir)
            shrink_all(config, methods, seeds, workdir)
            study_report(config, methods, seeds, workdir, out)

    command_line.start(command)


def folders(values: flags.FlagValues, kind: str) -> tuple[Path, Path]:
    """Where the runs of a study are, and where its report goes, which is made."""
    workdir = Path(values.workdir or f"runs/{command_line.config_name()}_{kind}")
    out = Path(values.out or workdir)
    out.mkdir(parents=True, exist_ok=True)
    return workdir, out


def split(text: str, name: str) -> list[str]:
    """The parts of a comma-separated flag; none may be empty or stand twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise InputError(f"--{name}={text}: an entry is empty or stands twice")
    return parts


def whole(text: str) -> int:
    """A seed."""
    if not text.isdecimal():
        raise InputError(f"--seeds: {text!r} is not a whole number")
    return int(text)


if __name__ == "__main__":
    main()
