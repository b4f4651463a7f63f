"""The gateway: vLLM's OpenAI server with two models that write one answer."""
