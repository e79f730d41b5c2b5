"""The descriptor of a busy connection is found by its peer, and looked for once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from megatoken.router.shell.calls import cork
from megatoken.router.shell.calls.cork import Corks, find_socket


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, str]]:
    """The server's end of a connection, and its peer as gRPC writes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        host, port = client.getsockname()
        server, _ = listener.accept()
        with server:
            yield server, f"ipv4:{host}:{port}"


def test_a_connection_is_found_by_its_peer(pair: tuple[socket.socket, str]) -> None:
    server, peer = pair
    assert find_socket(peer) == server.fileno()
    assert find_socket("ipv4:127.0.0.1:1") == -1
    assert find_socket("unix:/x") == -1


def test_descriptors_are_walked_once_a_connection(
    pair: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, peer = pair
    walks: list[str] = []
    monkeypatch.setattr(cork, "find_socket", lambda wanted: walks.append(wanted) or find_socket(wanted))
    corks = Corks()
    for _ in range(5):  # from one call to two and back to none, again and again
        calls = [corks.join(peer), corks.join(peer)]
        assert calls[0].descriptor == server.fileno()
        for call in calls:
            corks.leave(call)
    assert walks == [peer]


def test_a_descriptor_that_is_another_connection_by_now_is_not_corked(pair: tuple[socket.socket, str]) -> None:
    server, peer = pair
    corks = Corks()
    for call in [corks.join(peer), corks.join(peer)]:
        corks.leave(call)
    server.close()
    corks.join(peer)
    assert corks.join(peer).descriptor == -1


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cork, "MAX_KNOWN", 3)
    monkeypatch.setattr(cork, "find_socket", lambda _: -1)
    corks = Corks()
    for port in range(1, 10):
        for call in [corks.join(f"ipv4:127.0.0.1:{port}") for _ in range(2)]:
            corks.leave(call)
    assert len(corks._known) == 3
