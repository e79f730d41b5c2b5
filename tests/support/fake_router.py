"""A stand-in for a router: a Tokens service in this process that answers what a test scripted.

    async with FakeRouter(lambda request: [504, 3575, END]) as router:
        ... router.address ..., router.requests, router.cancelled

A script is called once a request and returns its steps: a token id, a list of token ids that arrive together, END (the
request ends by stop), or a Finish. `gate` holds every step back until it is set, `permits` lets one pass for each
release; `step_s` paces them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Self

import grpc
import grpc.aio

from megatoken.tokens import wire
from megatoken.tokens.frames import column, pack
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1.tokens_pb2 import FINISH_REASON_CANCELLED, FINISH_REASON_STOP, Detail, Finish, GenerateRequest

END: Final = Finish(reason=FINISH_REASON_STOP)
Step = int | Sequence[int] | Finish | Detail
Script = Callable[[GenerateRequest], Sequence[Step]]


class FakeRouter:
    """Serves Session on a free loopback port."""

    def __init__(self, script: Script, step_s: float = 0.0) -> None:
        self.script = script
        self.step_s = step_s
        self.gate = asyncio.Event()
        self.gate.set()
        self.permits: asyncio.Semaphore | None = None
        self.requests: list[GenerateRequest] = []
        self.refusals = 0  # sessions that are refused from now on, as a router does that is shutting down
        self.cancelled: list[int] = []
        self.running = 0
        self.sessions: list[Any] = []
        self.keys: list[str | None] = []  # what each session showed as its key
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(
            self._session, columns.ClientFrame.FromString, columns.Frame.SerializeToString
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("megatoken.v1.Tokens", {"Session": handler}),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def break_sessions(self) -> None:
        """Ends every session with UNAVAILABLE, as a dying router would."""
        for session in self.sessions:
            session.cancel()
        self.sessions.clear()

    async def _session(self, frames: AsyncIterator[columns.ClientFrame], context: Any) -> AsyncIterator[columns.Frame]:
        if self.refusals:
            self.refusals -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "shutting down")
        await context.send_initial_metadata((wire.SESSION_TAKEN,))
        self.keys.append(dict(context.invocation_metadata()).get("authorization"))
        out: asyncio.Queue[columns.Frame] = asyncio.Queue()
        running: dict[int, asyncio.Task[None]] = {}
        reader = asyncio.create_task(self._read(frames, out, running))
        self.sessions.append(reader)
        try:
            while True:
                waiting = asyncio.create_task(out.get())
                done, _ = await asyncio.wait([waiting, reader], return_when=asyncio.FIRST_COMPLETED)
                if waiting in done:
                    yield waiting.result()
                    continue
                waiting.cancel()
                return
        finally:
            reader.cancel()
            for task in running.values():
                task.cancel()

    async def _read(
        self, frames: AsyncIterator[columns.ClientFrame], out: asyncio.Queue[columns.Frame], running: dict[int, Any]
    ) -> None:
        async for frame in frames:
            for start in frame.start:
                request = GenerateRequest.FromString(start.request.SerializeToString())
                self.requests.append(request)
                running[start.stream] = asyncio.create_task(self._run(start.stream, request, out))
            for stream in column(frame.cancel).tolist():
                self.cancelled.append(stream)
                task = running.pop(stream, None)
                if task is not None and not task.done():
                    task.cancel()
                    finish = Finish(stream=stream, reason=FINISH_REASON_CANCELLED)
                    out.put_nowait(columns.Frame(finish=[finish]))

    async def _run(self, stream: int, request: GenerateRequest, out: asyncio.Queue[columns.Frame]) -> None:
        self.running += 1
        with contextlib.suppress(asyncio.CancelledError), contextlib.closing(_Counted(self)):
            generated = 0
            permits = self.permits  # its own: one that is cancelled late must not take another request's
            for step in self.script(request):
                await self.gate.wait()
                if permits is not None:
                    await permits.acquire()
                await asyncio.sleep(self.step_s)
                if isinstance(step, Finish):
                    finish = Finish()
                    finish.CopyFrom(step)
                    finish.stream = stream
                    finish.prompt_tokens = len(request.prompt)
                    finish.generated_tokens = generated
                    out.put_nowait(columns.Frame(finish=[finish]))
                    return
                if isinstance(step, Detail):
                    tokens = list(step.logprobs.token)[:: max(1, step.logprobs.width)]
                    detail = Detail()
                    detail.CopyFrom(step)
                    detail.stream = stream
                    out.put_nowait(token_frame(stream, tokens, [detail]))
                else:
                    tokens = [step] if isinstance(step, int) else list(step)
                    out.put_nowait(token_frame(stream, tokens, []))
                generated += len(tokens)


class _Counted:
    """Takes one from `running` when a request ends, however it ends."""

    def __init__(self, router: FakeRouter) -> None:
        self.router = router

    def close(self) -> None:
        self.router.running -= 1


def token_frame(stream: int, tokens: Sequence[int], details: Sequence[Detail]) -> columns.Frame:
    """A frame with one stream's tokens."""
    if not tokens:
        return columns.Frame(detail=details)
    return columns.Frame(stream=pack([stream]), count=pack([len(tokens)]), token=pack(tokens), detail=details)
