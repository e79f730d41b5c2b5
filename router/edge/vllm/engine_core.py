"""Stands where vLLM's AsyncLLM has its engine core, and is a client of the router instead.

A seam: EngineCoreClient's asynchronous half, EngineCoreRequest in, EngineCoreOutputs out, one batch per frame. What the
contract cannot carry is refused here. Built by vllm.layer.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import deque
from contextvars import ContextVar
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from megatoken.errors import MegatokenError, RequestError
from megatoken.router.edge.config import EdgeConfig
from megatoken.router.edge.http.exchange import EXCHANGE, Exchange
from megatoken.router.edge.http.outcomes import VLLM_REASON, Refusal, refusal, refusal_of, stop_reason
from megatoken.router.edge.router_session.direct import DirectWriter
from megatoken.router.edge.router_session.session import Session
from megatoken.router.edge.router_session.sessions import Sessions
from megatoken.router.edge.vllm.sampling import to_contract
from megatoken.v1.frame_columns_pb2 import GenerateRequest
from megatoken.v1.tokens_pb2 import Detail, Finish, Logprobs

TASKS = ("generate",)
logger = logging.getLogger(__name__)


class Waits(Protocol):
    """Who wants to know the receivers of its requests; weave.Generation is one."""

    receivers: list[CoreReceiver]


GENERATION: ContextVar[Waits | None] = ContextVar("generation", default=None)  # set while it adds its requests


class CoreReceiver:
    """One request of vLLM's layer. What arrives becomes EngineCoreOutput or, with a writer, goes to the client at once.

    `handed` counts tokens that were given to vLLM's output processor, whether or not it has taken them yet.
    """

    __slots__ = (
        "core",
        "detokenizer",
        "early",
        "exchange",
        "handed",
        "prompt_tokens",
        "request_id",
        "writer",
        "written",
    )

    def __init__(
        self, core: RouterEngineCore, request_id: str, prompt_tokens: int, exchange: Exchange | None = None
    ) -> None:
        self.core = core
        self.exchange = exchange
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.handed = 0
        self.early: list[Detail] = []
        self.writer: DirectWriter | None = None
        self.detokenizer: Any = None
        self.written = 0  # tokens that went past vLLM's generator; it still has to count them

    def feed(self, tokens: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        """One frame's share of this request."""
        if details and not tokens and finish is None:  # a long prompt's log probabilities, before its first token
            self.early += details
            return
        if self.early:
            details, self.early = [*self.early, *(details or ())], []
        if finish is None and details is None:
            writer = self.writer
            if writer is not None and writer.keeps_up:
                try:
                    self._write(writer, tokens)
                except Exception as error:  # one request's text must not stop the frames of all
                    logger.exception("request %s failed while its text was written", self.request_id)
                    self.core.cancel(self.request_id)
                    self.core.fail(self.request_id, error)
            else:
                self.writer = None  # a slow client: vLLM's generator goes on, and waits for it
                self.handed += len(tokens)
                self.core.pending.append(EngineCoreOutput(self.request_id, tokens))
            return
        self.writer = None
        self.handed += len(tokens)
        output = EngineCoreOutput(self.request_id, tokens)
        if details:
            output.new_logprobs = logprobs_lists([detail.logprobs for detail in details])
            output.new_prompt_logprobs_tensors = logprobs_tensors([detail.prompt_logprobs for detail in details])
            cached = max(detail.cached_tokens for detail in details)
            if cached:
                self.core.note_cached(self.request_id, self.prompt_tokens, cached, output)
        if finish is not None:
            self.core.forget(self.request_id)
            refused = refusal(finish)
            if refused is not None:
                self.core.fail(self.request_id, as_vllm_error(refused, self.exchange))
                return
            output.finish_reason = FinishReason[VLLM_REASON[finish.reason]]
            output.stop_reason = stop_reason(finish)
            self.core.note_cached(self.request_id, self.prompt_tokens, finish.cached_tokens, output)
        self.core.pending.append(output)

    def write_from_now_on(self, writer: DirectWriter, state: Any) -> None:
        """Sends what follows to the client directly, unless vLLM still has something of this request to work off."""
        caught_up = state.queue.output is None and state.detokenizer.num_output_tokens() == self.handed
        if caught_up and writer.keeps_up:
            self.detokenizer, self.writer = state.detokenizer, writer

    def take_written(self, following: list[int]) -> list[int]:
        """The tokens that vLLM's generator has to count with `following`, which it is about to be given."""
        size, self.written = self.written + len(following), 0
        return self.detokenizer.output_token_ids[-size:] if size else following

    def _write(self, writer: DirectWriter, tokens: list[int]) -> None:
        detokenizer = self.detokenizer
        stop = detokenizer.update(tokens, False)
        total = detokenizer.num_output_tokens()
        self.written += total - self.handed
        self.handed = total
        if stop is None:
            writer.write(detokenizer.get_next_output_text(False, True))
            return
        # A stop string: vLLM ends the request with what text is left, and the fleet need not go on with it.
        self.writer = None
        self.core.pending.append(
            EngineCoreOutput(self.request_id, [], finish_reason=FinishReason.STOP, stop_reason=stop)
        )
        self.core.cancel(self.request_id)


class RouterEngineCore(EngineCoreClient):
    """Stands where AsyncLLM has its engine core, and is a client of the router instead."""

    def __init__(self, sessions: Sessions, model: str, config: EdgeConfig) -> None:
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)
        self.pending: list[EngineCoreOutput] = []
        self._batches: deque[EngineCoreOutputs] = deque()
        self._wake = asyncio.Event()
        self._sessions = sessions
        self._session_of: dict[str, Session] = {}  # by running request
        self._model = model
        self._site = config.site
        self._timeout_ms = round(config.limits.request_timeout_s * 1000)
        self._processor: Any = None
        sessions.after_frame.append(self.flush)

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
        exchange = EXCHANGE.get()
        try:
            message = self._to_contract(request, exchange.traceparent if exchange is not None else "")
            if exchange is not None and exchange.span is not None:
                exchange.span.set({"megatoken.request_id": message.request_id})
            receiver = CoreReceiver(self, request.request_id, len(request.prompt_token_ids or ()), exchange)
            with self._sessions.use(exchange.secret if exchange is not None else "") as session:
                await session.wait_connected()
                session.open(receiver, message)
            self._session_of[request.request_id] = session
            generation = GENERATION.get()
            if generation is not None:
                generation.receivers.append(receiver)
        except BaseException as error:  # also a client that left: vLLM registered the request before this call
            self._processor.abort_requests([request.request_id], internal=True)
            if isinstance(error, MegatokenError):
                raise as_vllm_error(refusal_of(error), exchange) from error
            raise

    def cancel(self, request_id: str) -> None:
        """Tells the router that a request is no longer wanted. One that ended already is ignored."""
        session = self._session_of.pop(request_id, None)
        if session is not None:
            session.cancel(request_id)

    def forget(self, request_id: str) -> None:
        """The router ended a request."""
        self._session_of.pop(request_id, None)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.cancel(request_id)

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
            self.cancel(aborted)
        state.queue.put(error)

    def note_cached(self, request_id: str, prompt_tokens: int, cached: int, output: EngineCoreOutput) -> None:
        """Tells vLLM how much of the prompt came from the prefix cache."""
        output.prefill_stats = PrefillStats(num_prompt_tokens=prompt_tokens, num_cached_tokens=cached)
        state = self._processor.request_states.get(request_id)
        if state is not None:
            state.num_cached_tokens = cached

    def _to_contract(self, request: EngineCoreRequest, traceparent: str) -> GenerateRequest:
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
            traceparent=traceparent,
            tell_cached_tokens=True,  # a stream's usage is made of what was known with its first token
        )
        if request.lora_request is not None:
            message.lora = request.lora_request.lora_name
        if request.cache_salt:
            message.cache_salt = request.cache_salt
        if request.session_id:
            message.affinity = request.session_id
        if self._site:
            message.site = self._site
        return message


class RouterRefusal(GracefulHTTPError):
    """A refusal that vLLM has no type of its own for: its HTTP status and text reach the client as they are."""


def as_vllm_error(refused: Refusal, exchange: Exchange | None) -> Exception:
    """The exception that vLLM's error handlers turn into this refusal's HTTP status; its exchange learns the rest."""
    if exchange is not None:
        exchange.guard.retry_after_s = refused.retry_after_s
    if refused.http_status == HTTPStatus.BAD_REQUEST:
        return VLLMValidationError(refused.message)
    if refused.http_status == HTTPStatus.NOT_FOUND:
        return VLLMNotFoundError(refused.message)
    return RouterRefusal(refused.message, HTTPStatus(refused.http_status))


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
