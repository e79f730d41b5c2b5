"""A controller that cannot serve ends its process, so that Ray starts it again; its ports are its own to keep."""

import asyncio
import random
import socket
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from megatoken.cluster.controller import main as controller_main
from megatoken.cluster.controller.main import SETTLED_PORTS, ControllerActor, bind_patiently, settle_ports
from megatoken.cluster.controller.ports import candidates, ephemeral_range, find_ports
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.spec.cluster import ClusterSpec

SPEC = ClusterSpec.model_validate(
    {
        "models": [{"name": "m", "engine": "simulated"}],
        "control": {"port": 0},
        "routers": {"port": 0},
        "edge": {"port": 0},
    }
)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def no_ray(_cluster: str, _root: Path) -> NoReturn:
    pytest.fail("the controller serves, though its port is held")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the process would have ended; nothing here waits long."""
    event = threading.Event()
    monkeypatch.setattr(controller_main, "end_process", event.set)
    monkeypatch.setattr(controller_main, "collect_logs", lambda *_: deque(maxlen=1))
    monkeypatch.setattr(controller_main, "ray_backend", no_ray)
    monkeypatch.setattr(controller_main, "RESTART_BIND_S", 0.3)
    monkeypatch.setattr(controller_main, "EXIT_PAUSE_S", 0.05)
    return event


@pytest.mark.parametrize("service", ["control.port", "control.metrics_port"])
def test_a_restarted_controller_whose_port_stays_held_ends_its_process(
    tmp_path: Path,
    taken: int,
    ended: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    service: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(controller_main, "was_restarted", lambda: True)
    path = tmp_path / "state.sqlite"
    store = StateStore(path)
    store.put_spec(SPEC, {})
    ports = dict(zip(SETTLED_PORTS, find_ports(len(SETTLED_PORTS), "127.0.0.1", random.Random()), strict=True))
    store.put_ports({**ports, service: taken})
    store.close()
    actor = ControllerActor("c", str(path), str(tmp_path), "127.0.0.1", None)
    assert ended.wait(10), "the actor lives on without a controller"
    assert actor.address(0.0) == ("", "")
    assert f"{service}: {taken} is not allowed; it is in use on 127.0.0.1" in caplog.text


def test_a_new_controller_first_says_what_is_wrong(
    tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_main, "was_restarted", lambda: False)
    monkeypatch.setattr(controller_main, "PROBLEM_KEPT_S", 0.5)
    actor = ControllerActor("c", str(tmp_path / "state.sqlite"), str(tmp_path), "127.0.0.1", None)
    assert actor.address(10.0) == ("", "no spec was given and the state file holds none")
    assert not ended.is_set()  # whoever asked is to read it, and ends the actor
    assert ended.wait(10)


async def test_a_bind_is_tried_again_until_the_port_is_free(taken: int) -> None:
    tries = 0

    async def bind() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("in use")
        return "bound"

    assert await bind_patiently("control.metrics_port", taken, "127.0.0.1", bind) == "bound"


async def test_a_bind_that_never_works_names_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_main, "RESTART_BIND_S", 0.0)

    async def bind() -> None:
        await asyncio.sleep(0.01)
        raise RuntimeError("in use")

    with pytest.raises(RuntimeError, match=r"control.port: 9 is not allowed; it is in use on ::1"):
        await bind_patiently("control.port", 9, "::1", bind)


def test_settled_ports_lie_outside_the_range_of_outgoing_connections(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.sqlite")
    settle_ports(store, SPEC, "127.0.0.1")
    low, high = ephemeral_range()
    settled = store.ports()
    assert settled.keys() == set(SETTLED_PORTS)
    assert len(set(settled.values())) == len(SETTLED_PORTS)
    assert not [port for port in settled.values() if low <= port <= high]
    settle_ports(store, SPEC, "127.0.0.1")
    assert store.ports() == settled


def test_the_range_is_the_kernels_and_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "range").write_text("40000\t50000\n")
    assert ephemeral_range(tmp_path / "range") == (40_000, 50_000)
    assert ephemeral_range(tmp_path / "none") == (32_768, 60_999)
    kept = candidates((40_000, 50_000))
    assert (min(kept), max(kept)) == (20_000, 65_535)
    assert not set(kept) & set(range(40_000, 50_001))
    assert not candidates((1024, 65_535))


def test_a_machine_without_room_outside_the_range_still_gets_ports() -> None:
    assert len(set(find_ports(3, "127.0.0.1", random.Random(1), (1024, 65_535)))) == 3


def test_settled_ports_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path / "state.sqlite")
    settle_ports(store, SPEC, "127.0.0.1")
    monkeypatch.setattr(store, "put_ports", lambda _ports: pytest.fail("the disk may be full"))
    settle_ports(store, SPEC, "127.0.0.1")
    store.close()


@pytest.mark.parametrize("lost", [True, False])
def test_a_restarted_controller_takes_the_spec_it_was_given_only_where_its_file_is_lost(
    tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    served = threading.Event()

    def no_ray_yet(_cluster: str, _root: Path) -> NoReturn:
        served.set()
        raise RuntimeError("no Ray")

    monkeypatch.setattr(controller_main, "ray_backend", no_ray_yet)
    monkeypatch.setattr(controller_main, "was_restarted", lambda: True)
    path = tmp_path / "state.sqlite"
    later = SPEC.with_replicas("m", 3)
    if not lost:
        store = StateStore(path)
        store.put_spec(later, {})
        store.close()
    ControllerActor("c", str(path), str(tmp_path), "127.0.0.1", SPEC.model_dump_json())
    assert served.wait(10)
    assert ended.wait(10)
    assert StateStore(path).spec() == (SPEC if lost else later)
