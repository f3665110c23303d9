"""What a model knows of what it knows: its Yes and No against its own correctness."""

# ruff: noqa: F401 (names for `jes.metacognition`)
from jes.metacognition.masks import (
    exclude,
    keep_largest,
    keep_like,
    keep_random,
    keep_random_by_tensor,
    keep_smallest,
    norm_share,
    random_walk,
    rescale,
    shrink,
)
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
