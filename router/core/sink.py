"""SessionSink: the core's end of one client session."""

from __future__ import annotations

import numpy as np

from megatoken.router.core.request import Request
from megatoken.tokens.frames import U32
from megatoken.tokens.outbox import FrameOutbox, FramePart


class SessionSink:
    """An outbox of columns. `wake` is the shell's: it tells the session's writer that there is something to send."""

    def __init__(self) -> None:
        self.index = -1
        self.outbox = FrameOutbox()
        self.requests: dict[int, Request] = {}  # live ones, by the client's stream number

    def wake(self) -> None:
        """Nothing here; the shell's subclass sets its writer going."""

    def push_tokens(self, request: Request, packed: bytes, details: list[bytes]) -> None:
        token = np.frombuffer(packed, U32)
        count = None if len(token) == 1 else np.array([len(token)], U32)
        self.outbox.add_part(FramePart(np.array([request.stream], U32), count, token, details, []))
        self.outbox.urgent = True
        self.wake()

    def push_finish(self, request: Request, finish: bytes) -> None:
        self.requests.pop(request.stream, None)
        self.outbox.add_finish(finish)
        self.wake()
