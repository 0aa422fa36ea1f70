"""The training loop, the step, the optimizers."""
