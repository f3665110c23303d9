"""The fine-tuning landscape: its curvature, and what random steps in it find.

From 2602.00170; plain functions on numpy or jax arrays, a module a subject:

- theory: `quadratic` (rise, peak and decay in closed form, and simulations), `zscored`
  (a mean field for ES with z-scored fitness), `double_well`, `plateaus`;
- measurements: `probes` (random perturbations), `curvature`, `lanczos`.

The commands are in `jes.studies`: `probe`, `spectrum` and `rise_then_decay`.
"""

# ruff: noqa: F401

from jes.landscape import (
    curvature,
    double_well,
    lanczos,
    plateaus,
    probes,
    quadratic,
    zscored,
)
