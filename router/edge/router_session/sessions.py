"""The edge's sessions with its router: one for all, or one for each API key.

With keys, a client's own key goes on to the router with its requests, so that limits and fair shares are the router's
to keep, in one place. With `router_key` set, the edge answers for its clients itself and has one session. Sessions of
keys are opened when first used and closed when idle. Built in assemble; asked by engine_core.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import grpc

from megatoken.errors import OverloadError
from megatoken.router.edge.config import EdgeConfig
from megatoken.router.edge.router_session.link import RouterLink
from megatoken.router.edge.router_session.session import Observer, Session
from megatoken.router.identity.api_keys import KeyRing
from megatoken.router.secure import channel_to

UPKEEP_S: Final = 1.0
IDLE_S: Final = 60.0  # a key's session without requests is closed after this
MAX_SESSIONS: Final = 4096
NO_KEY: Final = ""


class Sessions:
    """`after_frame` hooks are called after each frame of any session."""

    def __init__(self, config: EdgeConfig, observer: Observer, keys: KeyRing | None) -> None:
        self.after_frame: list[Callable[[], None]] = []
        self._config = config
        self._observer = observer
        self._keys = keys
        self._per_key = keys is not None and config.router_key is None
        self._open: dict[str, tuple[Session, RouterLink]] = {}
        self._used_s: dict[str, float] = {}
        self._users: Counter[str] = Counter()  # that may yet open a request, by key
        self._channel = channel_to(config.router, config.router_tls)  # tells whether the router is there
        self._told: Callable[[bool], None] = lambda _up: None
        self._upkeep: asyncio.Task[None] | None = None

    def watch_connection(self, told: Callable[[bool], None]) -> None:
        """`told` hears about once a second whether the router answers."""
        self._told = told

    def start(self) -> None:
        """Begins to connect. Call in the event loop."""
        if not self._per_key:
            self._session(NO_KEY)
        self._channel.get_state(try_to_connect=True)
        self._upkeep = asyncio.create_task(self._keep_up(), name="edge-sessions")

    @property
    def connected(self) -> bool:
        """Whether the router answers."""
        if not self._per_key:
            return all(link.connected for _, link in self._open.values())
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    @property
    def running(self) -> int:
        """Requests at the router."""
        return sum(session.running for session, _ in self._open.values())

    @contextlib.contextmanager
    def use(self, secret: str) -> Iterator[Session]:
        """The session for a caller's key, kept open meanwhile: until a request runs on it nothing else tells that it
        is needed. Raises OverloadError when the edge is full.
        """
        name = secret if self._per_key else NO_KEY
        session = self._session(name)
        self._users[name] += 1
        try:
            yield session
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]

    def _session(self, name: str) -> Session:
        limits = self._config.limits
        if self.running >= limits.max_requests:
            raise OverloadError(f"this edge has {limits.max_requests} requests running", 1.0)
        found = self._open.get(name)
        if found is None:
            if len(self._open) >= MAX_SESSIONS:
                raise OverloadError(f"this edge has callers with {MAX_SESSIONS} keys", 1.0)
            found = self._open[name] = self._connect(name or self._config.router_key)
        self._used_s[name] = time.monotonic()
        return found[0]

    async def close(self) -> None:
        """Closes every session and waits for it."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._upkeep
        for session, link in self._open.values():
            await link.close()
            session.close()
        await self._channel.close(None)

    def _connect(self, key: str | None) -> tuple[Session, RouterLink]:
        config = self._config
        limits = config.limits
        session = Session(
            limits.connect_timeout_s, self._observer, time.monotonic, self.after_frame, limits.router_return_s
        )
        link = RouterLink(
            config.router,
            session.on_frame,
            session.on_lost,
            config.router_tls,
            key,
            limits.max_request_bytes,
            session.on_connected,
        )
        session.attach(link)
        link.start()
        return session, link

    async def _keep_up(self) -> None:
        while True:
            self._told(self.connected)
            await asyncio.sleep(UPKEEP_S)
            if self._keys is not None:
                self._keys.refresh()
            for session, _ in self._open.values():
                session.give_up()
            now = time.monotonic()
            for name in [name for name, (session, _) in self._open.items() if session.running or self._users[name]]:
                self._used_s[name] = now
            idle = [name for name in self._open if name != NO_KEY and now - self._used_s[name] > IDLE_S]
            # All are let go before the first is waited for: until then a request may still take any of the others.
            links = [self._open.pop(name)[1] for name in idle]
            for name in idle:
                del self._used_s[name]
            await asyncio.gather(*(link.close() for link in links))
