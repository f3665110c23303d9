"""The settings of the evolution strategy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jes.core.noise import Noise

RENAMED = {"law": "distribution"}
"""Names of settings in older ledgers -> today's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
    """What the update depends on beside keys and fitness; kept in the ledger's header.

    `jes.config` says what each setting means; `distribution` is its `noise`. For floats
    α is a length in weight space: the factor 1/σ of the gradient is folded in
    (2509.24372, section 3.2). For codes it is that of 2602.03120 Eq. (6), and α/σ is
    what moves a weight.
    """

    population: int
    sigma: float
    alpha: float
    alpha_half_life: int = 0
    sigma_half_life: int = 0
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

    @classmethod
    def from_header(cls, settings: Mapping[str, Any]) -> "Evolution":
        """The settings in the header of a ledger, also of an older one.

        Raises:
          TypeError: for a name that is not known, of a later version of jes.
        """
        return cls(**{RENAMED.get(name, name): settings[name] for name in settings})

    def at(self, generation: int) -> "Evolution":
        """The settings of a generation; each new α or σ is compiled anew."""
        alpha, sigma = (
            value * 0.5 ** (generation // half_life if half_life else 0)
            for value, half_life in (
                (self.alpha, self.alpha_half_life),
                (self.sigma, self.sigma_half_life),
            )
        )
        return dataclasses.replace(self, alpha=alpha, sigma=sigma)

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
