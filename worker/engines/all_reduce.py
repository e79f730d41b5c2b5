"""An all-reduce between two processes, one on each of two nodes: how late, how fast, and whether the sum is right.

    python -m megatoken.worker.engines.all_reduce RANK STORE_HOST STORE_PORT ADDRESS BACKEND TIMEOUT_S

ADDRESS is this node's; rank 0 serves the store. Prints what went wrong in one line and exits 1; exits 0 when nothing
did. `megatoken doctor` calls `measure` for every pair of nodes, and a device that is to return is checked by it.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from datetime import timedelta
from typing import Any, Final

from megatoken.process.interface import interface_of
from megatoken.process.tree import die_with_parent

SMALL_ROUNDS: Final = 40
LARGE_ROUNDS: Final = 4
LARGE_BYTES: Final = 32 << 20  # large enough that a 100 Gbit/s link spends milliseconds on it
MAX_TEXT: Final = 300


def best_backend() -> str:
    """nccl (RCCL on ROCm) where a GPU is usable by torch, else gloo."""
    import torch

    return "nccl" if torch.cuda.is_available() and torch.distributed.is_nccl_available() else "gloo"


def free_port(address: str) -> int:
    """A port of this node that nobody has now, for the store."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def measure(rank: int, store: tuple[str, int], address: str, backend: str, timeout_s: float) -> tuple[float, float]:
    """Seconds of a small all-reduce, and bytes/s of a large one. Raises what torch raises; ValueError for a wrong sum.

    Gloo and NCCL use the interface that carries `address`, as engines do, unless the operator chose one.
    """
    interface = interface_of(address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface:
            os.environ.setdefault(name, interface)
    return _measure(rank, store, backend, timedelta(seconds=timeout_s))


def one_line(error: Exception) -> str:
    """The first line of what torch says, or the error's name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:MAX_TEXT]


def _measure(rank: int, store_at: tuple[str, int], backend: str, timeout: timedelta) -> tuple[float, float]:
    import torch
    import torch.distributed as dist

    store = dist.TCPStore(store_at[0], store_at[1], 2, rank == 0, timeout, wait_for_workers=False)
    if backend == "nccl":
        device = torch.device("cuda", 0)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)
    else:
        device = torch.device("cpu")
        group = dist.ProcessGroupGloo(store, rank, 2, timeout)

    def reduce(tensor: Any) -> float:
        started = time.perf_counter()
        group.allreduce([tensor]).wait(timeout)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    small = torch.ones(1, dtype=torch.float64, device=device)
    large = torch.ones(LARGE_BYTES // 4, dtype=torch.float32, device=device)
    reduce(small), reduce(large)  # connections and buffers
    latency = statistics.median(reduce(small) for _ in range(SMALL_ROUNDS))
    seconds = min(reduce(large) for _ in range(LARGE_ROUNDS))
    if int(large[0].item()) != 2 ** (LARGE_ROUNDS + 1):
        raise ValueError("the sum is wrong")
    return latency, LARGE_BYTES / seconds


def main() -> int:
    die_with_parent()
    rank, host, port, address, backend, timeout_s = sys.argv[1:]
    try:
        measure(int(rank), (host, int(port)), address, backend, float(timeout_s))
    except Exception as error:  # torch raises RuntimeError, ValueError and its own, by backend
        print(one_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
