"""The OpenAI-compatible HTTP server in front of a router: vLLM's own serving layer, without an engine behind it.

__main__, config  the process, and what it is told
http              which model's app gets an exchange, what it is refused with: plain ASGI, no vLLM
router_session    the sessions with the router, and which stream number carries which request
vllm              the one package that knows vLLM's internals: an app whose engine core is a client of the router
"""
