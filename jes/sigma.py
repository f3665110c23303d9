"""`config.sigma = 0`, or 'auto': σ by trial, before a run begins.

A few members answer the prompts of the first generation, at every σ of a ladder with
the same noise, in the programs that the run goes on with. What is learned from a member
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
      InputError: if members earn the same at every σ.
    """
    settings = experiment.settings
    most = int(SHARE * settings.generations * settings.population / len(LADDER))
    members = min(max(most, FEWEST), MOST)
    base, own = trial_rewards(experiment, chunk, members)
    sigma = sigma_of(base, own)
    alpha = sigma / 2 * (settings.population / 30) ** 0.5
    asked = 1 + members * len(LADDER)
    return Rates(float(f"{sigma:.3g}"), float(f"{alpha:.3g}"), asked)


def trial_rewards(
    experiment: Experiment, chunk: int, members: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of the centre [B], and of so many members at each σ: [σ, M, B]."""
    evaluation, params = experiment.evaluation, experiment.pretrained.params
    key, questions = generation_key(experiment.settings.root, 0), pick(experiment, 0)
    rollout = prepare_rollout(evaluation, params, experiment.evolution.noise)
    batch = batch_of(evaluation, questions)
    # The centre is the first, as a member with σ = 0.
    numbers = np.concatenate([[0], np.tile(np.arange(members), len(LADDER))])
    sigmas = np.concatenate([[0.0], np.repeat(LADDER, members)])
    rewards = evaluate(
        lambda some: answer(rollout, key, numbers[some], batch, sigmas[some]),
        lambda out: answer_rewards(evaluation, questions, batch, out)[..., 0],
        np.arange(len(numbers)),
        chunk * devices_of(params),
    )
    return rewards[0], rewards[1:].reshape(len(LADDER), members, -1)


def sigma_of(base: np.ndarray, own: np.ndarray) -> float:
    """The largest σ at which rewards change as little as they may, see above.

    Between two σ of the ladder it is interpolated, in logarithms; below the first and
    beyond the last there is none. At the least it sets some members apart.

    Args:
      base: of the centre, for each prompt [B].
      own: of members at each σ, with the same noise: [σ, M, B].

    Raises:
      InputError: if all members earn the same at every σ.
    """
    own = np.where(np.isfinite(own), own, np.nan)
    apart = np.flatnonzero(own.mean(-1).std(-1) > 0)
    if not len(apart):
        raise InputError(
            f"sigma='auto': with sigma from {LADDER[0]:g} to {LADDER[-1]:g} all "
            "members earned the same; more prompts, or a reward that gives part of "
            "the credit, would set them apart; or set sigma"
        )
    every = np.sort(np.append(own[np.isfinite(own)], base))
    # The mean of |x - y| over all pairs, from the sorted values.
    ranks = 2 * np.arange(len(every)) - len(every) + 1
    typical = 2 * (ranks * every).sum() / len(every) ** 2
    changes = np.nan_to_num(abs(own - base).mean((1, 2)) / typical, nan=np.inf)
    changes = np.maximum.accumulate(changes)
    within = np.searchsorted(changes, CHANGE, "right")
    steps = np.arange(len(LADDER))
    if within == 0:
        step = 0.0
    elif within == len(LADDER) or not np.isfinite(changes[within]):
        step = within - 1.0
    else:
        step = np.interp(CHANGE, changes[: within + 1], steps[: within + 1])
    return LADDER[0] * 2.0 ** max(step, apart[0])
