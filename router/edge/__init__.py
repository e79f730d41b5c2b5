"""The OpenAI-compatible HTTP door in front of a router: vLLM's own serving layer, without an engine behind it.

__main__      the process: config, sockets, uvicorn, signals
config        what the process is told
dispatch      which model's app gets an HTTP request; /v1/models, /health, /metrics over all of them
refusals      turns an error that comes before the first token of a stream into its HTTP status
vllm_layer    the one module that knows vLLM's internals: an app whose engine core is a client of the router
sampling      vLLM's SamplingParams -> the contract's
outcomes      the contract's Finish -> how vLLM says that a request ended or failed
streams       which stream number of the session carries which request
"""
