"""A worker's frame arrives: tokens to their clients, details and finishes to their requests, load to the table.

A fault of ours while one part is taken in concerns that part alone. Nothing may be missing in the middle of a stream,
so what could not be taken ends: before a frame's tokens are recorded, with the session of its replica, whose requests
go on from what was recorded; after that, with the requests whose tokens they are. Each is counted in `state.faults`.
"""

from __future__ import annotations

from megatoken.router.core.ending import fail
from megatoken.router.core.placement import place_waiting
from megatoken.router.core.recovery import frame_failed, give_up
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint, Pool
from megatoken.router.intake.arrival import Arrived, decode
from megatoken.router.intake.details import details_by_slot, take_lone_details
from megatoken.router.intake.finishes import take_finish
from megatoken.router.intake.load import take_load
from megatoken.router.intake.tokens import take_tokens
from megatoken.tokens.frames import MalformedFrame


def on_frame(state: RouterState, replica: Endpoint, raw: bytes, now: float) -> None:
    """Takes one encoded Frame in."""
    on_frames(state, [(replica, raw)], now)


def on_frames(state: RouterState, batch: list[tuple[Endpoint, bytes]], now: float) -> None:
    """Takes encoded Frames in, oldest first. The session of a worker that sends a malformed one ends with it.

    Frames of different replicas are sorted together, since numpy's cost is per call; a second frame of the same
    replica begins a new group, which keeps every stream's order.
    """
    at = 0
    while at < len(batch):
        group: list[Arrived] = []
        senders: set[int] = set()
        while at < len(batch) and batch[at][0].index not in senders:
            replica, raw = batch[at]
            at += 1
            if not replica.connected:
                continue  # its session was given up in this very batch
            try:
                group.append(decode(state, replica, raw))
                senders.add(replica.index)
            except MalformedFrame as error:
                give_up(state, replica, f"replica {replica.name} sent a malformed frame: {error}", now)
            except Exception as error:
                frame_failed(state, replica, "frame", error, now)
        try:
            _take_group(state, group, now)
        except Exception as error:  # beside what is caught there part by part; the frames after these are still to come
            for arrived in group:
                if arrived.replica.connected:
                    frame_failed(state, arrived.replica, "frame", error, now)


def _take_group(state: RouterState, group: list[Arrived], now: float) -> None:
    """Frames of different replicas: tokens first, then what ended, then loads."""
    details: dict[int, list[bytes]] = {}
    filled = []
    for arrived in group:
        if arrived.frame.detail:
            try:
                details |= details_by_slot(state, arrived.replica, arrived.frame)
            except Exception as error:
                frame_failed(state, arrived.replica, "details", error, now)
                continue
        if len(arrived.stream):
            filled.append(arrived)
            arrived.replica.alive_s = now  # tokens are made by steps; ends and loads come from the worker as well
    if filled:
        take_tokens(state, filled, details, now)
    for slot, lone in details.items():
        request = state.slots.owner[slot]
        if request is not None:
            try:
                take_lone_details(state, request, lone)
            except Exception as error:
                fail(state, request, "delivery", error, now)
    pools: dict[int, Pool] = {}
    for arrived in group:
        replica, frame = arrived.replica, arrived.frame
        if not replica.connected:  # given up above
            continue
        if replica.ward:  # a first token may have made place for the next suspect
            pools[id(replica.pool)] = replica.pool
        if frame.finish:
            for finish in frame.finish:
                take_finish(state, replica, finish, now)
            pools[id(replica.pool)] = replica.pool
        if frame.usage and state.on_lease_usage is not None:
            try:
                for usage in frame.usage:
                    state.on_lease_usage(replica, usage, now)
            except Exception as error:  # without its report a lease stays charged in full
                state.faults.caught("leases", error)
            pools[id(replica.pool)] = replica.pool
        if frame.HasField("load"):
            try:
                take_load(state, replica, frame.load, now)
            except Exception as error:  # the next report says it all again
                state.faults.caught("load", error)
            pools[id(replica.pool)] = replica.pool
    for pool in pools.values():
        place_waiting(state, pool, now)
