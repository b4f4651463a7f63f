"""Additions to vLLM's HTTP server: our fields, keys, limits, routes, and shutdown."""
