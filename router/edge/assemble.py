"""Puts an edge together: link, session, one vLLM app per model, dispatch. Called by __main__, in the serving loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from router.edge.config import EdgeConfig
from router.edge.dispatch import Dispatch
from router.edge.link import RouterLink
from router.edge.metrics import EdgeMetrics
from router.edge.session import Session
from router.edge.vllm_layer import ModelApp, build_model_app


@dataclass(frozen=True, slots=True)
class Edge:
    """A whole edge: the ASGI app, and what must be closed after it."""

    app: Any
    link: RouterLink
    models: tuple[ModelApp, ...]

    async def close(self) -> None:
        """Closes the session with the router and ends vLLM's threads."""
        await self.link.close()
        for model in self.models:
            model.shutdown()


async def assemble(config: EdgeConfig, allowed: Callable[[str | None], bool] | None = None) -> Edge:
    """Builds an edge and begins to connect it to its router. Raises RequestError for a model that cannot be served."""
    metrics = EdgeMetrics()
    session = Session(config.limits.max_requests, config.limits.connect_timeout_s, metrics, time.monotonic)
    link = RouterLink(
        config.router,
        session.on_frame,
        session.on_lost,
        config.router_tls,
        config.router_key,
    )
    session.attach(link)
    link.start()
    models = tuple([await build_model_app(model, config, session) for model in config.models])
    dispatch = Dispatch(
        apps={name: model for model in models for name in model.model.names},
        is_healthy=lambda: link.connected,
        exposition=lambda: metrics.exposition(link.connected),
        allowed=allowed,
        max_body_bytes=config.limits.max_body_bytes,
    )
    return Edge(dispatch, link, models)
