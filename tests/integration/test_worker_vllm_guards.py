"""What a request may not do to vLLM's engine: nothing unchecked reaches a rank, and no failed send keeps a stream open.

Uses vLLM's own classes; runs no engine.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams

from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.engine import EngineRequest, EngineStep
from megatoken.worker.engines.vllm import resume as vllm_resume
from megatoken.worker.engines.vllm.engine import VllmEngine
from megatoken.worker.engines.vllm.resume import PENALTIES_KEY, RESUMED_KEY, carry_over
from megatoken.worker.engines.vllm.resumed_penalties import ResumedPenalties

CONFIG = WorkerConfig(replica="r", model="m", source="/nowhere", counters_dir="/nowhere")
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.mark.parametrize("resumed", [0, 2])
def test_reserved_keys_of_a_client_are_never_passed_on(resumed: int) -> None:
    params = SamplingParams(extra_args={PENALTIES_KEY: ["a"], RESUMED_KEY: 1, "megatoken_other": 1, "mine": 2})
    carry_over(
        EngineRequest("r", np.array([1, 2, 3], "<u4"), pb.SamplingParams(), 1, resumed_tokens=resumed), params, CONFIG
    )
    assert params.extra_args == {"mine": 2, **({RESUMED_KEY: 2} if resumed else {})}


@pytest.mark.parametrize(
    "extra",
    [
        {PENALTIES_KEY: ["a", "b", "c"], RESUMED_KEY: 1},
        {PENALTIES_KEY: [1.0, 1.0], RESUMED_KEY: 1},
        {PENALTIES_KEY: [1.0, 1.0, 0.0], RESUMED_KEY: 1},
        {PENALTIES_KEY: [1.0, 1.0, float("nan")], RESUMED_KEY: 1},
        {PENALTIES_KEY: 7, RESUMED_KEY: 1},
        {PENALTIES_KEY: {"a": 1}, RESUMED_KEY: 1},
        {PENALTIES_KEY: [1.0, 1.0, 1.0]},
        {PENALTIES_KEY: [1.0, 1.0, 1.0], RESUMED_KEY: "x"},
        {PENALTIES_KEY: [1.0, 1.0, 1.0], RESUMED_KEY: True},
        {PENALTIES_KEY: [1.0, 1.0, 1.0], RESUMED_KEY: 3},
        {PENALTIES_KEY: [1.0, 1.0, 1.0], RESUMED_KEY: 2**63},
    ],
)
def test_no_value_of_a_reserved_key_raises_in_a_rank(extra: dict[str, Any]) -> None:
    processor = ResumedPenalties(None, torch.device("cpu"), False)
    params = SamplingParams(extra_args=extra)
    processor.update_state(SimpleNamespace(removed=[], added=[(0, params, [1, 2, 3], [])], moved=[]))
    logits = torch.ones(1, 8)
    assert torch.equal(processor.apply(logits), torch.ones(1, 8))


@pytest.mark.parametrize("value", ["x", True, -1, 3, 10**30, [1], None])
def test_no_value_of_the_resumed_count_raises_in_the_grammar(value: object) -> None:
    assert vllm_resume.resumed_count({RESUMED_KEY: value}, 3) == 0


class _Sink:
    def __init__(self) -> None:
        self.steps: list[EngineStep] = []

    def on_step(self, step: EngineStep) -> None:
        self.steps.append(step)


class _Client:
    """Sends nothing: the n-th send fails with the n-th error."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)

    async def add_request_async(self, request: Any) -> None:
        error = self.errors.pop(0)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OverflowError("Integer value out of range"), INVALID_ARGUMENT),
        (RecursionError(), INVALID_ARGUMENT),
        (RuntimeError("no socket"), UNAVAILABLE),
    ],
)
async def test_a_failed_send_ends_its_own_stream_only(error: Exception, code: int) -> None:
    engine, sink = VllmEngine(CONFIG), _Sink()
    engine._client, engine._sink = _Client(None, error), sink  # type: ignore[assignment]
    for slot in (4, 5):
        prepared = SimpleNamespace(sampling_params=SamplingParams(), external_req_id="", request_id="")
        engine.submit(
            EngineRequest("r", np.array([1], "<u4"), pb.SamplingParams(), 1, slots=(slot,), prepared=prepared)
        )
    for _ in range(5):
        await asyncio.sleep(0)
    (ended,) = [ended for step in sink.steps for ended in step.ended]
    assert (ended.slot, ended.reason, ended.code) == (5, pb.FINISH_REASON_ERROR, code)
    assert "engine" in ended.message


async def test_a_failed_send_of_an_aborted_request_ends_nothing() -> None:
    engine, sink = VllmEngine(CONFIG), _Sink()
    engine._client, engine._sink = _Client(OverflowError()), sink  # type: ignore[assignment]
    prepared = SimpleNamespace(sampling_params=SamplingParams(), external_req_id="", request_id="")
    engine.submit(EngineRequest("r", np.array([1], "<u4"), pb.SamplingParams(), 1, slots=(4,), prepared=prepared))
    engine._steps.forget([4])
    for _ in range(5):
        await asyncio.sleep(0)
    assert sink.steps == []
