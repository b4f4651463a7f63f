"""The gateway: vLLM's OpenAI server over two models that write one answer."""
