"""Trains the router of a frozen pair: closed-loop rollouts, the gate's lessons, its fit and its prices."""
