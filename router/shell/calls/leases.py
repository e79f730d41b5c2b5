"""Serves Leases: a call of Assign is mostly gRPC's cost of a call; here one message carries many of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from megatoken.errors import MegatokenError, RequestError
from megatoken.router.core.ending import error_finish
from megatoken.router.core.state import RouterState
from megatoken.router.identity.callers import Caller
from megatoken.router.shell.calls.generate import refuse
from megatoken.router.shell.leases import IssuedLeases
from megatoken.v1 import router_pb2

MAX_A_MESSAGE: Final = 4096
AT_ONCE: Final = 64  # assigned before other callers have their turn; some 25 us each


async def serve_leases(
    state: RouterState,
    leases: IssuedLeases,
    caller: Caller,
    requests: AsyncIterator[router_pb2.LeasesRequest],
    context: Any,
) -> None:
    """One call, until its client has no more requests. One that reads no answers is not read from."""
    async for request in requests:
        if max(len(request.assign), len(request.release)) > MAX_A_MESSAGE:
            error = RequestError("assign", len(request.assign), f"at most {MAX_A_MESSAGE}, and releases, in a message")
            await refuse(context, error)
            return
        now = time.monotonic()
        for release in request.release:
            leases.release(release.lease, release.failed, now)
        if not request.assign:
            continue
        response = router_pb2.LeasesResponse()
        for done, ask in enumerate(request.assign):
            if done and done % AT_ONCE == 0:
                await asyncio.sleep(0)
                now = time.monotonic()
            response.outcomes.append(_assigned(state, leases, ask, caller, now))
        async with asyncio.timeout(state.config.limits.client_stall_s):
            await context.write(response)


def _assigned(
    state: RouterState, leases: IssuedLeases, ask: router_pb2.AssignRequest, caller: Caller, now: float
) -> router_pb2.AssignOutcome:
    try:
        return router_pb2.AssignOutcome(lease=leases.assign(ask, caller, now))
    except MegatokenError as error:
        state.count_refusal(ask.model, error)
        finish = error_finish(0, error)
        return router_pb2.AssignOutcome(code=finish.code, message=finish.message, retry_after_ms=finish.retry_after_ms)
