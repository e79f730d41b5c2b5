"""Imports gRPC with its older poller, for programs that move tokens; before anything of ours that imports gRPC too.

gRPC reads which experiments are on when it is imported. Its newer event engine hands each message through a pool of
threads; without it the thread that waits for completions reads the sockets itself. docs/decisions.md has what that
saves. What an operator set stands, and no process below inherits it: Ray brings a gRPC of its own.
"""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "GRPC_EXPERIMENTS"
OLDER: Final = "-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints"

_chosen = VARIABLE in os.environ
if not _chosen:
    os.environ[VARIABLE] = OLDER
import grpc.aio  # noqa: E402, F401

if not _chosen:
    del os.environ[VARIABLE]
