"""What a model knows of what it knows: its Yes and No against its own correctness."""

from jes.metacognition.signal_detection import (
    CORRECTIONS,
    Counts,
    accuracy,
    alignment,
    auroc2,
    best_threshold,
    bootstrap,
    counts,
    criterion,
    d_prime,
    d_prime_error,
    no_failure_rate,
    relative_meta_information,
    report,
    yes_failure_rate,
    yes_rate,
)

__all__ = [
    "CORRECTIONS",
    "Counts",
    "accuracy",
    "alignment",
    "auroc2",
    "best_threshold",
    "bootstrap",
    "counts",
    "criterion",
    "d_prime",
    "d_prime_error",
    "no_failure_rate",
    "relative_meta_information",
    "report",
    "yes_failure_rate",
    "yes_rate",
]
