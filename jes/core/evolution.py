"""The settings of the evolution strategy."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jes.core.noise import Noise
from jes.core.whole_numbers import unit_for

RENAMED = {"law": "distribution"}
"""Names of settings in older ledgers -> today's."""
SCHEDULES = ("alpha_half_life", "sigma_half_life", "alpha_cosine", "sigma_cosine")
"""Settings, in generations, that change alpha or sigma on the way; 0 for never."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """What the update depends on beside keys and fitness; kept in the ledger's header.

    `jes.config` says what each setting means; `distribution` is its `noise`. For floats
    α is a length in weight space: the factor 1/σ of the gradient is folded in
    (2509.24372, section 3.2). For codes it is that of 2602.03120 Eq. (6), and α/σ is
    what moves a weight. `unit` is that of whole numbers; 0 for that of α.
    """

    population: int
    sigma: float
    alpha: float
    alpha_half_life: int = 0
    sigma_half_life: int = 0
    alpha_cosine: int = 0
    sigma_cosine: int = 0
    cosine_floor: float = 0.1
    antithetic: bool = False
    shaping: str = "zscore"
    decay: str = "none"
    decay_coefficient: float = 0.0
    anchor: str = "device"
    rounding: str = "none"
    residual_decay: float = 0.9
    window: int = 50
    residual_dtype: str = "float32"
    initial_residual: str = "zero"
    residual_clip: float = 0.0
    divide_by_population: bool = True
    scale_sigma: float = 0.0
    scale_alpha: float = 0.0
    distribution: str = "normal"
    rank: int = 0
    unit: float = 0.0

    @classmethod
    def from_header(cls, settings: Mapping[str, Any]) -> "Evolution":
        """The settings in the header of a ledger, also of an older one.

        Raises:
          TypeError: for a name that is not known, of a later version of jes.
        """
        return cls(**{RENAMED.get(name, name): settings[name] for name in settings})

    def at(self, generation: int) -> "Evolution":
        """The settings of a generation.

        For floats, nothing is compiled anew for another α or σ; for codes, all is.
        """
        rates = (
            (self.alpha, self.alpha_half_life, self.alpha_cosine),
            (self.sigma, self.sigma_half_life, self.sigma_cosine),
        )
        alpha, sigma = (
            value * self._share(generation, half_life, cosine)
            for value, half_life, cosine in rates
        )
        unit = self.whole_unit if self.whole_numbers else 0.0
        return dataclasses.replace(self, alpha=alpha, sigma=sigma, unit=unit)

    def _share(self, generation: int, half_life: int, cosine: int) -> float:
        """What is left of α or σ in a generation."""
        share = 0.5 ** (generation // half_life if half_life else 0)
        if cosine:
            fallen = (1 - math.cos(math.pi * min(1.0, generation / cosine))) / 2
            share *= 1 - (1 - self.cosine_floor) * fallen
        return share

    @property
    def changes(self) -> bool:
        """Whether α or σ changes from generation to generation."""
        return any(getattr(self, name) for name in SCHEDULES)

    def squared_steps(self, generations: int) -> float:
        """The sum of (α_t / α_0)² over so many generations."""
        shares = (
            self._share(generation, self.alpha_half_life, self.alpha_cosine)
            for generation in range(generations)
        )
        return sum(share**2 for share in shares)

    @property
    def whole_numbers(self) -> bool:
        """Whether the centre moves in whole numbers; see `jes.core.whole_numbers`."""
        return self.distribution == "sign" and self.rounding == "none"

    @property
    def whole_unit(self) -> float:
        """The length in weight space of a displacement of 1."""
        return self.unit or unit_for(self.alpha, self.population)

    @property
    def noise(self) -> Noise:
        """How members differ from the centre."""
        return Noise(
            sigma=self.sigma,
            antithetic=self.antithetic,
            rounds=2 if self.rounding == "quzo" else 1,
            scale_sigma=self.scale_sigma,
            distribution=self.distribution,
            rank=self.rank,
        )

    @property
    def rate(self) -> float:
        """The factor from the mean of fitness times noise to the step."""
        if self.rounding == "none":
            return self.alpha
        mean = 1 if self.divide_by_population else self.population
        return self.alpha / self.sigma * mean
