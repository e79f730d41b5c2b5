"""The Tokens service: Session and Generate over grpc.aio, on raw bytes.

Session: one task reads the caller's frames, the call's own writes one frame whenever the outlet has something. A
write waits for the caller's flow control and for nobody else. Each call ends in one `replica.close`, however it
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from megatoken.errors import RETRY_AFTER_KEY, MegatokenError, OverloadError, grpc_status
from megatoken.tokens.fields import fields_at_most
from megatoken.tokens.frames import MalformedFrame, column
from megatoken.tokens.outbox import FramePart
from megatoken.tokens.pieces import detail_stream
from megatoken.tokens.responses import WaitingResponses
from megatoken.tokens.wire import SESSION_TAKEN
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.leases import LeaseChecks, LeaseTable
from megatoken.worker.replica import RunningReplica, StreamInUseError
from megatoken.worker.streams.outlet import Outlet, Taken

SERVICE: Final = "megatoken.v1.Tokens"
END: Final[Any] = vars(grpc.aio)["EOF"]  # missing from the published stubs
REQUESTS_AT_ONCE: Final = 64  # taken on before the other callers have their turn
CANCELS_AT_ONCE: Final = 4096  # a message holds millions of numbers, and most cost but a look, some 0.2 us
STARTS_A_MESSAGE: Final = 1 << 17  # four times what a router sends in one; decoded, some 30 MB
OVERRUN_RETRY_S: Final = 1.0
GENERATE_STREAM: Final = 0  # the number of a Generate call's first choice


def tokens_handler(replica: RunningReplica, leases_of: Callable[[Any], LeaseChecks | None]) -> Any:
    """The service's method handlers; messages stay bytes, so that columns are packed and unpacked once.

    `leases_of(context)` says what a caller's requests must show; None: it is a router.
    """

    async def session(_requests: Any, context: Any) -> None:
        await context.send_initial_metadata((SESSION_TAKEN,))
        await serve_session(replica, context, Outlet(leases_of(context)))

    async def generate(request: bytes, context: Any) -> None:
        await serve_generate(replica, request, context, Outlet(leases_of(context)))

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Session": grpc.stream_stream_rpc_method_handler(session),
            "Generate": grpc.unary_stream_rpc_method_handler(generate),
        },
    )


async def serve_session(replica: RunningReplica, context: Any, outlet: Outlet) -> None:
    """Serves one Session call until the caller closed its half and its requests ended, or the call is gone."""
    # Routers are told the load and what leases used; so is everybody on a worker that cannot tell who is one.
    replica.open(outlet, wants_load=not isinstance(outlet.leases, LeaseTable))
    reader = asyncio.create_task(_read_session(replica, outlet, context))
    reader.add_done_callback(lambda _task: outlet.wake())
    try:
        while True:
            taken = outlet.take()
            if taken is not None:
                replica.written(taken.tokens)
                await context.write(taken.frame())
                continue
            if reader.done():
                problem = reader.exception()
                if isinstance(problem, MegatokenError):
                    await context.abort(*grpc_status(problem))
                if problem is not None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(problem))
                if outlet.idle:
                    return
            await outlet.wait()
    finally:
        replica.close(outlet)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reader


async def _read_session(replica: RunningReplica, outlet: Outlet, context: Any) -> None:
    """Takes the caller's frames until it closes its half.

    Raises ValueError for bytes that are no frame, OverloadError for a caller that only sends.
    """
    while True:
        raw = await context.read()
        if raw is END:
            return
        if not await fields_at_most(raw, STARTS_A_MESSAGE):  # before a decoder makes an object of each; cancels are one
            raise ValueError(f"a message of {len(raw)} bytes holds more than {STARTS_A_MESSAGE} requests")
        try:
            frame = columns.ClientFrame.FromString(raw)
            cancelled = column(frame.cancel)
        except (DecodeError, MalformedFrame) as error:
            raise ValueError(f"a message of {len(raw)} bytes is no ClientFrame: {error}") from None
        try:
            taken = 0
            for start in frame.start:
                replica.submit(outlet, start.stream, start.request)
                if outlet.overrun:
                    raise OverloadError("this session reads no answers, and too many wait for it", OVERRUN_RETRY_S)
                taken += max(1, start.request.sampling.n)
                if taken >= REQUESTS_AT_ONCE:
                    taken = 0
                    await asyncio.sleep(0)
        except StreamInUseError as error:
            raise ValueError(str(error)) from None
        for first in range(0, len(cancelled), CANCELS_AT_ONCE):
            if first:
                await asyncio.sleep(0)
            replica.cancel(outlet, cancelled[first : first + CANCELS_AT_ONCE].tolist())


async def serve_generate(replica: RunningReplica, raw: bytes, context: Any, outlet: Outlet) -> None:
    """Serves one Generate call: a message a step, or fewer when the caller is slow."""
    try:
        request = columns.GenerateRequest.FromString(raw)
    except DecodeError as error:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"a message of {len(raw)} bytes is no GenerateRequest: {error}"
        )
    replica.open(outlet, wants_load=False)
    waiting = WaitingResponses()
    try:
        request.timeout_ms = 0  # the call's own deadline counts
        replica.submit(outlet, GENERATE_STREAM, request)
        refused = not outlet.slots
        while True:
            taken = outlet.take()
            if taken is not None:
                if refused or _only_error(taken):
                    await _abort(context, _last_finish(taken))
                replica.written(taken.tokens)
                for part in taken.parts:
                    add_part(waiting, part)
                while waiting:
                    await context.write(waiting.take())
                continue
            if outlet.idle:
                return
            await outlet.wait()
    finally:
        replica.close(outlet)


def _only_error(taken: Taken) -> bool:
    """Whether all that waits is the failure of the whole request, which Generate tells as its status."""
    return not taken.tokens and _last_finish(taken).reason == pb.FINISH_REASON_ERROR


def _last_finish(taken: Taken) -> pb.Finish:
    finishes = [finish for part in taken.parts for finish in part.finishes]
    return pb.Finish.FromString(finishes[-1] if finishes else b"")


async def _abort(context: Any, finish: pb.Finish) -> None:
    code = next((code for code in grpc.StatusCode if code.value[0] == finish.code), grpc.StatusCode.INTERNAL)
    trailing = ((RETRY_AFTER_KEY, str(finish.retry_after_ms)),) if finish.retry_after_ms else ()
    await context.abort(code, finish.message, trailing)


def add_part(waiting: WaitingResponses, part: FramePart) -> None:
    """Adds what a step made for a Generate call, whose streams are its choices."""
    details: dict[int, list[bytes]] = {}
    for encoded in part.details:
        details.setdefault(detail_stream(encoded), []).append(encoded)
    if part.stream is not None and part.token is not None:
        counts = np.ones(len(part.stream), np.int64) if part.counts is None else part.counts
        tokens = np.split(part.token, np.cumsum(counts)[:-1])
        for choice, own in zip(part.stream.tolist(), tokens, strict=True):
            waiting.add(choice, own.tobytes(), details.pop(choice, []))
    for choice, left in details.items():
        waiting.add(choice, b"", left)
    for encoded in part.finishes:
        finish = pb.Finish.FromString(encoded)
        waiting.finish(finish.stream, finish)
