"""Quality against realised teacher rate, compared with the baselines."""
