"""How CPU ranks of one replica talk: shared memory inside a host, Gloo between hosts.

vLLM's CPU communicator takes shared memory whenever all ranks of a group derive the same segment name, and the name
says nothing of the host: a pipeline across hosts fails to open the segment, or two replicas that drew the same port on
different heads share one. Here the name carries the replica's own id and the host's address, so that only ranks of one
replica on one host agree. Chosen by cpu_platform.py; cpu_worker.py sets the name.

Ranks wait for shared memory by spinning. Where ranks share cores, set MEGATOKEN_CPU_SHARED_MEMORY=0 in the model's
environment: every group then uses Gloo, whose waits give the core away, and waits.py does the same for the next step.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from megatoken.worker.engines.ranks.waits import ranks_share_cores

SEGMENT_VARIABLE = "MEGATOKEN_SHM_SEGMENT"


class HostCpuCommunicator(CpuCommunicator):  # type: ignore[misc]
    """vLLM's communicator, whose shared memory never spans hosts or replicas."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        segment = os.environ[SEGMENT_VARIABLE]
        if ranks_share_cores():
            segment += f"-{os.getpid()}"  # no two ranks agree, so vLLM falls back to torch.distributed
        os.environ["VLLM_DIST_IDENT"] = segment  # what vLLM derives the segment's name from
        super().__init__(*arguments, **options)
