"""Layout of a gate's features, shared by all code that computes them."""

TOP_LOG_PROBS = 8
"""Number of log-probabilities of the best tokens; entropy and margin follow them."""
LOG_PROB_FLOOR = -30.0
"""Least log-probability in a feature: a masked token's is -inf, but features must be finite."""
N_CONFIDENCE = TOP_LOG_PROBS + 2
