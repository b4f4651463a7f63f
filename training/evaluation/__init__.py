"""Quality against realised teacher rate, beside the baselines."""
