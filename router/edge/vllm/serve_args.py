"""The `vllm serve` command line that stands for one EdgeModel, so that vLLM itself checks and completes every argument.

Pure. Called by vllm.layer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from megatoken.errors import RequestError
from megatoken.router.edge.config import EdgeModel

BUILTIN: Final = "builtin:"
# What the edge settles itself, or what needs an engine in the process.
OWN: Final = frozenset(
    {
        "model", "served_model_name", "host", "port", "api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "uds",
        "disable_log_stats", "api_server_count", "data_parallel_size", "tensor_parallel_size", "headless", "grpc",
    }
)  # fmt: skip


def serve_arguments(model: EdgeModel) -> list[str]:
    """The arguments. Raises RequestError for one that the edge settles itself."""
    arguments = ["--model", local_source(model.source), "--served-model-name", *model.names]
    arguments += ["--dtype", model.dtype, "--disable-log-stats", "--enable-prompt-tokens-details"]
    if model.max_model_len is not None:
        arguments += ["--max-model-len", str(model.max_model_len)]
    if model.chat_template is not None:
        arguments += ["--chat-template", model.chat_template]
    if model.tool_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", model.tool_parser]
    if model.reasoning_parser is not None:
        arguments += ["--reasoning-parser", model.reasoning_parser]
    if model.trust_remote_code:
        arguments.append("--trust-remote-code")
    for name, value in model.extra_args.items():
        arguments += one_argument(name, value)
    return arguments


def one_argument(name: str, value: Any) -> list[str]:
    """One extra argument as `vllm serve` spells it."""
    plain = name.lstrip("-").replace("-", "_")
    if plain in OWN:
        raise RequestError("models.extra_args", name, "the edge sets it itself; leave it out")
    flag = "--" + plain.replace("_", "-")
    if value is True:
        return [flag]
    if value is False:
        return ["--no-" + flag[2:]]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *(json.dumps(one) if isinstance(one, dict) else str(one) for one in value)]
    return [flag, str(value)]


def local_source(source: str) -> str:
    """A built-in name as the directory where it was made; anything else as it is. Raises RequestError."""
    if not source.startswith(BUILTIN):
        return source
    cache = Path(os.environ.get("MEGATOKEN_CACHE") or Path.home() / ".cache" / "megatoken") / "models"
    directory = cache / source.removeprefix(BUILTIN)
    if not (directory / "config.json").is_file():
        raise RequestError(
            "models.source", source, f"make it first: python -m megatoken.worker.models prepare {directory.name}"
        )
    return str(directory)
