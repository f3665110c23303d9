"""What a run writes and shows: checkpoints, metrics, progress, plots."""
