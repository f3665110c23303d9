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

    Attributes:
      population: N, members a generation.
      sigma: standard deviation of the perturbation, in units of the weights, or codes.
      alpha: learning rate. For floats the factor 1/σ of the gradient is folded in, so
        it is a length in weight space too (2509.24372, section 3.2). For codes it is
        not: α is that of 2602.03120 Eq. (6), and α/σ is what moves a weight.
      alpha_half_life, sigma_half_life: generations after which α or σ is halved, each
        time; 0 for never. See `at`.
      antithetic: whether members come in pairs θ ± σε.
      shaping: see `jes.shape_fitness`.
      decay: 'none', or the kind of anchored weight decay, 'l2' or 'l1'.
      decay_coefficient: its λ.
      anchor: where the base weights are kept; see `jes.keep_anchor`.
      rounding: how steps of a quantised model are rounded to whole codes, see
        `jes.update.ROUNDINGS`; 'none' for floats.
      residual_decay: γ, of 'replay' and 'residual'.
      window: K, generations that 'replay' goes back.
      residual_dtype: of what 'residual' keeps.
      initial_residual, residual_clip: see `jes.error_feedback`.
      divide_by_population: False leaves out the 1/N of Eq. (5), as the published code
        does; the same as N times the α.
      scale_sigma, scale_alpha: of the scales of a quantised model, in units of these,
        with 1/σ folded in; 0 keeps them frozen.
      distribution, rank: of the noise; see `Noise`.
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
        """The settings in the header of a ledger, under today's names or older ones.

        What an older ledger does not name has its default.

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
