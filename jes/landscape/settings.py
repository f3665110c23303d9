"""Every setting of the landscape's probes, with its default (2602.00170, App. G)."""

from ml_collections import ConfigDict

import jes.config


def default() -> ConfigDict:
    """The settings of `jes.train`, and of `jes.probe` and `jes.landscape.spectrum`."""
    config = jes.config.default()
    config.models = ("tiny",)  # folders or hub ids, by size; each is probed

    # Random perturbations, scored on one pool of prompts (2602.00170, Eq. 51 to 54).
    config.probe = ConfigDict()
    config.probe.sigmas = (3e-4, 1e-3, 3e-3)
    config.probe.candidates = 240  # M, perturbations a batch
    config.probe.batches = 5  # S, independent batches
    config.probe.pool = 320  # P, training prompts, the same for all models
    config.probe.pool_seed = 0
    config.probe.fresh = 320  # other training prompts, to score winners anew on
    config.probe.sham_temperature = 0.7  # of the sham, the model sampling; 0 for none

    # Curvature at the model: of the smoothed reward, and of a differentiable surrogate.
    # Its examples are of the training set, drawn by `probe.pool_seed`.
    config.curvature = ConfigDict()
    config.curvature.examples = 64  # of both, with reference answers
    config.curvature.microbatch = 16  # examples whose gradient is taken at once
    config.curvature.probes = 4  # random starts of Lanczos
    config.curvature.steps = 40  # Lanczos steps from each
    config.curvature.top = 20  # eigenvectors of the top subspace
    config.curvature.exact = 5  # eigenvalues found anew by ARPACK; 0 for none
    config.curvature.dense = 3000  # weights up to which the Hessian is taken whole
    config.curvature.sigmas = (3e-4, 1e-3, 3e-3)
    config.curvature.directions = 256  # antithetic pairs of perturbations
    config.curvature.shuffles = 20  # controls, rewards dealt out at random
    config.curvature.extreme = 0.1  # share of the members that are best, or worst

    return config
