"""Waiting for a cluster outlives a controller that is away for a moment, and not one that stays away."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from megatoken.cluster.client import progress
from megatoken.cluster.client.control import Unreachable
from megatoken.v1 import control_pb2

SETTLED = control_pb2.ClusterStatus(
    processes=[control_pb2.ProcessStatus(name="router-0", kind="router", state="READY")]
)


class Client:
    """Does not answer its first `away` questions."""

    def __init__(self, away: int) -> None:
        self.away = away

    def events(self, after: int = 0) -> Iterator[control_pb2.Event]:
        return iter(())

    def status(self) -> control_pb2.ClusterStatus:
        self.away -= 1
        if self.away >= 0:
            raise Unreachable("the controller at h:1 cannot be reached: refused")
        return SETTLED


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second a look."""
    seconds = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(progress.time, "sleep", lambda _: None)


def wait(client: Any) -> None:
    progress.wait_until_settled(client, timeout_s=1000, progress=progress.Progress(lambda _: None))


def test_a_controller_that_comes_back_is_waited_for() -> None:
    client = Client(away=5)
    wait(client)
    assert client.away == -1


def test_a_controller_that_stays_away_is_given_up() -> None:
    with pytest.raises(Unreachable, match="cannot be reached"):
        wait(Client(away=10_000))
