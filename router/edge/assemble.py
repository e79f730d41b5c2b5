"""Puts an edge together: sessions, one vLLM app per model, dispatch. Called by __main__, in the serving loop."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from vllm.version import __version__ as vllm_version

from megatoken.metrics import MetricsServer, serve_metrics
from megatoken.router.edge.config import EdgeConfig
from megatoken.router.edge.http.dispatch import Dispatch
from megatoken.router.edge.metrics import EdgeMetrics
from megatoken.router.edge.router_session.sessions import Sessions
from megatoken.router.edge.vllm.layer import ModelApp, build_model_app
from megatoken.router.identity.api_keys import KeyRing
from megatoken.router.identity.callers import CallerRegistry
from megatoken.tracing import Tracer, tracer_of


@dataclass(frozen=True, slots=True)
class Edge:
    """A whole edge: the ASGI app, and what must be closed after it."""

    app: Any
    sessions: Sessions
    models: tuple[ModelApp, ...]
    metrics: MetricsServer | None
    tracer: Tracer | None

    async def close(self) -> None:
        """Closes the sessions with the router and ends vLLM's threads."""
        if self.metrics is not None:
            self.metrics.close()
        await self.sessions.close()
        for model in self.models:
            model.shutdown()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


async def assemble(config: EdgeConfig, keys: KeyRing | None = None) -> Edge:
    """Builds an edge and begins to connect it to its router. Raises RequestError for a model that cannot be served."""
    metrics = EdgeMetrics()
    sessions = Sessions(config, metrics, keys)
    sessions.watch_connection(metrics.router_connected)
    sessions.start()
    models = tuple([await build_model_app(model, config, sessions) for model in config.models])
    tracer = tracer_of(config.tracing, "megatoken-edge", config.edge)
    dispatch = Dispatch(
        apps={name: model for model in models for name in (*model.model.names, *model.model.loras)},
        is_healthy=lambda: sessions.connected,
        callers=CallerRegistry(keys),
        max_body_bytes=config.limits.max_body_bytes,
        tracer=tracer,
    )
    server = None
    if config.metrics_port is not None:
        version = json.dumps({"version": vllm_version}).encode()
        server = serve_metrics(
            metrics.registry,
            config.metrics_host,
            config.metrics_port,
            metrics.http_exposition,
            {"/version": lambda: ("application/json", version)},
        )
    return Edge(dispatch, sessions, models, server, tracer)
