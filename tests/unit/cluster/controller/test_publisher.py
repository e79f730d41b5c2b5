"""Who waits for a snapshot is told when there is one, also where nothing in it is new."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatoken.cluster.controller.publisher import Members, Publisher
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.fleet import ClusterEvent, Fleet
from megatoken.cluster.inventory.topology import Inventory
from megatoken.v1 import membership_pb2

NOBODY = Members(Fleet(), (), Inventory(), {}, complete=True)


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state.sqlite")


async def test_the_first_snapshot_is_told_though_nobody_serves(store: StateStore) -> None:
    publisher = Publisher(store, lambda _event: None)
    waiting = asyncio.create_task(publisher.newer_than((0, 0)))
    await asyncio.sleep(0)
    assert not waiting.done(), "who serves is not known yet"
    publisher.publish(NOBODY)
    async with asyncio.timeout(5):
        snapshot = await waiting
    assert not snapshot.replicas


async def test_a_new_group_is_told_at_once_and_written_down_first(store: StateStore) -> None:
    events: list[ClusterEvent] = []
    publisher = Publisher(store, events.append)
    publisher.publish(NOBODY)
    first = publisher.versions.current
    waiting = asyncio.create_task(publisher.newer_than((first.epoch, first.version)))
    await asyncio.sleep(0)
    publisher.set_throughput(membership_pb2.ThroughputGroup(epoch=5), "one joined")
    async with asyncio.timeout(5):
        assert (await waiting).throughput.epoch == 5
    assert store.get("throughput_epoch") == "5"
    assert [event.kind for event in events] == ["throughput.epoch"]
