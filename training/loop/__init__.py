"""The training loop, on one process or many: steps, checkpoints, validation, progress."""
