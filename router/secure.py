"""The options of every channel that a router or a client of it opens."""

from __future__ import annotations

from typing import Any, Final, cast

from grpc import aio

from megatoken.tls import ClientTls, Options, open_channel

EOF: Final[Any] = cast(Any, aio).EOF  # what read() returns when the other half is closed; grpc-stubs does not know it

CHANNEL_OPTIONS: Final[Options] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: its death is its own
    ("grpc.enable_http_proxy", 0),
]


def channel_to(address: str, tls: ClientTls | None) -> aio.Channel:
    """A channel to a worker, a controller or a router."""
    return open_channel(address, tls, list(CHANNEL_OPTIONS))
