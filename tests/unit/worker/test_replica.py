"""Every way a request can go ends in exactly one Finish a stream, and the account is right after each."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import numpy as np
import pytest

from megatoken.counters import INDEX, read_counters
from megatoken.errors import EngineDeadError, OverloadError, RequestError
from megatoken.tokens.frames import U32, token_columns
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.engine import Ended, EngineFacts, EngineLoad, EngineRequest, EngineStep, Prefilled
from megatoken.worker.measures import WorkerMeasures
from megatoken.worker.replica import RunningReplica, StreamInUseError
from megatoken.worker.streams.outlet import LOOSE_FINISHES, Outlet
from megatoken.worker.tokens_service import REQUESTS_AT_ONCE, STARTS_A_MESSAGE, _read_session
from megatoken.worker.totals import open_counters


class ScriptedEngine:
    """Does what a test says, when it says so."""

    def __init__(self) -> None:
        self.load = EngineLoad()
        self.submitted: list[EngineRequest] = []
        self.aborted: list[int] = []
        self.fail_check: Exception | None = None
        self.threads: list[int] = []

    def boot(self) -> None:
        """Nothing to start."""

    async def start(self, sink) -> EngineFacts:
        self.sink = sink
        return EngineFacts("simulated", "1", 100, 1000, 8, 16, 10_000)

    def check(self, request: EngineRequest) -> None:
        if self.fail_check is not None:
            raise self.fail_check

    def submit(self, request: EngineRequest) -> None:
        self.submitted.append(request)

    def abort(self, slots) -> None:
        self.aborted += slots

    def set_threads(self, threads: int) -> None:
        self.threads.append(threads)

    async def stop(self) -> None:
        """Nothing to stop."""

    def step(self, slots: list[int], tokens: list[int], ended=(), prefilled=()) -> None:
        self.load.made_tokens += len(tokens)
        self.sink.on_step(EngineStep(np.array(slots, U32), np.array(tokens, U32), ended=ended, prefilled=prefilled))


class World:
    def __init__(self, directory: Path, **settings) -> None:
        self.engine = ScriptedEngine()
        self.deaths: list[str] = []
        settings = {"engine": "simulated", "simulated": {}, **settings}
        self.config = WorkerConfig(replica="r0", model="m", counters_dir=str(directory), **settings)
        self.counters = open_counters(self.config)
        self.replica = RunningReplica(
            self.config, self.engine, self.counters.totals, WorkerMeasures(), self.deaths.append
        )
        self.outlet = Outlet()

    async def start(self) -> World:
        await self.replica.start()
        self.replica.open(self.outlet, wants_load=False)
        return self

    def submit(
        self, number: int, prompt=(1, 2, 3), outlet: Outlet | None = None, timeout_ms: int = 0, **fields
    ) -> None:
        sampling = pb.SamplingParams(**fields.pop("sampling", {}))
        request = columns.GenerateRequest(
            prompt=np.array(prompt, "<u4").tobytes(), sampling=sampling, timeout_ms=timeout_ms, **fields
        )
        self.replica.submit(outlet or self.outlet, number, request)

    def slots(self) -> list[int]:
        return list(self.engine.submitted[-1].slots)

    def frame(self, outlet: Outlet | None = None) -> columns.Frame:
        taken = (outlet or self.outlet).take()
        assert taken is not None
        self.replica.written(taken.tokens)
        return columns.Frame.FromString(taken.frame())

    def total(self, name: str) -> int:
        header, values = read_counters(self.counters.path)
        assert header["id"] == "r0"
        return values[INDEX[name]]


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return await World(tmp_path).start()


async def test_its_ranks_compute_with_as_many_threads_as_others_leave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    world = await World(tmp_path, cpu_ranks=2).start()
    for ranks in (2, 2, 4, 4, 3, 16, 1):
        world.replica.share_cores(ranks)
    assert world.engine.threads == [2, 1, 8], "told when it changes: 8 of 3 is 2 still"
    chosen = await World(tmp_path / "chosen", cpu_threads=3).start()
    chosen.replica.share_cores(4)
    assert chosen.engine.threads == []


@pytest.mark.parametrize(("asks", "cached", "told"), [(True, 2, [2]), (True, 0, []), (False, 2, [])])
async def test_who_asks_is_told_with_the_first_token_what_was_cached(
    world: World, asks: bool, cached: int, told: list[int]
) -> None:
    world.submit(7, sampling={"max_tokens": 2}, tell_cached_tokens=asks)
    [slot] = world.slots()
    world.engine.step([slot], [40], prefilled=[Prefilled(slot, 3, cached, None)])
    frame = world.frame()
    assert [(detail.stream, detail.cached_tokens) for detail in frame.detail] == [(7, count) for count in told]
    assert token_columns(frame)[2].tolist() == [40]


async def test_a_request_runs_and_ends(world: World) -> None:
    world.submit(7, sampling={"max_tokens": 2})
    [slot] = world.slots()
    world.engine.step([slot], [40], prefilled=[Prefilled(slot, 3, 2, None)])
    world.engine.step([slot], [41], ended=[Ended(slot, pb.FINISH_REASON_LENGTH)])
    frame = world.frame()
    stream, _count, token = token_columns(frame)
    assert (stream.tolist(), token.tolist()) == ([7, 7], [40, 41])
    [finish] = frame.finish
    assert (finish.stream, finish.reason) == (7, pb.FINISH_REASON_LENGTH)
    assert (finish.prompt_tokens, finish.cached_tokens, finish.generated_tokens) == (3, 2, 2)
    assert finish.replica == "r0"
    names = ("prompt_tokens", "generated_tokens", "cached_tokens", "requests_started", "requests_finished")
    assert [world.total(name) for name in names] == [3, 2, 2, 1, 1]
    assert world.total("requests_failed") == 0
    assert world.replica.running == 0


async def test_a_resumed_request_ends_with_the_counts_of_the_whole(world: World) -> None:
    world.submit(1, prompt=(1, 2, 3, 40, 41), resumed_tokens=2)
    [slot] = world.slots()
    world.engine.step([slot], [42], ended=[Ended(slot, pb.FINISH_REASON_STOP, stop_token=42)])
    [finish] = world.frame().finish
    assert (finish.prompt_tokens, finish.generated_tokens, finish.stop_token) == (3, 3, 42)


async def test_a_wrong_request_ends_alone(world: World) -> None:
    world.submit(1)
    world.submit(2, prompt=(5000,))
    world.submit(3, prompt=(1,), sampling={"temperature": -1.0, "n": 2})
    frame = world.frame()
    assert [(finish.stream, finish.code) for finish in frame.finish] == [(2, 3), (3, 3), (4, 3)]
    assert all(finish.reason == pb.FINISH_REASON_ERROR for finish in frame.finish)
    assert world.replica.running == 1
    assert world.replica.measures.refusals["invalid"] == 2


async def test_the_engine_may_refuse_and_a_defect_stays_inside_its_request(world: World) -> None:
    world.engine.fail_check = RequestError("sampling.logprobs", 99, "at most 20")
    world.submit(1)
    world.engine.fail_check = ZeroDivisionError("secret detail")
    world.submit(2)
    frame = world.frame()
    assert [finish.code for finish in frame.finish] == [3, grpc.StatusCode.INTERNAL.value[0]]
    assert "secret" not in frame.finish[1].message
    assert world.total("requests_started") == 0
    assert {name: count for name, count in world.replica.measures.refusals.items() if count} == {
        "invalid": 1, "fault": 1
    }  # fmt: skip


async def test_a_number_in_use_is_the_sessions_fault_not_a_finish(world: World) -> None:
    world.submit(1)
    with pytest.raises(StreamInUseError):
        world.submit(1)
    for wrong in ({}, {"temperature": -1.0}):  # whatever else is wrong, stream 1 runs on
        with pytest.raises(StreamInUseError):
            world.submit(0, sampling={"n": 2, **wrong})
    with pytest.raises(StreamInUseError):
        world.submit(1, prompt=(5000,))
    assert world.outlet.take() is None


async def test_cancel_aborts_at_once_and_late_tokens_of_others_still_come(world: World) -> None:
    world.submit(1)
    [one] = world.slots()
    world.submit(2)
    [two] = world.slots()
    world.engine.step([one, two], [10, 20])
    world.replica.cancel(world.outlet, [1, 1, 99])
    assert world.engine.aborted == [one]
    world.engine.step([two], [21])
    frame = world.frame()
    [finish] = frame.finish
    assert (finish.stream, finish.reason, finish.generated_tokens) == (1, pb.FINISH_REASON_CANCELLED, 1)
    assert token_columns(frame)[2].tolist() == [10, 20, 21]
    assert world.total("requests_failed") == 1


async def test_a_session_that_goes_takes_its_requests_along(world: World) -> None:
    other = Outlet()
    world.replica.open(other, wants_load=True)
    assert world.frame(other).HasField("load")
    world.submit(1, outlet=other)
    [slot] = world.slots()
    world.submit(1)
    world.replica.close(other)
    assert world.engine.aborted == [slot]
    assert world.replica.running == 1
    assert world.replica.sessions == 0


async def test_a_deadline_ends_a_request(world: World) -> None:
    world.submit(1, timeout_ms=5)
    [slot] = world.slots()
    await asyncio.wait_for(world.outlet.wait(), 2)
    [finish] = world.frame().finish
    assert finish.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert world.engine.aborted == [slot]


async def test_a_drained_worker_refuses_and_lets_running_ones_end(world: World) -> None:
    world.submit(1)
    [slot] = world.slots()
    assert world.replica.drain() == 1
    world.submit(2)
    assert [finish.code for finish in world.frame().finish] == [grpc.StatusCode.UNAVAILABLE.value[0]]
    assert not world.replica.drained.is_set()
    world.engine.step([slot], [4], ended=[Ended(slot, pb.FINISH_REASON_STOP)])
    assert world.replica.drained.is_set()
    assert world.replica.drain() == 0


async def test_a_full_worker_says_when_to_come_back(tmp_path: Path) -> None:
    world = await World(tmp_path, max_requests=1).start()
    world.submit(1)
    world.submit(2)
    [finish] = world.frame().finish
    assert finish.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert finish.retry_after_ms > 0


async def test_a_dead_engine_ends_every_stream_and_tells_the_process_once(world: World) -> None:
    world.submit(1, sampling={"n": 2})
    world.engine.sink.on_engine_dead("it burnt")
    world.engine.sink.on_engine_dead("again")
    frame = world.frame()
    assert [finish.stream for finish in frame.finish] == [1, 2]
    assert all(finish.code == grpc.StatusCode.UNAVAILABLE.value[0] for finish in frame.finish)
    assert all(finish.engine_dead for finish in frame.finish)
    assert "it burnt" in frame.finish[0].message
    assert world.deaths == ["it burnt"]
    assert world.engine.aborted == []
    world.submit(5)
    assert "it burnt" in world.frame().finish[0].message


async def test_choices_end_one_by_one_and_count_as_one_request(world: World) -> None:
    world.submit(4, sampling={"n": 2, "temperature": 1.0})
    one, two = world.slots()
    world.engine.step(
        [one, two],
        [1, 2],
        ended=[Ended(one, pb.FINISH_REASON_STOP)],
        prefilled=[Prefilled(one, 3, 0), Prefilled(two, 3, 2)],
    )
    assert world.total("requests_finished") == 0
    world.engine.step([two], [3], ended=[Ended(two, pb.FINISH_REASON_LENGTH)])
    assert [finish.stream for finish in world.frame().finish] == [4, 5]
    assert (world.total("requests_started"), world.total("requests_finished")) == (1, 1)
    assert world.total("prompt_tokens") == 3


async def test_a_probe_counts_in_no_total_and_passes_a_drain(world: World) -> None:
    world.replica.drain()
    message = columns.GenerateRequest(prompt=np.array([1], "<u4").tobytes())
    world.replica.submit_probe(world.outlet, message)
    [slot] = world.slots()
    world.engine.step([slot], [4], ended=[Ended(slot, pb.FINISH_REASON_LENGTH)], prefilled=[Prefilled(slot, 1, 0)])
    names = ("prompt_tokens", "requests_started", "requests_finished", "made_tokens", "dropped_tokens")
    assert [world.total(name) for name in names] == [0, 0, 0, 0, 0]
    assert world.replica.probe_tokens == 1


async def test_every_token_of_the_engine_is_sent_or_dropped_or_waits(world: World) -> None:
    def account() -> list[int]:
        return [world.total(name) for name in ("made_tokens", "generated_tokens", "dropped_tokens")]

    other = Outlet()
    world.replica.open(other, wants_load=False)
    world.submit(1)
    [kept] = world.slots()
    world.submit(1, outlet=other)
    [gone] = world.slots()
    world.engine.step([kept, gone], [10, 20])
    world.frame(other)
    world.engine.step([kept, gone], [11, 21])
    assert account() == [4, 1, 0], "three wait to be written: what a killed worker would take along"
    world.replica.close(other)
    assert account() == [4, 1, 1]
    world.engine.load.unwanted_tokens += 1
    world.engine.step([], [22])  # of the request that was aborted: the engine had it under way
    world.frame()
    assert account() == [5, 3, 2]


async def test_load_states_the_totals_and_the_busy_time(world: World) -> None:
    world.engine.load.running, world.engine.load.kv_usage = 1, 0.25
    world.submit(1)
    [slot] = world.slots()
    world.engine.step([slot], [4])
    await asyncio.sleep(0.01)
    world.frame()
    load = world.replica.load()
    assert (load.running, load.kv_usage, load.generated_tokens) == (1, 0.25, 1)
    assert load.busy_us >= 10_000
    assert load.busy_us == world.total("busy_us")


async def test_start_gives_up_in_time(tmp_path: Path) -> None:
    world = World(tmp_path, start_timeout_s=0.01)

    async def never(sink) -> EngineFacts:
        await asyncio.Event().wait()
        raise AssertionError

    world.engine.start = never  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError, match=r"0\.01 s"):
        await world.replica.start()


async def test_a_session_that_only_sends_is_ended_and_holds_nobody_up(world: World) -> None:
    wrong = columns.GenerateRequest(prompt=np.array([5000], "<u4").tobytes())
    starts = [columns.Start(stream=number, request=wrong) for number in range(LOOSE_FINISHES + 1)]
    message = columns.ClientFrame(start=starts).SerializeToString()
    turns = 0

    class Context:
        async def read(self) -> bytes:
            return message

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count_turns())
    with pytest.raises(OverloadError, match="reads no answers"):
        await _read_session(world.replica, world.outlet, Context())
    counting.cancel()
    assert turns >= LOOSE_FINISHES // REQUESTS_AT_ONCE - 2


async def test_one_message_is_not_made_into_more_answers_than_may_wait(world: World) -> None:
    wrong = columns.GenerateRequest(prompt=np.array([5000], "<u4").tobytes(), sampling=pb.SamplingParams(n=128))
    starts = [columns.Start(stream=number * 128, request=wrong) for number in range(LOOSE_FINISHES // 16)]
    message = columns.ClientFrame(start=starts).SerializeToString()

    class Context:
        async def read(self) -> bytes:
            return message

    with pytest.raises(OverloadError, match="reads no answers"):
        await _read_session(world.replica, world.outlet, Context())
    waiting = 0
    while (taken := world.outlet.take()) is not None:
        waiting += sum(len(part.finishes) for part in taken.parts)
    assert waiting <= LOOSE_FINISHES + 128


async def test_a_message_of_more_requests_than_any_router_sends_is_not_even_decoded(world: World) -> None:
    message = b"\x0a\x00" * (STARTS_A_MESSAGE + 1)

    class Context:
        async def read(self) -> bytes:
            return message

    with pytest.raises(ValueError, match="holds more than 131072 requests"):
        await _read_session(world.replica, world.outlet, Context())
    assert world.outlet.take() is None
