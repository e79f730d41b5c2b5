"""The simulated engine's own steps and faults, on a real event loop."""

from __future__ import annotations

import asyncio

import numpy as np

from megatoken.tokens.frames import U32
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.config import FaultConfig, SimulatedConfig
from megatoken.worker.engines.engine import EngineRequest, EngineStep
from megatoken.worker.engines.simulated.engine import SimulatedEngine


class Sink:
    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.dead = asyncio.Event()

    def on_step(self, step: EngineStep) -> None:
        for slot in step.slot.tolist():
            self.tokens[slot] = self.tokens.get(slot, 0) + 1

    def on_engine_dead(self, reason: str) -> None:
        self.dead.set()


def request(slot: int, prompt: list[int], tokens: int = 8) -> EngineRequest:
    return EngineRequest(
        request_id=str(slot),
        prompt=np.array(prompt, U32),
        sampling=pb.SamplingParams(temperature=0),
        max_tokens=tokens,
        slots=(slot,),
    )


async def started(**settings: object) -> tuple[SimulatedEngine, Sink]:
    engine, sink = SimulatedEngine(SimulatedConfig(step_s=0.001, **settings), None, None), Sink()
    await engine.start(sink)
    return engine, sink


async def test_a_long_prefill_makes_steps_before_its_first_token() -> None:
    engine, sink = await started(prefill_chunk_tokens=16, prefill_tokens_per_s=3200)
    engine.submit(request(0, [5] * 1600))
    while engine.load.steps <= 10:  # a prefill of 100 chunks, 5 ms each
        assert not sink.tokens
        await asyncio.sleep(0.005)
    assert engine.load.steps < 99
    await engine.stop()


async def test_an_engine_dies_of_a_poison_before_its_first_token_and_of_nothing_else() -> None:
    engine, sink = await started(faults=(FaultConfig(kind="die", on_token=1),))
    engine.submit(request(0, [5, 6]))
    await asyncio.sleep(0.1)
    assert (sink.tokens, sink.dead.is_set()) == ({0: 8}, False)
    engine.submit(request(1, [5, 1]))
    await asyncio.wait_for(sink.dead.wait(), 5)
    assert 1 not in sink.tokens
    await engine.stop()


async def test_a_frozen_engine_makes_no_step() -> None:
    engine, sink = await started(faults=(FaultConfig(kind="hang", on_token=1),))
    engine.submit(request(0, [1]))
    await asyncio.sleep(0.1)
    before = engine.load.steps
    engine.submit(request(1, [5]))
    await asyncio.sleep(0.1)
    assert (engine.load.steps, engine.load.running, sink.dead.is_set()) == (before, 1, False)
    await engine.stop()
