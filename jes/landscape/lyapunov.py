r"""Noise that is not the same in all directions (2602.00170, App. C).

:math:`x_{t+1} = (I - \alpha H) x_t + \alpha \eta_t` with :math:`Cov\,\eta = \Sigma`
(Eq. 30). H is the curvature of the loss, the paper's C: positive, and of any basis.
"""

import numpy as np
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov

from jes.errors import InputError


def step(
    covariance: np.ndarray, curvature: np.ndarray, noise: np.ndarray, alpha: float
) -> np.ndarray:
    """The covariance of x one generation later (Eq. 31); all are [d, d]."""
    kept = np.eye(len(curvature)) - alpha * curvature
    return kept @ covariance @ kept.T + alpha**2 * noise


def stationary_covariance(
    curvature: np.ndarray, noise: np.ndarray, alpha: float
) -> np.ndarray:
    """V that Eq. (31) leaves as it is: exact for any α.

    Args:
      curvature: H, [d, d].
      noise: Σ, [d, d], covariance of the noise of one estimate.
      alpha: learning rate.

    Returns:
      [d, d].

    Raises:
      InputError: where there is none: a flat, a concave or an overshooting direction
        (near a saddle a plateau is transient, App. D).
    """
    kept = np.eye(len(curvature)) - alpha * curvature
    radius = np.abs(np.linalg.eigvals(kept)).max()
    if radius >= 1:
        raise InputError(
            f"no stationary state: a direction grows by {radius:.6g} a generation"
        )
    return solve_discrete_lyapunov(kept, alpha**2 * noise)


def small_step_covariance(
    curvature: np.ndarray, noise: np.ndarray, alpha: float
) -> np.ndarray:
    """V of H V + V Hᵀ = α Σ, the limit of short steps (Eq. 32)."""
    return solve_continuous_lyapunov(curvature, alpha * noise)


def plateau_gap(curvature: np.ndarray, covariance: np.ndarray) -> float:
    """J* - E J = tr(H V) / 2 (Eq. 33)."""
    return float(np.trace(curvature @ covariance) / 2)
