"""The fine-tuning landscape: its curvature, and what random steps in it find.

From 2602.00170; plain functions on numpy or jax arrays, a module a subject:

- theory: `quadratic` (rise, peak and decay in closed form), `zscored` (what ES with
  z-scored fitness does there), `simulate`, `lyapunov`, `double_well`, `plateaus`;
- measurements: `probes` (random perturbations), `curvature`, `lanczos`, `measures`,
  `subspaces`.

The commands are in `jes.studies`: `probe`, `spectrum` and `rise_then_decay`.
"""

from jes.landscape import (
    curvature,
    double_well,
    lanczos,
    lyapunov,
    measures,
    plateaus,
    probes,
    quadratic,
    simulate,
    subspaces,
    zscored,
)

__all__ = [
    "curvature",
    "double_well",
    "lanczos",
    "lyapunov",
    "measures",
    "plateaus",
    "probes",
    "quadratic",
    "simulate",
    "subspaces",
    "zscored",
]
