"""Shows a person how far a cluster is: events as they happen, and a sign of life while nothing does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from megatoken.cluster.client.control import CommandError, ControlClient, Unreachable
from megatoken.cluster.view.human import duration
from megatoken.v1 import control_pb2

POLL_S = 0.25
SIGN_OF_LIFE_S = 10.0
BAR_S = 0.1
CLEAR = "\r\x1b[K"
AWAY_S = 60.0  # how long a controller may not answer: Ray restarts one that died, and a busy machine is slow
QUIET_KINDS = ("throughput.epoch",)

Say = Callable[[str], None]


class Progress:
    """Prints lines with the seconds since it began, on stderr so that answers can be piped."""

    def __init__(self, say: Say | None = None) -> None:
        self._began = time.monotonic()
        self._said_at = self._began
        self._bar_at = 0.0
        self._terminal = say is None and sys.stderr.isatty()
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))

    def say(self, text: str) -> None:
        self._said_at = time.monotonic()
        self._say(f"{CLEAR if self._bar_at else ''}[{self._said_at - self._began:6.1f} s] {text}")
        self._bar_at = 0.0

    def bar(self, text: str) -> None:
        """Shows `text` in place of the bar before it; without a terminal, or with a `say` of its own, now and then."""
        now = time.monotonic()
        if not self._terminal:
            self.still(text)
        elif now - self._bar_at >= BAR_S:
            print(f"{CLEAR}[{now - self._began:6.1f} s] {text}", end="", file=sys.stderr, flush=True)
            self._bar_at = now

    def end_bar(self) -> None:
        """Takes the bar away, so that what is printed elsewhere begins a line."""
        if self._bar_at:
            print(CLEAR, end="", file=sys.stderr, flush=True)
            self._bar_at = 0.0

    def still(self, text: str) -> None:
        """Says `text` when nothing was said for a while."""
        if time.monotonic() - self._said_at >= SIGN_OF_LIFE_S:
            self.say(text)


def last_event(client: ControlClient) -> int:
    """The sequence number of the newest event."""
    return max((event.sequence for event in client.events()), default=0)


def wait_until_settled(
    client: ControlClient, *, timeout_s: float, after: int = 0, progress: Progress | None = None
) -> None:
    """Waits until every model has what it wants and every process serves, telling events after a sequence number.

    Raises CommandError when the time is over, or when the controller does not answer for AWAY_S.
    """
    progress = progress or Progress()
    deadline = time.monotonic() + timeout_s
    answered_s, seen = time.monotonic(), after
    while True:
        try:
            for event in client.events(seen):
                seen = event.sequence
                if event.kind not in QUIET_KINDS:
                    progress.say(f"{event.subject}: {event.message}")
            waiting = waiting_for(client.status())
            answered_s = time.monotonic()
        except Unreachable as error:
            if time.monotonic() - answered_s > AWAY_S:
                raise
            waiting = [str(error)]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise CommandError(f"not ready within {duration(timeout_s)}: {'; '.join(waiting)}")
        progress.still(f"waiting for {'; '.join(waiting)}")
        time.sleep(POLL_S)


def waiting_for(status: control_pb2.ClusterStatus) -> list[str]:
    """What is not as wanted yet; one phrase each. A blocked model is waited for no longer."""
    found = []
    for model in status.models:
        serving = sum(1 for r in status.replicas if r.model == model.model and r.state == "READY")
        ending = sum(1 for r in status.replicas if r.model == model.model and r.state == "DRAINING")
        starting = sum(1 for r in status.replicas if r.model == model.model and r.state in ("RESERVING", "STARTING"))
        given_up = bool(model.blocked) and not starting and serving < model.wanted
        if (serving != model.wanted and not given_up) or ending or model.rollout:
            doing = _phases(status, model.model)
            found.append(f"model {model.model}: {serving} of {model.wanted} replicas ready{doing}")
    found += [f"{entry.kind} {entry.name}: {entry.state}" for entry in status.processes if entry.state != "READY"]
    if not status.processes and status.models:
        found.append("the first look at the cluster")
    return found


def _phases(status: control_pb2.ClusterStatus, model: str) -> str:
    doing = [f"{row.replica}: {row.start_phase}" for row in status.replicas if row.model == model and row.start_phase]
    return f" ({', '.join(doing)})" if doing else ""


def wait_until_down(client: ControlClient, *, timeout_s: float, progress: Progress, gone: Callable[[], bool]) -> None:
    """Shows what still ends, until `gone` says that nothing is left. Raises CommandError."""
    deadline = time.monotonic() + timeout_s
    seen = None
    while not gone():
        if time.monotonic() > deadline:
            raise CommandError(f"the cluster is not down within {duration(timeout_s)}")
        try:
            if seen is None:
                seen = last_event(client)
            for event in client.events(seen):
                seen = event.sequence
                progress.say(f"{event.subject}: {event.message}")
        except Unreachable:
            pass  # it has ended; what it leaves is being cleared
        time.sleep(POLL_S)
