"""Measures quality against realised teacher rate, and compares it with baselines."""
