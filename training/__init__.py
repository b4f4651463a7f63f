"""Student and router checkpoints: tasks, losses, rollouts, constrained training, evaluation, export."""
