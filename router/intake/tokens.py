"""The tokens of frames that came in one moment: recorded, accounted for, and handed to the clients they are for.

Until they are recorded a fault costs a frame's session, after that the requests whose tokens they are (see intake).
Called by intake; sorts with demux.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from megatoken.router.core.accounts import credit
from megatoken.router.core.ending import fail
from megatoken.router.core.recovery import frame_failed
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.arrival import Arrived
from megatoken.router.intake.demux import Index, Sorted, sort_frame
from megatoken.router.intake.details import take_column_details
from megatoken.router.intake.direct import take_direct
from megatoken.router.intake.first_token import first_token
from megatoken.tokens.frames import U32, Column
from megatoken.tokens.outbox import FramePart

_SAMPLE_EVERY: Final = 64  # frames; of one call in about so many the times between tokens are measured


def take_tokens(state: RouterState, frames: list[Arrived], details: dict[int, list[bytes]], now: float) -> None:
    """Records the frames' tokens and hands them out; of `details` it takes those that go with tokens."""
    state.frames += len(frames)
    try:
        if state.frames % _SAMPLE_EVERY < len(frames):
            _sample_times(state, frames[0], now)
        stream, count, token, sender = _joined(frames)
        found = sort_frame(state.slots, state.pages, sender, stream, count, token, now)
    except Exception as error:  # nothing is recorded, see sort_frame; whose fault it is, each frame by itself shows
        if len(frames) == 1:
            frame_failed(state, frames[0].replica, "tokens", error, now)
        else:
            for arrived in frames:
                if arrived.replica.connected:
                    take_tokens(state, [arrived], details, now)
        return
    try:
        _account(state, frames, found, len(stream))
    except Exception as error:  # a count may be off, no stream is
        state.faults.caught("accounts", error)
    urgent: set[int] = set()
    try:
        if found.first:
            urgent = _first_tokens(state, found, now)
    except Exception as error:
        state.faults.caught("accounts", error)
    for index, streams, counts, tokens in found.parts:
        sink = state.sinks[index]
        if sink is None:
            continue
        try:
            sink.outbox.add_part(FramePart(streams, counts, tokens, take_column_details(state, index, details), []))
            state.ledger.delivered_tokens += len(tokens)
            if index in urgent:
                sink.outbox.urgent = True
            sink.wake()
        except Exception as error:
            for number in dict.fromkeys(streams.tolist()):
                if number in sink.requests:
                    fail(state, sink.requests[number], "delivery", error, now)
    for slot, packed in found.direct:
        request = state.slots.owner[slot]
        if request is not None:
            try:
                take_direct(state, request, packed, details.pop(slot, []), now)
            except Exception as error:
                fail(state, request, "delivery", error, now)


def _joined(frames: list[Arrived]) -> tuple[Column, Column | None, Column, int | Index]:
    """The columns of several frames as one, and who sent each entry."""
    first = frames[0]
    if len(frames) == 1:
        return first.stream, first.count, first.token, first.replica.index
    count: Column | None = None
    if any(arrived.count is not None for arrived in frames):
        ones = [np.ones(len(a.stream), U32) if a.count is None else a.count for a in frames]
        count = np.concatenate(ones)
    return (
        np.concatenate([arrived.stream for arrived in frames]),
        count,
        np.concatenate([arrived.token for arrived in frames]),
        np.repeat([arrived.replica.index for arrived in frames], [len(arrived.stream) for arrived in frames]),
    )


def _account(state: RouterState, frames: list[Arrived], found: Sorted, entries: int) -> None:
    """Counts what came: for the ledger, and off each replica's outstanding tokens."""
    state.ledger.add("generated_tokens", found.tokens)
    state.ledger.foreign_tokens += found.foreign
    if len(found.slots) == entries:  # no orphan, nothing foreign: each frame's own length is right
        for arrived in frames:
            _count(arrived.replica, len(arrived.token), len(arrived.token))
        return
    size = len(state.fleet.replicas)
    live = np.bincount(state.slots.replica[found.slots], weights=found.counts, minlength=size)
    for arrived in frames:
        own = state.slots.replica[arrived.stream.astype(np.intp)] == arrived.replica.index
        made = int(own.sum() if arrived.count is None else arrived.count[own].sum())
        _count(arrived.replica, made, int(live[arrived.replica.index]))


def _count(replica: Endpoint, made: int, live: int) -> None:
    replica.generated_tokens += made
    replica.pool.measures.generated_tokens += made
    credit(replica, live)


def _sample_times(state: RouterState, arrived: Arrived, now: float) -> None:
    """Before the frame is sorted, which sets the times anew."""
    stream = arrived.stream
    try:
        gaps = now - state.slots.last_s[stream[state.slots.generated[stream] > 0]]
        if len(gaps):
            arrived.replica.pool.measures.between_tokens_s.observe_many(gaps)
            state.latencies.between_tokens.add_many(gaps, now)
    except Exception as error:
        state.faults.caught("accounts", error)


def _first_tokens(state: RouterState, found: Sorted, now: float) -> set[int]:
    """Marks requests whose first token this is; returns the sessions that must not wait for it."""
    urgent: set[int] = set()
    for slot in found.first:
        request: Request | None = state.slots.owner[slot]
        if request is not None:
            try:
                first_token(state, request, now)
            except Exception as error:  # a count may be off, no stream is
                state.faults.caught("accounts", error)
            urgent.add(request.sink_index)
    return urgent
