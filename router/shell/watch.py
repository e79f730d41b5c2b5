"""Watches membership: snapshots from a controller, the last one kept while it is away, a bounded resync."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import grpc
from grpc import aio

from megatoken.reconnect import Pauses, keep_connected
from megatoken.v1 import membership_pb2, membership_pb2_grpc

log = logging.getLogger(__name__)

RESYNC_S = 60.0  # a watch is opened anew after this, asking for everything
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


async def watch_membership(
    controllers: Sequence[str],
    watcher: str,
    open_channel: Callable[[str], aio.Channel],
    apply: Callable[[membership_pb2.Snapshot], None],
    connected: Callable[[bool], None] = lambda _up: None,
) -> None:
    """Until cancelled: tries the controllers in turn, applies every snapshot. Never raises."""
    turns = itertools.cycle(controllers)

    def failed(error: Exception) -> None:  # an unreadable certificate, a snapshot that does not apply
        log.error("watching membership failed, and goes on", exc_info=error)
        connected(False)

    async def watch() -> None:
        address = next(turns)
        while await _watch_once(address, watcher, open_channel, apply, connected):
            pass

    await keep_connected(watch, Pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S), failed)


async def _watch_once(
    address: str,
    watcher: str,
    open_channel: Callable[[str], aio.Channel],
    apply: Callable[[membership_pb2.Snapshot], None],
    connected: Callable[[bool], None],
) -> bool:
    """One watch; whether anything came. Ends at RESYNC_S at the latest."""
    channel = open_channel(address)
    got = False
    try:
        stub = membership_pb2_grpc.MembershipStub(channel)
        async for snapshot in stub.Watch(membership_pb2.WatchRequest(watcher=watcher), timeout=RESYNC_S):
            apply(snapshot)
            got = True
            connected(True)
    except aio.AioRpcError as error:
        connected(got and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED)  # that is only the resync
        if not got:
            log.info("no membership from %s: %s", address, error.code().name)
    finally:
        await channel.close(None)
    return got
