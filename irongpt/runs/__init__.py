"""A run's folder: checkpoints, metrics, plots."""
