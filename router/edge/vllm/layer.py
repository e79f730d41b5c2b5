"""Builds vLLM's own OpenAI app for a model without an engine.

An AsyncLLM keeps its renderer, detokeniser, stop strings, logprobs and fan-out of n > 1, and talks to a
RouterEngineCore where its engine core would be. This module, engine_core and weave are the only ones of the edge that
know vLLM's internals; tests/integration/test_edge_vllm_seams.py holds them to one version. Called by assemble.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from vllm import AsyncEngineArgs, envs
from vllm.config import LoRAConfig, VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.core_client import EngineCoreClient

from megatoken.errors import RequestError
from megatoken.router.edge.config import EdgeConfig, EdgeModel
from megatoken.router.edge.router_session.sessions import Sessions
from megatoken.router.edge.vllm.direct_writes import EdgeLLM, weave_app
from megatoken.router.edge.vllm.engine_core import TASKS, RouterEngineCore
from megatoken.router.edge.vllm.serve_args import serve_arguments

AT_THE_WORKERS = "at-the-workers"  # an adapter's path, which the edge does not know and vLLM asks for


@contextlib.contextmanager
def engine_core(core: RouterEngineCore) -> Iterator[None]:
    """Makes AsyncLLM's constructor take `core` instead of starting an engine."""
    original = EngineCoreClient.__dict__["make_async_mp_client"]
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: core)  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original


def parse(model: EdgeModel) -> Any:
    """vLLM's own arguments for a model. Raises RequestError for what vLLM does not accept."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", exit_on_error=False))
    try:
        args = parser.parse_args(serve_arguments(model))
        validate_parsed_serve_args(args)
    except (SystemExit, TypeError, ValueError) as error:
        raise RequestError("models.extra_args", model.extra_args, f"vllm serve says: {error}") from None
    return args


def make_vllm_config(args: Any) -> VllmConfig:
    """A VllmConfig with no engine behind it, as vLLM's own render server makes it."""
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    model_config.quantization = None  # no weights are read: no quantisation kernels to check for
    envs.VLLM_CPU_KVCACHE_SPACE = 0  # no KV cache either
    return VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )


class ModelApp:
    """vLLM's app for one model, and the parts of it that the edge uses itself."""

    def __init__(self, app: Any, llm: EdgeLLM, model: EdgeModel) -> None:
        self.app = app
        self.llm = llm
        self.model = model

    @property
    def name(self) -> str:
        """The router's name for the model."""
        return self.model.name

    async def list_models(self) -> list[dict[str, Any]]:
        """The entries that this model adds to /v1/models."""
        listed = await self.app.state.openai_serving_models.show_available_models()
        return [card.model_dump() for card in listed.data]

    def shutdown(self) -> None:
        """Ends vLLM's threads and tasks."""
        self.llm.shutdown()


async def build_model_app(model: EdgeModel, config: EdgeConfig, sessions: Sessions) -> ModelApp:
    """Builds vLLM's app for a model. Call in the event loop that serves."""
    args = parse(model)
    vllm_config = make_vllm_config(args)
    if model.loras:
        vllm_config.lora_config = LoRAConfig()  # vLLM refuses adapters without one; the workers have the real one
    core = RouterEngineCore(sessions, model.name, config)
    with engine_core(core):
        llm = EdgeLLM(vllm_config=vllm_config, executor_class=None, log_stats=False, log_requests=False)
    core.attach(llm)
    app = build_app(args, TASKS, vllm_config.model_config)
    await init_app_state(llm, app.state, args, TASKS)
    for number, name in enumerate(model.loras, start=1):
        app.state.openai_serving_models.lora_requests[name] = LoRARequest(name, number, AT_THE_WORKERS)
    if model.fast_stream:
        weave_app(app.state, args)
    app.state.server = SimpleNamespace(should_exit=False)  # vLLM's error handler asks for it
    return ModelApp(app, llm, model)
