"""The control loop when what it calls fails: it goes on, says so, and routers still hear who serves."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatoken.cluster.controller.loop import Controller, Settings
from megatoken.cluster.controller.membership import Versions
from megatoken.cluster.controller.server import MembershipServicer
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.backend import BackendState, ProcessLaunch, ProcessObservation
from megatoken.cluster.decide.device_health import Place
from megatoken.cluster.decide.fleet import Phase, Replica, ReplicaObservation, Reservation, WorkerFacts
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.secrets_keeper import SecretsKeeper
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.v1 import membership_pb2

NODES = Inventory((Node("n0", "127.0.0.1", tuple(Device("cpu", index) for index in range(4)), head=True),))
SPEC = ClusterSpec.model_validate(
    {
        "models": [{"name": "m", "engine": "simulated", "replicas": 2}],
        "agents": {"enabled": False},
        "routers": {"count": 0},
        "edge": {"count": 0},
        "control": {"tick_s": 0.1},
    }
)


class Backend:
    """Grants and starts at once; `broken` are calls (method, name) that raise."""

    ray_address = "127.0.0.1:1"
    head_node = "n0"

    def __init__(self) -> None:
        self.replicas: dict[str, ReplicaObservation] = {}
        self.broken: set[tuple[str, str]] = set()

    def directory_of(self, node: str) -> Path:
        return Path("/nowhere") / node

    def wait_change(self, wait_s: float) -> bool:
        time.sleep(min(wait_s, 0.01))
        return True

    def state(self) -> BackendState:
        processes: Mapping[str, ProcessObservation] = {}
        return BackendState(NODES, dict(self.replicas), processes)

    def reserve(self, replica: Replica) -> None:
        self._may("reserve", replica.id)
        self.replicas.setdefault(replica.id, ReplicaObservation(Reservation.GRANTED))

    def start_replica(self, replica: Replica, launch: ProcessLaunch) -> None:
        self._may("start", replica.id)
        facts = WorkerFacts(f"{replica.id}:1", 1, "simulated")
        self.replicas[replica.id] = ReplicaObservation(Reservation.GRANTED, Phase.SERVING, facts)

    def release(self, replica_id: str, grace_s: float) -> None:
        self._may("release", replica_id)
        self.replicas.pop(replica_id, None)

    def start_process(self, launch: ProcessLaunch) -> None: ...

    def stop_process(self, name: str, grace_s: float) -> None: ...

    def tail(self, name: str, lines: int, timeout_s: float) -> str:
        time.sleep(timeout_s if name == "m-1" else 0.0)
        return f"{lines} lines of {name}"

    def give_credentials(self, texts: Mapping[str, str], timeout_s: float) -> list[str]:
        return list(texts)

    def check_device(self, place: Place) -> None: ...

    def placement_group_id(self, replica_id: str) -> str:
        return ""

    def clean(self) -> None: ...

    def _may(self, method: str, name: str) -> None:
        if (method, name) in self.broken:
            raise RuntimeError(f"{method} of {name} is broken")


class Running:
    """A controller over a Backend, in this event loop."""

    def __init__(self, directory: Path) -> None:
        self.backend = Backend()
        self.store = StateStore(directory / "state.sqlite")
        self.store.put_spec(SPEC, {})
        settings = Settings("c", directory / "state.sqlite", True, "127.0.0.1", "127.0.0.1")
        self.controller = Controller(settings, self.store, SecretsKeeper(directory), lambda: self.backend)
        self.faults: list[str] = []
        self.controller.on_fault = self.faults.append
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.controller.run())

    async def until(self, condition: Callable[[], bool]) -> None:
        assert self.task is not None
        async with asyncio.timeout(10):
            while not condition():
                assert not self.task.done(), self.task
                await asyncio.sleep(0.01)

    def serving(self) -> list[str]:
        return [member.replica for member in self.controller.publisher.versions.current.replicas]

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.store.close()


@pytest.fixture
async def running(tmp_path: Path) -> Running:
    return Running(tmp_path)


async def test_an_action_that_raises_takes_no_other_along_and_the_snapshot_is_published(running: Running) -> None:
    running.backend.broken = {("reserve", "m-1")}
    running.start()
    try:
        await running.until(lambda: running.serving() == ["m-2"])
        assert "reserve of a replica" in running.faults
        running.backend.broken.clear()
        await running.until(lambda: sorted(running.serving()) == ["m-1", "m-2"])
    finally:
        await running.stop()


async def test_a_release_that_raises_does_not_keep_a_dead_replica_in_the_snapshot(running: Running) -> None:
    running.start()
    try:
        await running.until(lambda: len(running.serving()) == 2)
        running.backend.broken = {("release", "m-1")}
        facts = running.backend.replicas["m-1"].facts
        running.backend.replicas["m-1"] = ReplicaObservation(Reservation.GRANTED, Phase.EXITED, facts, "exit status 1")
        await running.until(lambda: "m-1" not in running.serving())
    finally:
        await running.stop()


async def test_a_first_snapshot_that_cannot_be_published_is_published_by_the_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = running.store.put, []

    def put(**fields: str) -> None:
        if not failed:
            failed.append(True)
            raise OSError("disk full")
        real(**fields)

    monkeypatch.setattr(running.store, "put", put)
    running.start()
    try:
        await running.until(lambda: len(running.serving()) == 2)
        assert running.faults == ["publishing"]
    finally:
        await running.stop()


async def test_an_onlooker_that_raises_does_not_end_the_loop(running: Running) -> None:
    def raising(_seconds: float, _ok: bool) -> None:
        raise ValueError("no such label")

    running.controller.on_tick = raising
    running.start()
    try:
        await running.until(lambda: len(running.serving()) == 2)
        assert "metrics" in running.faults
    finally:
        await running.stop()


async def test_the_epoch_of_a_throughput_group_is_written_down_before_it_is_told(running: Running) -> None:
    running.controller.publisher.set_throughput(membership_pb2.ThroughputGroup(epoch=7), "a test")
    assert running.store.get("throughput_epoch") == "7"
    await running.stop()


async def test_a_process_that_does_not_say_its_lines_delays_no_tick(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatoken.cluster.controller.loop.TAIL_S", 2.0)
    running.start()
    try:
        await running.until(lambda: len(running.serving()) == 2)
        tail = asyncio.create_task(running.controller.tail("m-1", 3))
        await asyncio.sleep(0.05)
        running.backend.replicas.pop("m-1")
        await running.until(lambda: "m-1" not in running.serving())
        assert not tail.done()
        assert await tail == "3 lines of m-1"
    finally:
        await running.stop()


async def test_a_controller_whose_ticks_stand_still_ends_so_that_it_is_started_anew(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatoken.cluster.controller.loop.STUCK_S", 0.5)
    monkeypatch.setattr("megatoken.cluster.controller.loop.STUCK_CHECK_S", 0.1)
    running.start()
    await running.until(lambda: len(running.serving()) == 2)
    await asyncio.sleep(1.0)
    assert running.task is not None
    assert not running.task.done(), "ticks end, so it lives"
    hold = threading.Event()
    monkeypatch.setattr(running.backend, "state", lambda: hold.wait(30) or BackendState())
    try:
        with pytest.raises(RuntimeError, match="a call of Ray does not return"):
            await asyncio.wait_for(running.task, 10)
    finally:
        hold.set()
        running.store.close()


async def test_what_a_full_disk_does_not_take_is_neither_done_nor_told_until_it_does(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    running.controller.on_event = lambda event: said.append(event.message)
    running.start()
    try:
        await running.until(lambda: len(running.serving()) == 2)
        before = running.controller.publisher.versions.current.version

        def full(*_: object, **__: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as disk:
            disk.setattr(running.store, "save_fleet", full)
            disk.setattr(running.store, "put", full)
            running.backend.replicas.pop("m-1")
            await running.until(lambda: running.faults.count("tick") >= 3)
            assert running.controller.publisher.versions.current.version == before
            assert not [message for message in said if "gone" in message]
        await running.until(lambda: "m-3" in running.serving())
        assert running.serving() == ["m-2", "m-3"]
        assert said.count("READY -> FAILED: its worker is gone") == 1
    finally:
        await running.stop()


async def test_a_controller_that_has_published_nothing_yet_tells_watchers_nothing(running: Running) -> None:
    """The number that the last controller left says who served then; with nobody in it, routers would serve nobody."""
    running.controller.publisher.versions = Versions(7, 3)
    watching = MembershipServicer(running.controller).Watch(membership_pb2.WatchRequest(), None)  # type: ignore[arg-type]
    first = asyncio.ensure_future(anext(watching))
    await asyncio.sleep(0.05)
    assert not first.done()
    running.start()
    try:
        told = await asyncio.wait_for(first, 10)
        assert (told.epoch, told.version, [model.model for model in told.models]) == (7, 4, ["m"])
    finally:
        await running.stop()


async def test_a_controller_that_lost_its_file_within_a_second_starts_a_later_epoch(tmp_path: Path) -> None:
    """Else it would tell other snapshots under the numbers of the last one, which routers have seen."""
    epochs = []
    for life in ("before", "after"):
        (tmp_path / life).mkdir()
        epochs.append(Running(tmp_path / life).controller.publisher.versions.current.epoch)
    assert epochs[0] < epochs[1]
