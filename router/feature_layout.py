"""What a gate's features are made of, for all that compute them."""

TOP_LOG_PROBS = 8
"""Log-probabilities of the best tokens, before entropy and margin."""
LOG_PROB_FLOOR = -30.0
"""A masked token's log-probability is -inf; a feature must be finite."""
N_CONFIDENCE = TOP_LOG_PROBS + 2
