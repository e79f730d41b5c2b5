"""vLLM behind the `Engine` protocol, driven by its engine-core client: one EngineCoreOutputs is one Step.

The client is vLLM-internal; this module, request.py and step.py are all that touches it, and
tests/integration/test_worker_vllm_seam.py holds what they rely on against the pinned version.

The engine core is started by `boot`, before any event loop or thread exists: on CPU it is forked from this process,
which has just imported vLLM, so the import is paid once and not twice, and a child shares no wake-up descriptor with
a loop.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.version import __version__ as vllm_version

from megatoken.errors import EngineDeadError, RequestError
from megatoken.log import log_event
from megatoken.process.start_phase import begin_phase
from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines import weights
from megatoken.worker.engines.engine import EngineFacts, EngineLoad, EngineRequest, StepSink
from megatoken.worker.engines.hub_snapshot import snapshot_of
from megatoken.worker.engines.ranks import placement as rank_placement
from megatoken.worker.engines.ranks.rank_start import watch_ranks
from megatoken.worker.engines.requests import TRANSFERS
from megatoken.worker.engines.vllm.arguments import engine_arguments, lora_modules
from megatoken.worker.engines.vllm.metrics import VllmMetrics
from megatoken.worker.engines.vllm.plugins import tie_forks
from megatoken.worker.engines.vllm.request import (
    REFUSALS,
    as_request_error,
    choice_sampling,
    forbid_words,
    vllm_sampling,
)
from megatoken.worker.engines.vllm.resume import carry_over, install
from megatoken.worker.engines.vllm.step import INVALID_ARGUMENT, UNAVAILABLE, StepReader
from megatoken.worker.models import notes_directory, resolve_source

SUPPORTED_TASKS = ("generate",)
LOSS_S = 3.0  # for the engine core to say which rank it lost
ABORT_BATCH = 1024  # ids in one abort message
UNSENDABLE: Final = (TypeError, ValueError, OverflowError, RecursionError)  # what its encoder raises for a request
MAX_REASON = 600  # characters of vLLM's own text in an error of ours

_log = logging.getLogger(__name__)


class VllmEngine:
    """One vLLM engine core (or several, data parallel) and its ranks."""

    def __init__(self, config: WorkerConfig) -> None:
        self.load = EngineLoad()
        self._config = config
        self._client: AsyncMPClient | None = None
        self._reader: asyncio.Task[None] | None = None
        self._sequence = itertools.count()
        self._weights: dict[str, str] = {}
        self._steps = StepReader(self.load)
        self._stopping = False

    def boot(self) -> None:
        """Starts the engine core and its ranks, and waits until they serve. Blocks."""
        began_s = time.monotonic()
        directory = Path(resolve_source(self._config.source))
        from_hub = not directory.is_dir()
        if not from_hub:
            self._verify(directory)
        begin_phase("download" if from_hub else "engine")
        try:
            vllm_config, executor = self._configure()
            snapshot = snapshot_of(vllm_config) if from_hub else None
        except (*REFUSALS, OSError, RuntimeError, NotImplementedError) as error:
            raise RequestError("engine", self._config.source, _one_line(error)) from error
        if snapshot is not None:
            self._verify(snapshot)
            begin_phase("engine")
        self._loras = lora_modules(self._config)
        tie_forks()
        install()  # a forked engine core has both from here; a spawned one from its plugin
        watch_ranks()
        if self._config.device_kind == "cpu":
            # vLLM's CPU platform asks for spawn because an OpenMP runtime may run already. Here none does.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        try:
            self._client = EngineCoreClient.make_async_mp_client(vllm_config, executor, log_stats=True)
        except (RuntimeError, TimeoutError, OSError) as error:
            why = rank_placement.start_problem(self._config) or str(error)
            raise EngineDeadError(f"vLLM's engine core did not start: {why[:MAX_REASON]}") from error
        self._processor = InputProcessor(vllm_config)
        self._vllm_config = vllm_config
        log_event(_log, "engine.started", engine="vllm", seconds=round(time.monotonic() - began_s, 1))

    def _verify(self, directory: Path) -> None:
        """Hashes what the engine will read; the model's other replicas and ranks on other nodes must have the same."""
        config = self._config
        begin_phase("verify")
        self._weights = weights.manifest_of(directory, notes_directory())
        weights.check_sums(directory, self._weights)
        weights.check_same(str(directory), self._weights, config.weights, config.weights_of)
        whose = f"{config.replica} on {config.node}"
        os.environ[weights.VARIABLE] = json.dumps({"files": self._weights, "whose": whose})

    def _configure(self) -> tuple[VllmConfig, type[Executor]]:
        arguments = AsyncEngineArgs(**engine_arguments(self._config))
        vllm_config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        rank_placement.use_placement_group(self._config, vllm_config)
        if self._config.device_kind == "cpu" and self._config.world_size == 1:
            # The rank lives in the engine core itself: no second process, and no ring buffer that spins on a core.
            return vllm_config, UniProcExecutor
        return vllm_config, Executor.get_class(vllm_config)

    async def start(self, sink: StepSink) -> EngineFacts:
        """Begins to read the engine core's output."""
        self._sink = sink
        self._metrics = VllmMetrics(self._vllm_config, self._config.model, self._config.replica)
        self._reader = asyncio.create_task(self._read())
        config = self._vllm_config
        cache, model = config.cache_config, config.model_config
        return EngineFacts(
            engine="vllm",
            version=f"vllm {vllm_version}",
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            max_running=config.scheduler_config.max_num_seqs,
            block_size=cache.block_size,
            weights=self._weights,
            kv_cache_tokens=int(cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size),
            loras=tuple(self._loras),
            transfers=tuple(name for name, enabling in TRANSFERS.items() if self._config.engine_args.get(enabling)),
        )

    def check(self, request: EngineRequest) -> None:
        """vLLM's own validation; keeps the engine-core request it makes."""
        params = vllm_sampling(request)
        carry_over(request, params, self._config)
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.prompt.tolist()}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        try:
            request.prepared = self._processor.process_inputs(
                request.request_id,
                prompt,
                params,
                supported_tasks=SUPPORTED_TASKS,
                lora_request=self._lora(request.lora),
                trace_headers={"traceparent": request.traceparent} if request.traceparent else None,
                priority=request.priority,
            )
        except REFUSALS as error:
            raise as_request_error(error, "sampling") from error
        forbid_words(request.prepared.sampling_params, request.sampling)

    def submit(self, request: EngineRequest) -> None:
        """Sends one engine-core request a choice."""
        prepared: EngineCoreRequest = request.prepared
        request.prepared = None
        prepared.external_req_id = request.request_id
        params = prepared.sampling_params
        for choice, slot in enumerate(request.slots):
            own = copy.copy(prepared)  # encoded later, when its coroutine runs
            own.request_id = f"{request.request_id[:64]}-{next(self._sequence):x}"
            own.sampling_params = choice_sampling(params, choice)
            self._steps.watch(own.request_id, slot)
            sending = self._send(self._engine_client().add_request_async(own))
            sending.add_done_callback(partial(self._note_sent, own.request_id))

    def abort(self, slots: Sequence[int]) -> None:
        """Tells the engine core to drop these; what it still sends for them is passed over."""
        identities = self._steps.forget(slots)
        client = self._engine_client()
        for start in range(0, len(identities), ABORT_BATCH):
            self._send(client.abort_requests_async(identities[start : start + ABORT_BATCH]))

    def set_threads(self, threads: int) -> None:
        """Between two steps, in every rank."""
        if self._client is not None:
            self._send(self._client.collective_rpc_async("set_threads", args=(threads,)))

    def exposition(self) -> bytes:
        """vLLM's own metrics."""
        return self._metrics.exposition()

    async def stop(self) -> None:
        """Stops the engine core and its ranks; waits for them."""
        self._stopping = True
        if self._client is not None:
            client, self._client = self._client, None
            await asyncio.to_thread(client.shutdown, self._config.stop_timeout_s)
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> None:
        client = self._engine_client()
        try:
            while True:
                outputs = await client.get_output_async()
                if outputs.scheduler_stats is not None:
                    self._metrics.note(outputs.scheduler_stats, outputs.engine_index)
                step = self._steps.read(outputs)
                if step is not None:
                    self._sink.on_step(step)
        except VllmEngineDeadError:
            lost = await self._loss(client)
            self._died(lost + "vLLM's engine core ended" + _exit_codes(client))
        except Exception as error:  # whatever breaks the reader, the replica can serve no more: it must be replaced
            _log.exception("reading the engine core's output failed")
            self._died(f"reading vLLM's engine core failed: {error!r}")

    async def _loss(self, client: AsyncMPClient) -> str:
        """Which ranks the engine core lost before it ended; empty when none. It says that it ends before it knows."""
        deadline = time.monotonic() + (LOSS_S if self._config.world_size > 1 else 0.0)
        over = False
        while not (ranks := rank_placement.lost_ranks(self._config)) and not over:
            over = time.monotonic() > deadline or bool(_exit_codes(client))
            await asyncio.sleep(0.05)
        devices = self._config.devices
        names = [devices[rank] if rank < len(devices) else f"rank {rank}" for rank in ranks]
        return f"lost {', '.join(names)}: " if names else ""

    def _died(self, reason: str) -> None:
        if not self._stopping:
            self._sink.on_engine_dead(reason)

    def _send(self, sending: Any) -> asyncio.Future[Any]:
        """Runs a client coroutine as a task; tasks start in order, so messages keep theirs."""
        task = asyncio.ensure_future(sending)
        task.add_done_callback(_note_failure)
        return task

    def _note_sent(self, identity: str, task: asyncio.Future[Any]) -> None:
        """Ends the stream of a request that could not be sent: the engine core will never say a word about it."""
        error = None if task.cancelled() else task.exception()
        if error is None or isinstance(error, VllmEngineDeadError):  # a dead engine core is told by the reader
            return
        code = INVALID_ARGUMENT if isinstance(error, UNSENDABLE) else UNAVAILABLE
        step = self._steps.lose(identity, f"the request could not be sent to the engine: {error!r}"[:MAX_REASON], code)
        if step is not None:
            self._sink.on_step(step)

    def _engine_client(self) -> AsyncMPClient:
        if self._client is None:
            raise EngineDeadError("the engine is not running")
        return self._client

    def _lora(self, name: str) -> LoRARequest | None:
        return self._loras[name] if name else None


def _note_failure(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.warning("sending to the engine core failed: %r", task.exception())


def _one_line(error: Exception) -> str:
    """What vLLM found wrong with a configuration, without pydantic's frame around it."""
    problems = getattr(error, "errors", None)
    texts = [problem["msg"] for problem in problems()] if callable(problems) else [str(error)]
    return " ".join("; ".join(texts).split())[:MAX_REASON]


def _exit_codes(client: AsyncMPClient) -> str:
    manager = client.resources.engine_manager
    codes = [process.exitcode for process in getattr(manager, "processes", []) if process.exitcode is not None]
    return "" if not codes else " (exit status " + ", ".join(map(str, codes)) + ")"
