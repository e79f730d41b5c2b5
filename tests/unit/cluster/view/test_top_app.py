"""cluster/view/top/app.py without a terminal: keys, dialogs and what they ask of the cluster."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from megatoken.cluster.view.top.app import Top
from megatoken.cluster.view.top.view import Inputs
from megatoken.v1.control_pb2 import ClusterStatus, Event, ModelStatus, ReplicaStatus


class StubFeed:
    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []
        self.refuse = ""
        self.status = ClusterStatus(
            cluster="demo",
            models=[ModelStatus(model="chat", wanted=2, ready=2), ModelStatus(model="code", wanted=1, ready=1)],
            replicas=[
                ReplicaStatus(replica="chat-0", model="chat", state="READY", waiting=1),
                ReplicaStatus(replica="chat-1", model="chat", state="READY", waiting=9),
                ReplicaStatus(replica="code-0", model="code", state="READY"),
            ],
        )

    @property
    def events(self) -> Sequence[Event]:
        return [Event(sequence=number, subject=f"e{number}", message="x") for number in range(40)]

    def inputs(self) -> Inputs:
        return Inputs(status=self.status)

    async def drain(self, replica: str) -> None:
        self._answer("drain", replica)

    async def scale(self, model: str, replicas: int) -> None:
        self._answer("scale", (model, replicas))

    def _answer(self, what: str, value: object) -> None:
        if self.refuse:
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.INVALID_ARGUMENT, empty, empty, self.refuse)
        self.asked.append((what, value))


@pytest.fixture
def feed() -> StubFeed:
    return StubFeed()


def replicas(app: Top) -> list[str | None]:
    return [key.value for key in app.query_one("#replicas", DataTable).rows]


def text(app: Top, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).render())


async def press(pilot: Pilot[None], *keys: str) -> None:
    await pilot.press(*keys)
    await pilot.pause()


async def test_rows_appear_and_follow_the_cluster(feed: StubFeed) -> None:
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert replicas(app) == ["chat-0", "chat-1", "code-0"]
        await press(pilot, "down")
        del feed.status.replicas[0]
        app.redraw()
        await pilot.pause()
        assert replicas(app) == ["chat-1", "code-0"]
        assert app._chosen("replicas") == "chat-1"  # the cursor stays on its replica
        assert len(text(app, "events").splitlines()) <= 5
        assert "e39" in text(app, "events")


async def test_sort_reverse_filter_and_pause(feed: StubFeed) -> None:
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        while app._sort != "waiting":
            await press(pilot, "s")
        assert replicas(app) == ["chat-1", "chat-0", "code-0"]
        await press(pilot, "r")
        assert replicas(app)[0] == "code-0"
        await press(pilot, "slash", *"code", "enter")
        assert replicas(app) == ["code-0"]
        assert "filter 'code'" in text(app, "title")
        await press(pilot, "slash", "escape")
        assert len(replicas(app)) == 3
        await press(pilot, "p")
        feed.status = ClusterStatus()
        app.redraw()
        assert len(replicas(app)) == 3
        assert "PAUSED" in text(app, "title")


async def test_drain_asks_first(feed: StubFeed) -> None:
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "down", "d", "n")
        assert feed.asked == []
        await press(pilot, "d", "escape")
        assert feed.asked == []
        await press(pilot, "d", "y")
        assert feed.asked == [("drain", "chat-1")]


async def test_scale_asks_first_and_takes_a_number(feed: StubFeed) -> None:
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "plus", "n")
        await press(pilot, "plus", "y")
        await press(pilot, "minus", "y")
        await press(pilot, "n", "backspace", "7", "enter", "y")
        await press(pilot, "n", "escape")
        await press(pilot, "end", "down", "down", "minus", "y")  # code-0
        assert feed.asked == [
            *(("scale", ("chat", 3)), ("scale", ("chat", 1))),
            *(("scale", ("chat", 7)), ("scale", ("code", 0))),
        ]


async def test_a_refusal_is_shown_and_the_view_goes_on(feed: StubFeed) -> None:
    feed.refuse = "replicas: 10 is not allowed; at most 9"
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "plus", "y")
        await pilot.pause()
        assert [note.message for note in app._notifications] == [feed.refuse]
        assert app.is_running


async def test_events_can_take_the_whole_screen(feed: StubFeed) -> None:
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "e")
        await pilot.pause()
        assert not app.query_one("#replicas").display
        assert len(text(app, "events").splitlines()) > 10
        await press(pilot, "e")
        assert app.query_one("#replicas").display


async def test_an_empty_cluster_is_no_error(feed: StubFeed) -> None:
    feed.status = ClusterStatus()
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "d", "plus", "n", "s", "e")
        assert feed.asked == []
        assert app.is_running
