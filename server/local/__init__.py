"""What a pair answers that is served on this machine: for the demo, benchmarks and tests."""
