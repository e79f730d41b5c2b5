"""vLLM by itself, for `make bench`: LLM.generate, and its engine core driven directly. A process of its own.

Reads one JSON request a line on stdin, answers one JSON line on stdout:

    {"do": "generate", "prompts": [[token, ...], ...], "max_tokens": 64}   -> {"seconds": .., "tokens": ..}
    {"do": "first_token", "prompt": [token, ...]}                          -> {"seconds": ..}
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from megatoken.process.tree import die_with_parent
from megatoken.worker.engines.vllm.plugins import OWNER_VARIABLE


def generate(llm: Any, params_type: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """One batch through LLM.generate, as a user of vLLM would run it."""
    params = params_type(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    began = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def first_token(llm: Any, params_type: Any, prompt: list[int], number: int) -> dict[str, Any]:
    """From the request's making to its first token, at the engine core's own client."""
    from vllm.inputs import tokens_input

    engine = llm.llm_engine
    params = params_type(max_tokens=1, ignore_eos=True, temperature=0.0)
    began = time.perf_counter()
    request = engine.input_processor.process_inputs(f"ttft-{number}", tokens_input(prompt), params, ("generate",))
    engine.input_processor.assign_request_id(request)
    engine.engine_core.add_request(request)
    while not any(output.new_token_ids for output in engine.engine_core.get_output().outputs):
        pass
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ[OWNER_VARIABLE] = str(os.getpid())  # our vLLM plugin then ties the engine's life to this process
    from vllm import LLM, SamplingParams

    if settings.pop("one_process_engine"):  # the executor that a worker of one rank uses; vLLM's default adds a process
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        settings["distributed_executor_backend"] = UniProcExecutor
    llm = LLM(**settings)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        if asked["do"] == "generate":
            answer = generate(llm, SamplingParams, asked["prompts"], asked["max_tokens"])
        else:
            answer = first_token(llm, SamplingParams, asked["prompt"], number)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    die_with_parent()
    main()
