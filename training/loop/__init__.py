"""The training loop, in one process or many: steps, checkpoints, validation, progress."""
