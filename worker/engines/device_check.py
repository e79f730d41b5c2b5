"""Loads one device for some seconds and says whether it may serve.

    python -m megatoken.worker.engines.device_check KIND

KIND is "cpu", or an accelerator of which this process sees the one to check. A pattern is written to SHARE of the free
memory and read back; products of two matrices are compared with the first. Prints what is wrong and exits 1; exits 0
when nothing is. A device that hangs is found by whoever waits for this process.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import torch

from megatoken.process.tree import die_with_parent

SHARE: Final = 0.8  # of an accelerator's free memory; the rest is for the products
CPU_BYTES: Final = 64 << 20  # the memory of a CPU slot is the machine's, which others use
CHUNK_BYTES: Final = 256 << 20
LOAD_S: Final = 5.0
SIZE: Final = {"cpu": 512, "cuda": 8192}
MAX_TEXT: Final = 500
PATTERNS: Final = (0x5A, 0xA5)


class DeviceProblem(Exception):
    """What a device did wrong; the text is for `status`."""


def check(kind: str) -> None:
    """Raises DeviceProblem, or what torch raises for a device that cannot be used at all."""
    device = torch.device("cpu" if kind == "cpu" else "cuda")
    free = CPU_BYTES if kind == "cpu" else int(torch.cuda.mem_get_info(device)[0] * SHARE)
    check_memory(device, free)
    check_products(device, SIZE[device.type], LOAD_S, time.monotonic)


def check_memory(device: torch.device, size_bytes: int) -> None:
    """Writes and reads back patterns over `size_bytes`."""
    chunks = [
        torch.empty(min(CHUNK_BYTES, size_bytes - start), dtype=torch.uint8, device=device)
        for start in range(0, size_bytes, CHUNK_BYTES)
    ]
    for pattern in PATTERNS:
        for chunk in chunks:
            chunk.fill_(pattern)
        wrong = sum(int((chunk != pattern).sum()) for chunk in chunks)
        if wrong:
            raise DeviceProblem(f"{wrong} of {size_bytes} bytes of its memory did not keep what was written")


def check_products(device: torch.device, size: int, seconds: float, clock: Any) -> None:
    """Multiplies two seeded matrices over and over; every product must equal the first, and be finite."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    first = left @ right
    if not bool(torch.isfinite(first).all()):
        raise DeviceProblem("a product of its matrices is not finite")
    done, until_s = 0, clock() + seconds
    while clock() < until_s:
        done += 1
        if not torch.equal(left @ right, first):
            raise DeviceProblem(f"product {done} of the same two matrices differs from the first")


def main() -> int:
    die_with_parent()
    try:
        check(sys.argv[1])
    except Exception as error:  # whatever torch and the driver raise is the finding
        print(" ".join(str(error).split())[:MAX_TEXT])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
