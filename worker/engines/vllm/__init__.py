"""The real engine: vLLM, its arguments, its requests and its steps."""
