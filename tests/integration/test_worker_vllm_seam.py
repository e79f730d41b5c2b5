"""vLLM's internals that worker/engines/vllm* stand on, held by name and shape. Fails first when vLLM is upgraded.

No engine starts here. A failure means: read the changed code, adapt the adapter, then this list.
"""

from __future__ import annotations

import inspect
import time

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

PINNED = "0.32.0"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_is_the_pinned_one() -> None:
    from vllm.version import __version__

    assert __version__.split("+")[0] == PINNED


def test_the_engine_core_client() -> None:
    from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, EngineCoreClient
    from vllm.v1.engine.exceptions import EngineDeadError

    assert parameters(EngineCoreClient.make_async_mp_client)[:3] == ["vllm_config", "executor_class", "log_stats"]
    assert parameters(AsyncMPClient.add_request_async) == ["self", "request"]
    assert parameters(AsyncMPClient.abort_requests_async) == ["self", "request_ids"]
    assert parameters(AsyncMPClient.get_output_async) == ["self"]
    assert parameters(AsyncMPClient.shutdown) == ["self", "timeout"]
    assert {"engine_manager", "engine_dead"} <= set(BackgroundResources.__dataclass_fields__)
    assert issubclass(EngineDeadError, Exception)


def test_what_one_engine_step_carries() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

    assert {"outputs", "scheduler_stats", "timestamp"} <= set(EngineCoreOutputs.__struct_fields__)
    assert {
        *("request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "finish_reason"),
        *("stop_reason", "events", "prefill_stats"),
    } <= set(EngineCoreOutput.__struct_fields__)
    assert {"request_id", "external_req_id", "sampling_params", "prompt_token_ids"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert [reason.name for reason in FinishReason] == ["STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"]


def test_the_statistics_of_a_step() -> None:
    from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats

    stats = SchedulerStats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs) == (0, 0, 0)
    assert stats.kv_cache_usage == 0.0
    assert {"queries", "hits"} <= set(PrefixCacheStats.__dataclass_fields__)
    assert {"num_prompt_tokens", "num_cached_tokens"} <= set(PrefillStats.__dataclass_fields__)


def test_logprobs_are_columns() -> None:
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    assert LogprobsLists._fields[:3] == ("logprob_token_ids", "logprobs", "sampled_token_ranks")
    assert LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")


def test_making_a_request() -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.engine.input_processor import InputProcessor

    wanted = {"request_id", "prompt", "params", "supported_tasks", "lora_request", "trace_headers", "priority"}
    assert wanted <= set(parameters(InputProcessor.process_inputs))
    assert {
        *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "min_tokens", "max_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "n"),
        *("stop_token_ids", "logit_bias", "allowed_token_ids", "structured_outputs", "detokenize", "output_kind"),
        *("extra_args", "_bad_words_token_ids"),
    } <= set(SamplingParams.__struct_fields__)
    fields = set(StructuredOutputsParams.__dataclass_fields__)
    assert {"json", "regex", "choice", "grammar", "json_object", "structural_tag"} <= fields


def test_what_the_resume_patches_and_plugs_in() -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
    from vllm.v1.sample.ops.penalties import apply_all_penalties
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

    assert parameters(StructuredOutputManager._create_grammar) == ["self", "request"]
    assert parameters(StructuredOutputGrammar.accept_tokens) == ["self", "request_id", "tokens"]
    assert set(BatchUpdate.__dataclass_fields__) == {"batch_size", "removed", "added", "moved"}
    assert LogitsProcessor.__abstractmethods__ == {"__init__", "apply", "is_argmax_invariant", "update_state"}
    assert parameters(apply_all_penalties) == [
        *("logits", "prompt_token_ids", "presence_penalties", "frequency_penalties", "repetition_penalties"),
        "output_token_ids",
    ]


def test_ranks_that_share_cores_look_by_themselves_when_a_wake_up_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's readers would sleep until told; the socket that tells them drops a wake-up that comes too soon."""
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    from megatoken.worker.engines.ranks.waits import SHARED_MEMORY_VARIABLE, SleepCondition, wait_asleep

    assert parameters(shm_broadcast.SpinCondition) == ["is_reader", "context", "notify_address", "busy_loop_s"]
    assert parameters(shm_broadcast.SpinCondition.wait) == ["self", "timeout_ms"]
    before = shm_broadcast.SpinCondition
    monkeypatch.setattr(shm_broadcast, "SpinCondition", before)
    monkeypatch.setenv(SHARED_MEMORY_VARIABLE, "1")
    wait_asleep()
    assert shm_broadcast.SpinCondition is before
    monkeypatch.setenv(SHARED_MEMORY_VARIABLE, "0")
    wait_asleep()
    assert shm_broadcast.SpinCondition is SleepCondition
    reader = shm_broadcast.SpinCondition(True, zmq.Context(), get_open_zmq_ipc_path())
    spent_s, began_s = time.process_time(), time.monotonic()
    for _ in range(20):
        reader.wait(None)  # nobody ever tells it
    assert time.process_time() - spent_s < 0.5 * (time.monotonic() - began_s), "it spins"


def test_starting() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    fields = set(AsyncEngineArgs.__dataclass_fields__)
    assert {
        *("model", "served_model_name", "dtype", "tensor_parallel_size", "pipeline_parallel_size"),
        *("data_parallel_size", "enable_expert_parallel", "disable_log_stats", "scheduling_policy", "max_model_len"),
        *("max_num_seqs", "enforce_eager", "kv_cache_memory_bytes", "distributed_executor_backend", "enable_lora"),
        "logits_processors",
    } <= fields
    assert hasattr(UsageContext, "ENGINE_CONTEXT")
    assert hasattr(UniProcExecutor, "_init_executor")
