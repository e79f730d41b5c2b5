"""The agent's side of the fork server and its reducers: starts, asks with a deadline, kills. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatoken.worker.throughput.decide.ledger import Totals
from megatoken.worker.throughput.reduce.reducer import FRAME, SECONDS, split_blobs

START_TIMEOUT_S: Final = 120.0  # importing torch on a machine that is busy starting engines
STOP_TIMEOUT_S: Final = 5.0


class ReduceFailure(Exception):
    """An epoch's group did not do what it was asked. `reason` is a label of megatoken_agent_errors_total."""

    def __init__(self, message: str, reason: str, suspects: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.suspects = suspects


class NoAnswer(ReduceFailure):
    """The reducer did not even report a timeout of its own: it is frozen, starved or stuck."""


@dataclass(frozen=True, slots=True)
class ReducedVector:
    """The sums of one reduction and how long it took, in the reducer's own clock."""

    sums: Totals
    seconds: float


class Reducer:
    """One epoch's process group, in a process of its own. One call at a time."""

    def __init__(
        self, forkserver: ForkServer, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._forkserver, self._number, self._reader, self._writer = forkserver, number, reader, writer

    async def connect(self, facts: dict[str, Any], timeout_s: float) -> None:
        """Joins the ranks of an epoch (process_group.ProcessGroup has the facts)."""
        await self._ask(b"C", json.dumps(facts).encode(), timeout_s, "connecting")

    async def gather(self, blob: bytes, timeout_s: float) -> list[bytes]:
        """Every rank's blob, in rank order."""
        return split_blobs(await self._ask(b"G", blob, timeout_s, "greeting"))

    async def reduce(self, vector: Totals, timeout_s: float, slack_s: float) -> ReducedVector:
        """The sum over the ranks. The native deadline is `timeout_s`, ours `slack_s` later."""
        payload = SECONDS.pack(timeout_s) + vector.tobytes()
        answer = await self._ask(b"R", payload, timeout_s + slack_s, "all-reduce")
        (seconds,) = SECONDS.unpack_from(answer)
        return ReducedVector(np.frombuffer(answer, np.int64, offset=SECONDS.size), seconds)

    def kill(self) -> None:
        """Ends the process and everything it held. The fork server does it before it forks another."""
        self._writer.transport.abort()
        self._forkserver.kill(self._number)

    async def _ask(self, kind: bytes, payload: bytes, timeout_s: float, what: str) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(FRAME.pack(len(payload), kind) + payload)
                await self._writer.drain()
                length, answered = FRAME.unpack(await self._reader.readexactly(FRAME.size))
                answer = await self._reader.readexactly(length)
        except TimeoutError:
            raise NoAnswer(f"{what}: no answer within {timeout_s:.2f} s", "timeout") from None
        except (OSError, asyncio.IncompleteReadError):
            raise ReduceFailure(f"{what}: the reducer process ended", "other") from None
        if answered == b"E":
            facts = json.loads(answer)
            raise ReduceFailure(facts["message"], facts["reason"], tuple(facts["suspects"]))
        return answer


class ForkServer:
    """The forking process. `start` may be called again after it died."""

    def __init__(self, store_listener: socket.socket) -> None:
        self._listener = store_listener
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self.backends: tuple[str, ...] = ()
        self.torch_version = ""

    @property
    def alive(self) -> bool:
        """Whether it runs and has imported all it needs."""
        return bool(self.backends) and self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Starts the process and waits for what it found on this node. Raises ReduceFailure."""
        await self.stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        listener = self._listener.fileno()
        command = [
            sys.executable,
            "-m",
            "megatoken.worker.throughput.reduce.forkserver",
            str(theirs.fileno()),
            str(listener),
        ]
        # A lost peer is normal here: no native stack on stderr, whose symbols cost seconds to look up.
        environment = {"TORCH_CPP_LOG_LEVEL": "FATAL", "TORCH_DISABLE_ADDR2LINE": "1", **os.environ}
        # From this thread, which lives as long as the agent: the fork server dies with the thread that started it.
        self._process = subprocess.Popen(  # noqa: ASYNC220  milliseconds; asyncio would use another thread
            command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), listener), env=environment
        )
        theirs.close()
        self._control = ours
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await asyncio.get_running_loop().sock_recv(ours, 65_536)
        except TimeoutError:
            line = b""
        if not line:
            await self.stop()
            raise ReduceFailure("the process that imports torch.distributed did not start", "backend")
        facts = json.loads(line)
        self.backends, self.torch_version = tuple(facts["backends"]), facts["torch"]

    async def fork(self) -> Reducer:
        """A fresh reducer. Raises ReduceFailure when the fork server is gone."""
        if self._control is None or not self.alive:
            raise ReduceFailure("the process that forks reducers ended", "other")
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [f"F {number}".encode()], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise ReduceFailure(f"the process that forks reducers does not answer ({error})", "other") from error
        finally:
            theirs.close()
        try:
            return Reducer(self, number, *await asyncio.open_connection(sock=ours))
        except BaseException:  # cancelled: the epoch is over before it began
            ours.close()
            self.kill(number)
            raise

    def kill(self, number: int) -> None:
        """Kills reducer `number`; done before any later fork."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(f"K {number}".encode())

    def abort(self) -> None:
        """SIGKILL, also for one that is frozen; its reducers die with it. `start` makes another."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Ends the fork server and every reducer, and waits."""
        self.backends = ()
        if self._control is not None:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is None:
            return
        deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT_S
        while process.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                process.kill()
                process.wait()
                break
            await asyncio.sleep(0.01)


def choose_backends(wanted: str, usable: tuple[str, ...]) -> tuple[str, ...]:
    """The backends an agent offers its group, best first. Raises ValueError when `wanted` is not usable here."""
    if wanted == "auto":
        return usable
    chosen = tuple(name for name in usable if name.partition("/")[0] == wanted)
    if not chosen:
        allowed = ", ".join(sorted({name.partition("/")[0] for name in usable})) or "none"
        needs = "; nccl needs a CUDA or ROCm device and a torch built for it" if wanted == "nccl" else ""
        raise ValueError(f"backend: {wanted!r} is not usable on this node (usable: auto, {allowed}){needs}")
    return chosen
