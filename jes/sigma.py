"""`config.sigma = 0`, or 'auto': σ by trial, before a run begins.

A few members answer the prompts of some generations, at every σ of a ladder with the
same noise, in the programs that the run goes on with. σ is the largest at which they
keep what the centre earns: what a member loses against it, in the mean over the prompts
and 0 where it gains, is `LOSS` of the mean difference between two rewards of the trial.
That does not depend on the scale of rewards, as the z-scores of the update do not, and
is steadier than the mean of so few members. Nor may the mean fall so far below that of
a smaller σ, which matters where the centre has little to lose; and where the spread
between members is largest at a smaller σ, that one is taken: beyond it they are all the
same, broken.

α follows, in the proportion of 2509.24372 (α = σ/2 at N = 30), with α/√N kept: steps of
noise alone are then as long, relative to σ, whatever the population.
"""

from typing import NamedTuple

import numpy as np

from jes.core.mesh import mesh_of
from jes.core.noise import generation_key
from jes.core.population import evaluate
from jes.errors import InputError
from jes.experiment import Experiment, pick
from jes.memory import devices_of
from jes.questions import batch_of
from jes.rollout import answer, prepare_rollout
from jes.scoring import answer_rewards

LADDER = tuple(0.0005 * 2.0**step for step in range(8))
"""What is tried: from 0.0005 to 0.064."""
LOSS = 0.27
"""What members may lose."""
SHARE = 0.04
"""Of the members that a run asks, as many may be asked in the trial."""
FEWEST, MOST = 2, 24
"""Members at each sigma."""


class Choice(NamedTuple):
    """What is chosen, and how many members were asked for it."""

    sigma: float
    alpha: float
    asked: int


def choose_rates(experiment: Experiment, chunk: int) -> Choice:
    """σ by trial, and the α that goes with it; `chunk` as in the run.

    Raises:
      InputError: if no σ changes a reward.
    """
    settings = experiment.settings
    most = SHARE * settings.generations * settings.population / (len(LADDER) + 1)
    members = min(max(round(most), FEWEST), MOST)
    base, own = trial_rewards(experiment, chunk, members)
    sigma = sigma_of(base, own)
    alpha = alpha_for(sigma, settings.population)
    asked = members * (len(LADDER) + 1)  # at most
    return Choice(float(f"{sigma:.3g}"), float(f"{alpha:.3g}"), asked)


def alpha_for(sigma: float, population: int) -> float:
    """The α that goes with σ: σ/2 for 30 members, as published, and α/√N kept."""
    return sigma / 2 * (population / 30) ** 0.5


def trial_rewards(
    experiment: Experiment, chunk: int, members: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of the centre [M, B], and of so many members at each σ, [σ, M, B].

    As many members as a chunk holds at every σ answer the prompts of one generation,
    the next ones those of another; the centre answers all of them.
    """
    evaluation, params = experiment.evaluation, experiment.pretrained.params
    key = generation_key(experiment.settings.root, 0)
    noise, mesh = experiment.evolution.noise, mesh_of(params)
    rollout = prepare_rollout(evaluation, params, noise, mesh)
    at_once = chunk * devices_of(params)
    together = max(1, (at_once - 1) // len(LADDER))
    if experiment.prompts == len(experiment.train):  # the same in all generations
        together = members

    def rewards_of(batch_number: int) -> tuple[np.ndarray, np.ndarray]:
        questions = pick(experiment, batch_number)
        batch = batch_of(evaluation, questions)
        own = np.arange(members)[batch_number * together :][:together]
        # The centre is the first, as a member with σ = 0.
        numbers = np.concatenate([[0], np.tile(own, len(LADDER))])
        sigmas = np.concatenate([[0.0], np.repeat(LADDER, len(own))])
        rewards = evaluate(
            lambda some: answer(rollout, key, numbers[some], batch, sigmas[some]),
            lambda out: answer_rewards(evaluation, questions, batch, out)[..., 0],
            np.arange(len(numbers)),
            at_once,
        )
        shape = len(LADDER), len(own), len(questions)
        return np.tile(rewards[0], (len(own), 1)), rewards[1:].reshape(shape)

    base, own = zip(*map(rewards_of, range(-(-members // together))), strict=True)
    return np.concatenate(base), np.concatenate(own, 1)


def sigma_of(base: np.ndarray, own: np.ndarray) -> float:
    """The largest σ at which members lose as little as they may, see above.

    Between two σ of the ladder it is interpolated, in logarithms; below the first and
    beyond the last there is none. At the least it changes some reward.

    Args:
      base: of the centre, for each prompt of each member [M, B].
      own: of members at each σ, with the same noise: [σ, M, B].

    Raises:
      InputError: if no σ changes a reward.
    """
    gains = np.where(np.isfinite(own), own - base, np.nan)
    changed = np.flatnonzero((gains != 0).any((1, 2)))
    if not len(changed):
        raise InputError(
            f"sigma='auto': no sigma from {LADDER[0]:g} to {LADDER[-1]:g} changed a "
            "reward; more prompts, or a reward that gives part of the credit, would "
            "set members apart; or set sigma"
        )
    every = np.sort(np.append(own[np.isfinite(own)], base))
    # The mean of |x - y| over all pairs, from the sorted values.
    ranks = 2 * np.arange(len(every)) - len(every) + 1
    typical = 2 * (ranks * every).sum() / len(every) ** 2
    losses, mean = np.maximum(-gains, 0).mean((1, 2)), gains.mean((1, 2))
    # The centre may have little to lose: neither may they fall below a smaller σ.
    fallen = np.fmax.accumulate(np.fmax(mean, 0)) - mean
    losses = np.maximum(losses, fallen) / typical
    kept = int(np.max(np.flatnonzero(losses <= LOSS), initial=-1))
    step = max(kept, 0.0)
    if 0 <= kept < len(LADDER) - 1 and np.isfinite(losses[kept + 1]):
        step += (LOSS - losses[kept]) / (losses[kept + 1] - losses[kept])
    spread = np.nan_to_num(gains.mean(-1).std(-1), nan=-1.0)
    step = min(step, float(np.argmax(spread)))
    return LADDER[0] * 2.0 ** max(step, changed[0])
