"""The data plane: one process that balances token requests over worker replicas and streams their tokens back.

docs/router.md tells the whole; `python -m megatoken.router --config FILE` starts one.
"""
