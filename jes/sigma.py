"""`config.sigma = 0`, or 'auto': σ by trial, before a run begins.

A few members answer the prompts of some generations, at every σ of a ladder with the
same noise, in the programs that the run goes on with. What is learned from a member
holds for the centre as far as the two still answer alike. So σ is the largest at which
rewards do: the mean difference between the rewards of a member and of the centre, for
the same prompt, is `CHANGE` of the mean difference between any two rewards of the
trial. That does not depend on the scale of rewards, as the z-scores of the update do
not, and is steadier than the mean or the spread of so few members.

α follows, in the proportion of 2509.24372 (α = σ/2 at N = 30), with α/√N kept: steps of
noise alone are then as long, relative to σ, whatever the population.
"""

from typing import NamedTuple

import numpy as np

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
CHANGE = 0.4
"""How far rewards may change."""
SHARE = 0.04
"""Of the members that a run asks, as many may be asked in the trial."""
FEWEST, MOST = 2, 24
"""Members at each sigma."""


class Rates(NamedTuple):
    """What is chosen, and how many members were asked for it."""

    sigma: float
    alpha: float
    asked: int


def choose_rates(experiment: Experiment, chunk: int) -> Rates:
    """σ by trial, and the α that goes with it; `chunk` as in the run.

    Raises:
      InputError: if no σ changes a reward.
    """
    settings = experiment.settings
    most = int(SHARE * settings.generations * settings.population / (len(LADDER) + 1))
    base, own = trial_rewards(experiment, chunk, min(max(most, FEWEST), MOST))
    sigma = sigma_of(base, own)
    alpha = sigma / 2 * (settings.population / 30) ** 0.5
    asked = own.shape[1] * (len(LADDER) + 1)
    return Rates(float(f"{sigma:.3g}"), float(f"{alpha:.3g}"), asked)


def trial_rewards(
    experiment: Experiment, chunk: int, members: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of the centre [M, B], and of so many members at each σ, [σ, M, B].

    As many members as a chunk holds at every σ answer the prompts of one generation,
    the next ones those of another.
    """
    evaluation, params = experiment.evaluation, experiment.pretrained.params
    key = generation_key(experiment.settings.root, 0)
    rollout = prepare_rollout(evaluation, params, experiment.evolution.noise)
    at_once = chunk * devices_of(params)
    together = max(1, (at_once - 1) // len(LADDER))

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
    """The largest σ at which rewards change as little as they may, see above.

    Between two σ of the ladder it is interpolated, in logarithms; below the first and
    beyond the last there is none. At the least it changes some reward.

    Args:
      base: of the centre, for each prompt of each member [M, B].
      own: of members at each σ, with the same noise: [σ, M, B].

    Raises:
      InputError: if no σ changes a reward.
    """
    own = np.where(np.isfinite(own), own, np.nan)
    changed = np.flatnonzero((own != base).any((1, 2)))
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
    changes = np.nan_to_num(abs(own - base).mean((1, 2)) / typical, nan=np.inf)
    changes = np.maximum.accumulate(changes)
    within = int(np.searchsorted(changes, CHANGE, "right"))
    step = max(within - 1.0, 0.0)
    if 0 < within < len(LADDER) and np.isfinite(changes[within]):
        steps = np.arange(within - 1.0, len(LADDER))
        step = np.interp(CHANGE, changes[within - 1 :], steps)
    return LADDER[0] * 2.0 ** max(step, changed[0])
