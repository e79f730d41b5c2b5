"""A span a request and choice, from its arrival at the router to its end; below it the worker's own."""

from __future__ import annotations

from megatoken.router.core.ending import ERROR
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.tracing import Attributes, Span, Tracer, finish_reasons
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest


class RequestSpans:
    """Made and ended by the router's core, through its hooks."""

    def __init__(self, tracer: Tracer, state: RouterState) -> None:
        self._tracer = tracer
        state.on_entered = self.begin
        state.on_finished.append(self.end)

    def begin(self, message: GenerateRequest, now: float) -> Span | None:
        """The span of a request that may enter; what goes to a worker then names it as the parent."""
        attributes = {"megatoken.request_id": message.request_id, "gen_ai.request.model": message.model}
        message.traceparent, span = self._tracer.begin("router request", message.traceparent, now, attributes)
        return span

    def end(self, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
        """With what is known by then: when it was placed last, its first token, how often it went on elsewhere."""
        span: Span | None = request.span
        if span is None:
            return
        if request.placed_s:
            span.event("placed", request.placed_s)
        if request.first_s:
            span.event("first token", request.first_s)
        attributes: Attributes = {
            "megatoken.choice": request.choice,
            "megatoken.replica": finish.replica,
            "megatoken.resumes": finish.resumes,
            "gen_ai.usage.input_tokens": finish.prompt_tokens,
            "gen_ai.usage.output_tokens": finish.generated_tokens,
            "gen_ai.response.finish_reasons": finish_reasons(finish.reason),
        }
        span.end(now, attributes, finish.message if finish.reason == ERROR else None)
