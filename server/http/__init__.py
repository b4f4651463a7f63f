"""What is around vLLM's HTTP server: our fields, keys, limits, routes, and how it ends."""
