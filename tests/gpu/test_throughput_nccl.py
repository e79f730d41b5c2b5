"""The nccl path (RCCL on ROCm) on a real device: the sum is right, and what it takes of the device's memory.

One process can use a device once in a group, so ranks = devices; with a single device the group has one rank, which
still goes through communicator, stream and kernel.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MAX_DEVICE_MIB = 1024  # context and communicator; buffers are one channel of 64 KiB

RANK = """
import json, os, socket, sys
import numpy as np, torch
from megatoken.worker.throughput.reduce.process_group import ProcessGroup, usable_backends
rank, size, port, listener = map(int, sys.argv[1:5])
free_before, _ = torch.cuda.mem_get_info(rank)
facts = {"epoch": 1, "rank": rank, "groups": ["all"] * size, "backend": "nccl", "device": rank, "interface": None}
facts |= {"store": ("127.0.0.1", port), "host": "127.0.0.1", "timeout_s": 60.0}
group = ProcessGroup(facts, listener)
import time
vector, took = np.arange(1000, dtype=np.int64) + (1 << 40), []
for _ in range(20):
    at = time.perf_counter()
    total = group.all_reduce(vector, 30.0)
    took.append(time.perf_counter() - at)
blobs = group.gather(f"rank {rank}".encode())
free_after, _ = torch.cuda.mem_get_info(rank)
print(json.dumps({
    "exact": bool((total == vector * size).all()), "blobs": [blob.decode() for blob in blobs],
    "backends": usable_backends(), "tick_ms": 1000 * sorted(took)[10], "device_mib": (free_before - free_after) >> 20,
}))
sys.stdout.flush()
os._exit(0)
"""


def devices() -> int:
    """CUDA or ROCm devices that torch sees; asked in another process, since asking starts the runtime."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return 0
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


@pytest.mark.gpu
def test_nccl_sums_exactly_and_stays_small() -> None:
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
        pytest.skip("no NVIDIA or AMD device on this machine")
    size = devices()
    if size == 0:
        pytest.skip("torch here was built without CUDA or ROCm, or sees no device")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        os.set_inheritable(number, True)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(size), str(port), str(number)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(number,),
                cwd=REPOSITORY,
            )
            for rank in range(size)
        ]
        try:
            answers = [rank.communicate(timeout=120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    for rank, (output, problem) in zip(ranks, answers, strict=True):
        assert rank.returncode == 0, problem[-2000:]
        facts = json.loads(output.splitlines()[-1])
        print(facts)
        assert facts["exact"]
        assert facts["blobs"] == [f"rank {number}" for number in range(size)]
        assert facts["backends"][0].startswith("nccl/")
        assert facts["device_mib"] < MAX_DEVICE_MIB
