"""One HTTP exchange, made by dispatch and found again under vLLM's layer, through a context variable."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final

from megatoken.router.edge.http.refusals import GuardedSend
from megatoken.router.edge.router_session.direct import DirectWriter, Template
from megatoken.tracing import Span


class Exchange:
    """One HTTP exchange as the parts of the edge see it: its guarded send, its caller's key, what it started."""

    __slots__ = ("generations", "guard", "secret", "span", "traceparent")

    def __init__(self, guard: GuardedSend, secret: str = "", traceparent: str = "", span: Span | None = None) -> None:
        self.traceparent = traceparent  # W3C trace context: of the edge's span, or as the client sent it
        self.span = span
        self.guard = guard
        self.secret = secret
        self.generations: list[Any] = []

    def writer(self, template: Template) -> DirectWriter | None:
        """A writer for this exchange; None when its server does not tell whether a client keeps up."""
        flow = getattr(getattr(self.guard.raw, "__self__", None), "flow", None)
        if flow is None or not hasattr(flow, "write_paused"):
            return None
        return DirectWriter(template, self.guard.raw, flow)


EXCHANGE: Final[ContextVar[Exchange | None]] = ContextVar("exchange", default=None)
