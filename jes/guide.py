"""Warnings of a run that learns nothing or goes astray, each once, with what to do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jes.config import Settings
from jes.io import hosts
from jes.io.console import console
from jes.io.metrics import read_rows

EARLY = 20
"""Generations before which a drift is too short to speak of."""
NOISE_ALONE = 1.05
"""A step this many times that of noise alone, at most, shows no signal."""


class Guide:
    """Says what a run should be told, once."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.said = settings, set[str]()
        self.last: Mapping[str, Any] = {}
        if settings.method == "es" and settings.population == 1:
            self.say(
                "one_member",
                "population=1: one member is compared with nothing, "
                "and no weight will move; 16 to 64 are usual",
            )

    def say(self, name: str, text: str) -> None:
        """Prints a warning, unless it was printed before."""
        if name not in self.said and hosts.first():
            console.print(f"[yellow]warning: {text}[/yellow]")
        self.said.add(name)

    def of_generation(self, row: Mapping[str, Any]) -> None:
        """Looks at a row of `metrics.jsonl`."""
        self.last = row
        at = f"generation {row['generation']}"
        if row.get("fitness_std") == 0 and self.settings.population > 1:
            self.say(
                "no_spread",
                f"{at}: all members earned {row['fitness_mean']:g}, and "
                "from equal rewards nothing is learned; a larger sigma, more "
                "prompts, or a reward that gives part of the credit sets them apart",
            )
        if row.get("truncated") == 1:
            self.say(
                "cut_off",
                f"{at}: every answer was cut off before its end; a larger "
                "max_new_tokens, or a prompt that asks for short answers, helps",
            )
        if row.get("members_dropped"):
            self.say(
                "dropped",
                f"{at}: {row['members_dropped']} members were left out: "
                "their reward was not finite, or their weights overflowed (a smaller "
                "sigma, or dtype bfloat16 in place of float16)",
            )

    def of_evaluations(self, workdir: Path) -> None:
        """Looks at the held-out reward of the task that is trained, and the drift."""
        rows = read_rows(workdir / "evaluations.jsonl")
        rows = [row for row in rows if row["task"] == self.settings.task]
        if len(rows) < 2 or None in (rows[-1].get("reward"), rows[0].get("reward")):
            return
        gained = rows[-1]["reward"] - rows[0]["reward"]
        error = rows[-1].get("reward_error") or 0.0, rows[0].get("reward_error") or 0.0
        both = (error[0] ** 2 + error[1] ** 2) ** 0.5
        after = f"after {rows[-1]['generation']} generations"
        if gained < -2 * both:
            self.say(
                "worse",
                f"{after} the held-out reward is {rows[-1]['reward']:.3g}, "
                f"more than two standard errors below the {rows[0]['reward']:.3g} of "
                "the start; a smaller alpha, more members, or decay='l2' helps",
            )
        names = "displacement_norm", "displacement_norm_drift"
        moved, walked = (self.last.get(name) for name in names)
        late = rows[-1]["generation"] >= EARLY
        if moved and walked and late and gained < both and moved < NOISE_ALONE * walked:
            self.say(
                "drift",
                f"{after} the weights have moved as far as noise alone takes "
                f"them ({moved:.3g} of {walked:.3g}), and the held-out reward has not "
                "changed beyond its error; noise moves them by alpha/sqrt(population) "
                "a generation: keep that, or lower it, when you change either",
            )
