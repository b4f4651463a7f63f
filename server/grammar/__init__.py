"""Structured output with two models: vLLM's own grammars, in the student's engine and in the gateway."""
