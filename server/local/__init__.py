"""Runs and measures a pair on this machine, for the demo, benchmarks and tests."""
