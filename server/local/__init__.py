"""A pair of models served on this machine, and what it answers: for the demo, benchmarks and tests."""
