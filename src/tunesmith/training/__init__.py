"""Training: settings, batch plan, the training loop, checkpoints, estimates, and the spec and result of a training."""
