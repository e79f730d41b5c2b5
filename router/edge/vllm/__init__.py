"""vLLM's OpenAI layer over a router instead of an engine."""
