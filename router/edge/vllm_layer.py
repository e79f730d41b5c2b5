"""The one module of the edge that knows vLLM's internals.

Builds vLLM's own OpenAI app for a model without an engine: an AsyncLLM keeps its renderer, detokeniser, stop strings,
logprobs and fan-out of n > 1, and talks to a RouterEngineCore where its engine core would be. Held to one version of
vLLM by tests/integration/test_edge_vllm_seams.py. Called by __main__; nothing else imports vLLM, except fast_stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import deque
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from vllm import AsyncEngineArgs, envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from megatoken.errors import MegatokenError, OverloadError, RequestError
from megatoken.v1.frame_columns_pb2 import GenerateRequest
from megatoken.v1.tokens_pb2 import Detail, Finish, Logprobs
from router.edge.config import EdgeConfig, EdgeModel
from router.edge.outcomes import VLLM_REASON, Refusal, refusal, stop_reason
from router.edge.sampling import to_contract
from router.edge.serve_args import serve_arguments
from router.edge.session import Session

TASKS = ("generate",)


class CoreReceiver:
    """One request of vLLM's layer: turns what arrives for it into EngineCoreOutput."""

    __slots__ = ("core", "prompt_tokens", "request_id", "started")

    def __init__(self, core: RouterEngineCore, request_id: str, prompt_tokens: int) -> None:
        self.core = core
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.started = False

    def feed(self, tokens: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        """One frame's share of this request."""
        if finish is None and details is None:
            self.core.pending.append(EngineCoreOutput(self.request_id, tokens))
            return
        output = EngineCoreOutput(self.request_id, tokens)
        if details:
            output.new_logprobs = logprobs_lists([detail.logprobs for detail in details])
            output.new_prompt_logprobs_tensors = logprobs_tensors([detail.prompt_logprobs for detail in details])
        if finish is not None:
            refused = refusal(finish)
            if refused is not None:
                self.core.fail(self.request_id, as_vllm_error(refused))
                return
            output.finish_reason = FinishReason[VLLM_REASON[finish.reason]]
            output.stop_reason = stop_reason(finish)
            self.core.note_cached(self.request_id, self.prompt_tokens, finish.cached_tokens, output)
        self.core.pending.append(output)


class RouterEngineCore(EngineCoreClient):
    """Stands where AsyncLLM has its engine core, and is a client of the router instead."""

    def __init__(self, session: Session, model: str, config: EdgeConfig) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)
        self.pending: list[EngineCoreOutput] = []
        self._batches: deque[EngineCoreOutputs] = deque()
        self._wake = asyncio.Event()
        self._session = session
        self._model = model
        self._site = config.site
        self._timeout_ms = round(config.limits.request_timeout_s * 1000)
        self._processor: Any = None
        session.after_frame.append(self.flush)

    def attach(self, llm: AsyncLLM) -> None:
        """Gives the core the front-end it serves; after AsyncLLM's constructor."""
        self._processor = llm.output_processor

    def flush(self) -> None:
        """Hands over what the frame brought, as one batch."""
        if self.pending:
            self._batches.append(EngineCoreOutputs(outputs=self.pending))
            self.pending = []
            self._wake.set()

    async def get_output_async(self) -> EngineCoreOutputs:
        while not self._batches:
            self._wake.clear()
            await self._wake.wait()
        return self._batches.popleft()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        try:
            message = self._to_contract(request)
            await self._session.wait_connected()
            receiver = CoreReceiver(self, request.request_id, len(request.prompt_token_ids or ()))
            self._session.open(receiver, message)
        except MegatokenError as error:
            self._processor.abort_requests([request.request_id], internal=True)
            raise_as_vllm_error(error)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._session.cancel(request_id)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return TASKS

    async def is_sleeping_async(self) -> bool:
        return False

    async def is_scheduler_paused_async(self) -> bool:
        return False

    async def add_lora_async(self, lora_request: Any) -> bool:
        return True  # adapters are loaded by the workers; a request names its own

    async def remove_lora_async(self, lora_id: int) -> bool:
        return True

    async def reset_mm_cache_async(self) -> None:
        return None

    def shutdown(self, timeout: float | None = None) -> None:
        return None

    def fail(self, request_id: str, error: Exception) -> None:
        """Ends one request with an error, and with it the other choices of the same call."""
        state = self._processor.request_states.get(request_id)
        if state is None:
            return
        whole = state.parent_req.request_id if state.parent_req is not None else request_id
        for aborted in self._processor.abort_requests([whole], internal=True):
            self._session.cancel(aborted)
        state.queue.put(error)

    def note_cached(self, request_id: str, prompt_tokens: int, cached: int, output: EngineCoreOutput) -> None:
        """Tells vLLM how much of the prompt came from the prefix cache."""
        output.prefill_stats = PrefillStats(num_prompt_tokens=prompt_tokens, num_cached_tokens=cached)
        state = self._processor.request_states.get(request_id)
        if state is not None:
            state.num_cached_tokens = cached

    def _to_contract(self, request: EngineCoreRequest) -> GenerateRequest:
        if request.mm_features or request.prompt_embeds is not None or request.prompt_token_ids is None:
            raise RequestError("prompt", "media or embeddings", "this fleet takes text and token ids")
        if request.sampling_params is None:
            raise RequestError("task", "pooling", "this fleet generates; it serves no pooling models")
        try:
            prompt = array("I", request.prompt_token_ids).tobytes()
        except OverflowError:
            raise RequestError("prompt", min(request.prompt_token_ids), "token ids are at least 0") from None
        message = GenerateRequest(
            request_id=request.external_req_id or request.request_id,
            model=self._model,
            prompt=prompt,
            sampling=to_contract(request.sampling_params),
            priority=request.priority,
            timeout_ms=self._timeout_ms,
        )
        if request.lora_request is not None:
            message.lora = request.lora_request.lora_name
        if request.cache_salt:
            message.cache_salt = request.cache_salt
        if request.session_id:
            message.affinity = request.session_id
        if self._site:
            message.site = self._site
        if request.trace_headers and "traceparent" in request.trace_headers:
            message.traceparent = request.trace_headers["traceparent"]
        return message


class RouterRefusal(GracefulHTTPError):
    """A refusal that vLLM has no type of its own for: its HTTP status and text reach the client as they are."""


def as_vllm_error(refused: Refusal) -> Exception:
    """The exception that vLLM's error handlers turn into this refusal's HTTP status."""
    if refused.http_status == HTTPStatus.BAD_REQUEST:
        return VLLMValidationError(refused.message)
    if refused.http_status == HTTPStatus.NOT_FOUND:
        return VLLMNotFoundError(refused.message)
    return RouterRefusal(refused.message, HTTPStatus(refused.http_status))


def raise_as_vllm_error(error: MegatokenError) -> NoReturn:
    """Raises one of our errors as vLLM's."""
    retry_after_s = error.retry_after_s if isinstance(error, OverloadError) else None
    raise as_vllm_error(Refusal(error.http_code, str(error), retry_after_s)) from error


def logprobs_lists(parts: list[Logprobs]) -> LogprobsLists | None:
    """vLLM's sample logprobs from the contract's; None when there are none."""
    present = [matrices(part) for part in parts if part.width]
    if not present:
        return None
    tokens, values, ranks = (np.concatenate(column) for column in zip(*present, strict=True))
    return LogprobsLists(tokens, values, ranks, None)


def logprobs_tensors(parts: list[Logprobs]) -> LogprobsTensors | None:
    """vLLM's prompt logprobs from the contract's; None when there are none."""
    lists = logprobs_lists(parts)
    return None if lists is None else LogprobsTensors(*(torch.from_numpy(column) for column in lists[:3]))


def matrices(part: Logprobs) -> tuple[Any, Any, Any]:
    """(token ids, logprobs, ranks): rows x width, rows x width, rows."""
    tokens = np.array(part.token, np.int32).reshape(-1, part.width)
    values = np.array(part.logprob, np.float32).reshape(-1, part.width)
    return tokens, values, np.array(part.rank, np.int32)


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

    def __init__(self, app: Any, llm: AsyncLLM, model: EdgeModel) -> None:
        self.app = app
        self.llm = llm
        self.model = model

    async def list_models(self) -> list[dict[str, Any]]:
        """The entries that this model adds to /v1/models."""
        listed = await self.app.state.openai_serving_models.show_available_models()
        return [card.model_dump() for card in listed.data]

    def shutdown(self) -> None:
        """Ends vLLM's threads and tasks."""
        self.llm.shutdown()


async def build_model_app(model: EdgeModel, config: EdgeConfig, session: Session) -> ModelApp:
    """Builds vLLM's app for a model. Call in the event loop that serves."""
    args = parse(model)
    vllm_config = make_vllm_config(args)
    core = RouterEngineCore(session, model.name, config)
    with engine_core(core):
        llm = AsyncLLM(vllm_config=vllm_config, executor_class=None, log_stats=False, log_requests=False)
    core.attach(llm)
    app = build_app(args, TASKS, vllm_config.model_config)
    await init_app_state(llm, app.state, args, TASKS)
    app.state.server = SimpleNamespace(should_exit=False)  # vLLM's error handler asks for it
    return ModelApp(app, llm, model)
