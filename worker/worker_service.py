"""The Worker service: what the control plane asks of a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import numpy as np

from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1 import worker_pb2, worker_pb2_grpc
from megatoken.worker.fence import Fence
from megatoken.worker.replica import RunningReplica
from megatoken.worker.streams.outlet import Outlet

PROBE_TIMEOUT_S: Final = 60.0  # when the caller names no deadline
PROBE_PROMPT: Final = np.array([1], "<u4")


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Answers for one replica."""

    def __init__(self, replica: RunningReplica, fence: Fence) -> None:
        self._replica = replica
        self._fence = fence

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.DescribeResponse:
        """What is fixed about this replica."""
        config, facts = self._replica.config, self._replica.facts
        return worker_pb2.DescribeResponse(
            replica=config.replica,
            incarnation=config.incarnation,
            model=config.model,
            engine=facts.engine,
            engine_version=facts.version,
            device_kind=config.device_kind,
            tensor_parallel=config.tensor_parallel,
            pipeline_parallel=config.pipeline_parallel,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            max_running=facts.max_running,
            kv_cache_tokens=facts.kv_cache_tokens,
            block_size=facts.block_size,
            loras=facts.loras,
        )

    async def GetLoad(self, request: worker_pb2.GetLoadRequest, context: Any) -> pb.Load:
        """The load as of now."""
        return self._replica.load()

    async def Renew(self, request: worker_pb2.RenewRequest, context: Any) -> worker_pb2.RenewResponse:
        """Lets the replica serve on, and tells how it is."""
        config = self._replica.config
        if (request.replica, request.incarnation) != (config.replica, config.incarnation):
            meant = f"{request.replica} ({request.incarnation})"
            text = f"replica: {meant!r} is not here; this is {config.replica} ({config.incarnation})"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        stamp_s = self._fence.renew(request.stamp_s, request.lease_s)
        if request.cpu_ranks:
            self._replica.share_cores(request.cpu_ranks)
        return worker_pb2.RenewResponse(stamp_s=stamp_s, load=self._replica.load(), unfinished=self._replica.running)

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        """Refuses new requests from now on."""
        return worker_pb2.DrainResponse(running=self._replica.drain())

    async def Probe(self, request: worker_pb2.ProbeRequest, context: Any) -> worker_pb2.ProbeResponse:
        """Generates one token through the engine."""
        timeout_s = min(context.time_remaining() or PROBE_TIMEOUT_S, PROBE_TIMEOUT_S)
        began_s = time.monotonic()
        finish = await probe(self._replica, timeout_s)
        if finish is None:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"the engine made no token within {timeout_s:g} s")
        elif finish.reason == pb.FINISH_REASON_ERROR:
            await context.abort(grpc.StatusCode.UNAVAILABLE, finish.message)
        return worker_pb2.ProbeResponse(seconds=time.monotonic() - began_s)

    async def WatchPrefixes(
        self, request: worker_pb2.WatchPrefixesRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefixEvents]:
        """Not served: an empty set would say that nothing is cached, which is not known."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker does not publish its prefix cache")
        yield worker_pb2.PrefixEvents()  # never reached; makes this a stream


async def probe(replica: RunningReplica, timeout_s: float) -> pb.Finish | None:
    """The Finish of a one-token request, or None when it took longer than `timeout_s`."""
    outlet = Outlet()
    replica.open(outlet, wants_load=False)
    try:
        sampling = pb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        message = columns.GenerateRequest(request_id="probe", prompt=PROBE_PROMPT.tobytes(), sampling=sampling)
        replica.submit_probe(outlet, message)
        async with asyncio.timeout(timeout_s):
            while True:
                taken = outlet.take()
                if taken is not None:
                    for part in taken.parts:
                        if part.finishes:
                            return pb.Finish.FromString(part.finishes[-1])
                await outlet.wait()
    except TimeoutError:
        return None
    finally:
        replica.close(outlet)
