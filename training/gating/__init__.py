"""The router over a frozen pair: closed-loop rollouts, what the gate is taught, its prices."""
