"""What waiting for a step costs a rank: vLLM's way and that of ranks that share cores, side by side.

    python -m tests.bench.waits     about 20 s

One process writes messages to one of vLLM's queues, another reads them: 20 ms apart, then at once after each other.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

from megatoken.worker.engines.ranks.waits import SHARED_MEMORY_VARIABLE, wait_asleep

MESSAGES = 400


def read(handle: Any, shared: bool) -> None:
    """Prints microseconds from writing to reading, and the reader's CPU."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    if shared:
        os.environ[SHARED_MEMORY_VARIABLE] = "0"
    wait_asleep()
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    began_s = time.process_time()
    late = sorted(-(queue.dequeue(timeout=20) - time.monotonic()) for _ in range(MESSAGES))  # read, then the clock
    p50, p99 = (late[int(share * MESSAGES)] * 1e6 for share in (0.5, 0.99))
    way = "asleep" if shared else "vLLM's"
    print(f"{way:7} p50 {p50:6.0f} us  p99 {p99:6.0f} us  CPU {time.process_time() - began_s:5.2f} s", flush=True)


def main() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    for gap_s in (0.02, 0.0):
        print(f"{MESSAGES} messages, {gap_s * 1000:.0f} ms apart")
        for shared in (False, True):
            queue = MessageQueue(1, 1, max_chunk_bytes=1 << 20)
            reader = multiprocessing.get_context("fork").Process(target=read, args=(queue.export_handle(), shared))
            reader.start()
            queue.wait_until_ready()
            for _ in range(MESSAGES):
                queue.enqueue(time.monotonic())
                time.sleep(gap_s)
            reader.join(60)


if __name__ == "__main__":
    main()
