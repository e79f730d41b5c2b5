"""The asyncio Python client: requests over Session, to one router or several.

    async with TokenClient(["127.0.0.1:7000"]) as client:
        stream = client.generate("smollm2", prompt=[1, 2, 3], max_tokens=64, temperature=0.0)
        async for delta in stream:
            print(delta.tokens)
        print(stream.finish.reason)

`TokenClient` gives each request its own stream of deltas. `columns.ColumnSession` below it hands out whole frames as
columns, for callers that serve many requests at once (the edge). Errors are those of megatoken.errors.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from megatoken.errors import MegatokenError, RequestError, UnavailableError
from megatoken.reconnect import Pauses
from megatoken.router.client.columns import ColumnSession, error_of
from megatoken.router.secure import channel_to
from megatoken.tls import ClientTls
from megatoken.tokens.frames import MalformedFrame, pack, token_columns
from megatoken.tokens.wire import MAX_REQUEST_BYTES, too_large
from megatoken.v1 import frame_columns_pb2, router_pb2, router_pb2_grpc, tokens_pb2

Finish = tokens_pb2.Finish
CLOSED = "the client was closed"
ATTEMPTS = 3  # of a request that has had no token, when its router goes away


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice."""

    tokens: list[int]
    choice: int = 0
    logprobs: tokens_pb2.Logprobs | None = None
    prompt_logprobs: tokens_pb2.Logprobs | None = None


class TokenStream:
    """One request's deltas: `async for`. Raises the request's error; `finish` is set once it ended well."""

    def __init__(self, client: TokenClient, request: bytes, choices: int) -> None:
        self._client = client
        self._deltas: deque[Delta] = deque()
        self._something = asyncio.Event()
        self._error: MegatokenError | None = None
        self.request = request
        self.choices = choices
        self.finishes: dict[int, Finish] = {}
        self.session: ColumnSession | None = None
        self.stream = -1
        self.attempts = 0
        self.moved = False  # has had a token

    @property
    def finish(self) -> Finish | None:
        """Of choice 0; None before it ended."""
        return self.finishes.get(0)

    def cancel(self) -> None:
        """Asks for the end; the stream still ends with a Finish, CANCELLED."""
        if self.session is not None and not self._ended():
            self.session.cancel(range(self.stream, self.stream + self.choices))

    async def tokens(self) -> list[int]:
        """All tokens of choice 0, when it is done."""
        return [token async for delta in self if delta.choice == 0 for token in delta.tokens]

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Delta]:
        try:
            while True:
                while self._deltas:
                    yield self._deltas.popleft()
                if self._error is not None:
                    raise self._error
                if self._ended():
                    return
                self._something.clear()
                await self._something.wait()
        finally:
            self.cancel()

    def push(self, delta: Delta) -> None:
        self.moved = True
        self._deltas.append(delta)
        self._something.set()

    def fail(self, error: MegatokenError) -> None:
        self._error = error
        self._something.set()

    def end(self, choice: int, finish: Finish) -> None:
        self.finishes[choice] = finish
        if finish.reason == tokens_pb2.FINISH_REASON_ERROR and self._error is None:
            self._error = error_of(finish.code, finish.message, finish.retry_after_ms)
        self._something.set()

    def _ended(self) -> bool:
        return len(self.finishes) == self.choices or self._error is not None


class TokenClient:
    """Connected to every router given; a request goes to the one with the fewest of ours."""

    def __init__(
        self,
        routers: Sequence[str],
        *,
        api_key: str | None = None,
        tls: ClientTls | None = None,
        connect_timeout_s: float = 10.0,
    ) -> None:
        if not routers or not all(routers):
            raise RequestError("routers", routers, "at least one host:port, and no empty one")
        self._routers = list(routers)
        self._api_key = api_key
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._draining: set[ColumnSession] = set()  # their routers take no new requests
        self._waiting: list[tuple[float, TokenStream]] = []  # until when, for a session
        self._streams: dict[ColumnSession, dict[int, tuple[TokenStream, int]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._connected = asyncio.Event()
        self._closed = False

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Waits for the first router. Raises UnavailableError when none answers in connect_timeout_s."""
        self._tasks = [asyncio.create_task(self._keep(address)) for address in self._routers]
        try:
            async with asyncio.timeout(self._connect_timeout_s):  # wait_for may lose a cancel
                await self._connected.wait()
        except TimeoutError:
            await self.close()
            raise UnavailableError(
                f"no router answers at {', '.join(self._routers)} within {self._connect_timeout_s:.0f} s"
            ) from None

    async def close(self) -> None:
        """Ends the sessions. Streams that have not ended raise UnavailableError, and so does every later one."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        waiting, self._waiting = self._waiting, []
        for _, stream in waiting:
            stream.fail(UnavailableError(CLOSED))

    def generate(
        self,
        model: str,
        prompt: Sequence[int] | np.ndarray[Any, Any],
        *,
        sampling: tokens_pb2.SamplingParams | None = None,
        fields: dict[str, Any] | None = None,
        lease: router_pb2.AssignResponse | None = None,
        **sampling_fields: Any,
    ) -> TokenStream:
        """Starts a request. Sampling as a message, or by its field names; `fields` are others of GenerateRequest.

        `lease` is a router's answer to Assign, for a client that is connected to that lease's address.
        """
        request = frame_columns_pb2.GenerateRequest(model=model, **(fields or {}))
        if lease is not None:
            request.lease, request.request_id = lease.lease, lease.request_id
        try:
            request.prompt = pack(prompt)
        except (OverflowError, ValueError, TypeError):
            raise RequestError("prompt", prompt, "token ids from 0 to 2**32 - 1") from None
        if sampling is not None:
            request.sampling.CopyFrom(sampling)
        if sampling_fields:
            request.sampling.MergeFrom(tokens_pb2.SamplingParams(**sampling_fields))
        encoded = request.SerializeToString()
        if len(encoded) > MAX_REQUEST_BYTES:  # before it waits for a session, which it would end for all others
            raise too_large(len(encoded), MAX_REQUEST_BYTES)
        stream = TokenStream(self, encoded, max(1, request.sampling.n))
        self._submit(stream)
        return stream

    async def models(self, timeout_s: float = 5.0) -> list[router_pb2.ModelInfo]:
        """What can be asked for."""
        last: MegatokenError = UnavailableError("no router")
        for address in self._routers:
            channel = channel_to(address, self._tls)
            try:
                stub = router_pb2_grpc.RouterStub(channel)
                request = router_pb2.ListModelsRequest()
                response = await stub.ListModels(request, timeout=timeout_s, metadata=self._metadata())
                return list(response.models)
            except Exception as error:  # the next router may know
                last = UnavailableError(f"{address}: {error}")
            finally:
                await channel.close(None)
        raise last

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._api_key}"),) if self._api_key else ()

    def open_sessions(self) -> list[ColumnSession]:
        """Sessions that take new requests."""
        return [session for session in self._streams if session not in self._draining]

    def _submit(self, stream: TokenStream) -> None:
        if self._closed:
            stream.fail(UnavailableError(CLOSED))
            return
        open_sessions = self.open_sessions()
        if not open_sessions:
            self._waiting.append((asyncio.get_running_loop().time() + self._connect_timeout_s, stream))
            return
        session = min(open_sessions, key=lambda session: len(self._streams[session]))
        stream.session = session
        stream.attempts += 1
        stream.stream = session.submit(stream.request, stream.choices)
        for choice in range(stream.choices):
            self._streams[session][stream.stream + choice] = (stream, choice)

    async def _keep(self, address: str) -> None:
        """Keeps a session to one router open, and hands its frames to their streams."""
        pauses = Pauses()
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            session = ColumnSession(address, self._metadata(), self._tls)
            try:
                await session.open(self._connect_timeout_s)
                self._streams[session] = {}
                self._connected.set()
                self._submit_waiting()
                async for frame in session.frames():
                    self._hand_out(session, frame)
                lost: MegatokenError = UnavailableError(f"router {address} ended the session")
            except MegatokenError as error:
                lost = error
            except MalformedFrame as error:
                lost = UnavailableError(f"router {address} sent a malformed frame: {error}")
            except Exception as error:  # a certificate that cannot be read just now, say: the next attempt may
                lost = UnavailableError(f"router {address}: {error!r}")
            except asyncio.CancelledError:
                for stream, _ in self._streams.get(session, {}).values():  # nobody reads their answers any more
                    stream.fail(UnavailableError(CLOSED))
                raise
            finally:
                live = self._streams.pop(session, {})
                drained = session in self._draining
                self._draining.discard(session)
                await session.close()
            self._lost(live, lost)
            if drained:
                return  # another task keeps the session that replaced it
            self._give_up_waiting()
            await asyncio.sleep(pauses.after(clock() - began))

    def _lost(self, live: dict[int, tuple[TokenStream, int]], error: MegatokenError) -> None:
        for stream in dict.fromkeys(stream for stream, _ in live.values()):
            if not self._again(stream):
                stream.fail(error)

    def _again(self, stream: TokenStream) -> bool:
        """Sends a request that has had nothing yet once more, to whichever router is there."""
        if stream.moved or stream.finishes or stream.attempts >= ATTEMPTS:
            return False
        self._submit(stream)
        return True

    def _submit_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for _, stream in waiting:
            self._submit(stream)

    def _give_up_waiting(self) -> None:
        now = asyncio.get_running_loop().time()
        late = [stream for until, stream in self._waiting if until <= now]
        self._waiting = [(until, stream) for until, stream in self._waiting if until > now]
        for stream in late:
            stream.fail(UnavailableError(f"no router answers at {', '.join(self._routers)}"))

    def _drains(self, session: ColumnSession) -> None:
        """Its router takes no new requests: open another session, to the router that took the port over."""
        if session not in self._draining:
            self._draining.add(session)
            self._tasks.append(asyncio.create_task(self._keep(session.address)))

    def _hand_out(self, session: ColumnSession, frame: frame_columns_pb2.Frame) -> None:
        live = self._streams[session]
        numbers, counts, tokens = token_columns(frame)
        details: dict[int, list[tokens_pb2.Detail]] = {}
        for detail in frame.detail:
            details.setdefault(detail.stream, []).append(detail)
        if len(numbers):
            each = numbers if counts is None else np.repeat(numbers, counts)
            order = np.argsort(each, kind="stable")
            each, values = each[order], tokens[order].tolist()
            edges = [0, *(np.flatnonzero(each[1:] != each[:-1]) + 1).tolist(), len(each)]
            for first, last in itertools.pairwise(edges):
                number = int(each[first])
                entry = live.get(number)
                if entry is not None:
                    entry[0].push(_delta(values[first:last], entry[1], details.pop(number, None)))
        for number, early in details.items():  # a long prompt's log probabilities come before its first token
            entry = live.get(number)
            if entry is not None:
                entry[0].push(_delta([], entry[1], early))
        for finish in frame.finish:
            entry = live.pop(finish.stream, None)
            if entry is None:
                continue
            if finish.draining:
                self._drains(session)
                if entry[0].choices == 1 and self._again(entry[0]):
                    continue
            entry[0].end(entry[1], finish)


def _delta(tokens: list[int], choice: int, details: list[tokens_pb2.Detail] | None) -> Delta:
    if not details:
        return Delta(tokens, choice)
    joined = tokens_pb2.Detail()
    for detail in details:
        if detail.HasField("logprobs"):
            joined.logprobs.MergeFrom(detail.logprobs)  # rows after rows
        if detail.HasField("prompt_logprobs"):
            joined.prompt_logprobs.MergeFrom(detail.prompt_logprobs)
    return Delta(
        tokens,
        choice,
        joined.logprobs if joined.HasField("logprobs") else None,
        joined.prompt_logprobs if joined.HasField("prompt_logprobs") else None,
    )
