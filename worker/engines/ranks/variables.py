"""Environment variables that go from a worker to its engine core and to the ranks."""

from __future__ import annotations

from typing import Final

DEVICE_VARIABLE: Final = "MEGATOKEN_CPU_RAY_DEVICE"  # names the Ray resource that counts CPU slots
REPLICA_VARIABLE: Final = "MEGATOKEN_REPLICA"  # tells rank processes, wherever they run, whose they are
DEVICES_VARIABLE: Final = "MEGATOKEN_RANK_DEVICES"  # the planned device of each rank of a replica that spans nodes
SOCKETS_VARIABLE: Final = "VLLM_RPC_BASE_PATH"  # vLLM's: the folder of the sockets inside a node
LOSS_VARIABLE: Final = "MEGATOKEN_LOST_RANKS"  # names the file that the engine core writes lost ranks into
PROBLEM: Final = ".why"  # ends the name of the file beside it: why the ranks did not start
