"""The throughput agent: does what the epoch machine says, with the node's counters and the epoch's reducer.

One task handles events in order; what takes time (connect, greet, reduce) runs as the epoch's task and comes back as an
event. Nothing here waits inside a collective: the reducer process does, and is killed when its epoch ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Final

from megatoken.access.channel import Present
from megatoken.log import log_event
from megatoken.v1 import membership_pb2, throughput_pb2
from megatoken.worker.throughput.config import AgentConfig
from megatoken.worker.throughput.controller_link import ControllerLink
from megatoken.worker.throughput.counter_files import CounterFiles, ledger_id
from megatoken.worker.throughput.decide.epochs import (
    Abandon,
    Broke,
    Connect,
    Connected,
    Epochs,
    EpochState,
    Event,
    Greet,
    Greeted,
    Instruction,
    Publish,
    PublishIncomplete,
    Reduce,
    ReduceDone,
    Regrouped,
    Report,
    TickDue,
    WakeIn,
)
from megatoken.worker.throughput.decide.hierarchy import reduction_groups
from megatoken.worker.throughput.decide.layout import (
    WIRE_VERSION,
    Greeting,
    Layout,
    LayoutError,
    greeting_of,
    pack_departed,
    unpack_departed,
)
from megatoken.worker.throughput.decide.ledger import NodeLedger, NodeSums
from megatoken.worker.throughput.decide.rates import ClusterRates, RateRow
from megatoken.worker.throughput.metrics import AgentMetrics
from megatoken.worker.throughput.reachability import unreachable
from megatoken.worker.throughput.reduce.client import ForkServer, NoAnswer, ReduceFailure, Reducer
from megatoken.worker.throughput.sample_servicer import Outcome, SampleServicer

SLACK_S: Final = 0.25  # the reducer's own deadline comes first: it knows more about what went wrong
CONNECT_SLACK_S: Final = 3.0  # a fork and a native error take long on a starved machine; the next epoch ends the wait
CLOCK_JUMP_S: Final = 0.5
FORKSERVER_CHECK_S: Final = 0.5
LINKS_CHECK_S: Final = 1.0
ROWS_TIMEOUT_S: Final = 2.0
STANCES: Final = {
    EpochState.OUTSIDE: throughput_pb2.ATTENDANCE_STATE_OUTSIDE,
    EpochState.FORMING: throughput_pb2.ATTENDANCE_STATE_FORMING,
    EpochState.GREETING: throughput_pb2.ATTENDANCE_STATE_FORMING,
    EpochState.STANDING: throughput_pb2.ATTENDANCE_STATE_TICKING,
    EpochState.REDUCING: throughput_pb2.ATTENDANCE_STATE_TICKING,
    EpochState.BROKEN: throughput_pb2.ATTENDANCE_STATE_FAILED,
}
ERRORS: Final = {  # what megatoken_agent_errors_total calls a refusal
    throughput_pb2.ATTENDANCE_REFUSAL_WIRE_VERSION: "version",
    throughput_pb2.ATTENDANCE_REFUSAL_BACKEND: "backend",
}
logger = logging.getLogger(__name__)


class Agent:
    """One node's agent. `address` and `store_address` are where others reach it."""

    def __init__(
        self,
        config: AgentConfig,
        forkserver: ForkServer,
        backends: tuple[str, ...],
        address: str,
        store_address: str,
        metrics: AgentMetrics,
        present: Present | None = None,
    ) -> None:
        directory = Path(config.counters_path)
        self._loop = asyncio.get_running_loop()
        self._config, self._forkserver, self._backends, self.metrics = config, forkserver, backends, metrics
        self._member = membership_pb2.ThroughputMember(
            agent=config.agent, node=config.node, site=config.site, address=address, store_address=store_address
        )
        self._own = Greeting(config.agent, config.node, config.site, ledger_id(directory))
        self._files, self._ledger = CounterFiles(directory), NodeLedger()
        self._serving: frozenset[str] | None = None
        self.rates = ClusterRates(config.standalone_rates)
        self.samples = SampleServicer(self.rates)
        self._epochs = Epochs(config.tick_s)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._group = membership_pb2.ThroughputGroup()
        self._rank = -1
        self._published: dict[int, tuple[membership_pb2.ThroughputGroup, float]] = {}  # groups not yet entered
        self._newest = 0
        self._regrouped_s = 0.0
        self._reducer: Reducer | None = None
        self._layout: Layout | None = None
        self._greeted = self._own
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._problem: tuple[str, tuple[str, ...]] = ("", ())
        self._refused = ""
        self._clock_offset = time.time() - time.monotonic()
        self._collective_s = 0.0
        self.last_complete_s: float | None = None
        self._link = ControllerLink(
            config.controllers,
            config.agent,
            config.attend_s,
            self._attendance,
            self._on_snapshot,
            self._on_reply,
            config.controller_tls,
            present,
        )

    async def run(self) -> None:
        """Until cancelled, or until a fault of ours ends one of its loops; leaves no reducer behind."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for loop in (self._handle_events, self._link.run, self._keep_forkserver, self._try_links):
                    tasks.create_task(loop())
        finally:
            self._abandon()
            await self._forkserver.stop()

    async def _handle_events(self) -> None:
        while True:
            event = await self._events.get()
            if isinstance(event, Regrouped):
                self._enter(event.epoch)
            for instruction in self._epochs.handle(event):
                self._do(instruction)

    async def _keep_forkserver(self) -> None:
        """Starts the fork server again when it died. Meanwhile the agent attends with no backend: it is in no group."""
        while True:
            await asyncio.sleep(FORKSERVER_CHECK_S)
            if not self._forkserver.alive:
                log_event(logger, "forkserver.restart", "the process that forks reducers ended", level=logging.ERROR)
                self._link.hurry()
                try:
                    await self._forkserver.start()
                except ReduceFailure as failure:
                    self.metrics.error(failure.reason)
                    log_event(logger, "forkserver.failed", str(failure), level=logging.ERROR)
                self._link.hurry()

    def throughput_state(self) -> tuple[int, int, bool, float | None]:
        """(epoch, ranks, complete, monotonic seconds of the last whole sample), for the metrics."""
        outcome = self.samples.outcome
        return outcome.epoch, outcome.ranks, outcome.complete, self.last_complete_s

    def rows(self) -> list[RateRow]:
        """Every row, for the metrics server's threads: made on the loop, which alone changes the rates."""

        async def made() -> list[RateRow]:
            return self.rates.rows()

        return asyncio.run_coroutine_threadsafe(made(), self._loop).result(ROWS_TIMEOUT_S)

    # What the controller says and is told.

    def _on_snapshot(self, snapshot: membership_pb2.Snapshot) -> None:
        self._serving = frozenset(replica.replica for replica in snapshot.replicas)
        group = snapshot.throughput
        if not snapshot.HasField("throughput") or group.epoch <= self._newest:
            return
        self._newest = group.epoch
        self._published[group.epoch] = (group, time.monotonic())
        agents = [member.agent for member in group.members]
        rank = agents.index(self._config.agent) if self._config.agent in agents else None
        self._events.put_nowait(Regrouped(group.epoch, rank, len(agents), group.why))

    def _enter(self, epoch: int) -> None:
        """Makes a published group the present one; in step with the epoch machine, not with the network."""
        self._group, self._regrouped_s = self._published.pop(epoch)
        agents = [member.agent for member in self._group.members]
        self._rank = agents.index(self._config.agent) if self._config.agent in agents else -1

    def _on_reply(self, reply: throughput_pb2.AttendanceReply) -> None:
        if reply.refused and reply.refused != self._refused:
            log_event(logger, "agent.refused", reply.refused, level=logging.ERROR)
            self.metrics.error(ERRORS.get(reply.refusal, "other"))
            self.samples.retract(reply.refused)
        self._refused = reply.refused

    def _attendance(self) -> throughput_pb2.Attendance:
        state = self._epochs.state
        greeting_again = state is EpochState.GREETING and self._epochs.tick > 0
        return throughput_pb2.Attendance(
            member=self._member,
            epoch=self._epochs.epoch,
            state=throughput_pb2.ATTENDANCE_STATE_TICKING if greeting_again else STANCES[state],
            problem=self._problem[0],
            suspects=self._problem[1],
            backends=self._backends if self._forkserver.alive else (),  # nothing to reduce with: not in a group
            wire_version=WIRE_VERSION,
            # A restarted controller learns the group from rank 0 and checks it against the others' epochs.
            members=[member.agent for member in self._group.members] if self._rank == 0 else (),
        )

    # Instructions of the epoch machine.

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case Abandon():
                self._abandon()
            case Connect():
                self._start(instruction.epoch, self._connect(instruction))
            case Greet():
                self._start(instruction.epoch, self._greet(instruction.epoch))
            case Reduce():
                self._start(instruction.epoch, self._reduce(instruction.epoch))
            case WakeIn(epoch, seconds):
                self._wake_in(epoch, seconds)
            case Publish(epoch, tick):
                self._publish(epoch, tick)
            case PublishIncomplete(epoch, tick, reason):
                self._publish_incomplete(epoch, tick, reason)
            case Report():
                self._report(instruction)

    def _wake_in(self, epoch: int, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._events.put_nowait, TickDue(epoch))

    def _abandon(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reducer is not None:
            self._reducer.kill()
            self._reducer = None

    def _start(self, epoch: int, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(self._supervise(epoch, work))

    async def _supervise(self, epoch: int, work: Coroutine[Any, Any, None]) -> None:
        """Runs one step of an epoch. Whatever goes wrong in it breaks the epoch, and not the agent."""
        try:
            await work
        except ReduceFailure as failure:
            await self._fail(epoch, failure)
        except LayoutError as error:
            await self._fail(epoch, ReduceFailure(str(error), "version"))
        except Exception as error:
            logger.exception("a step of epoch %d failed", epoch)
            await self._fail(epoch, ReduceFailure(f"{type(error).__name__}: {error}", "other"))

    async def _connect(self, order: Connect) -> None:
        group, config = self._group, self._config
        self._reducer = await self._forkserver.fork()
        host, _, port = group.members[0].store_address.rpartition(":")
        facts = {
            "epoch": order.epoch,
            "rank": order.rank,
            "groups": reduction_groups([member.site for member in group.members], group.hierarchical),
            "backend": group.backend or "gloo",
            "device": config.device,
            "store": (host.strip("[]"), int(port)),
            "host": config.reachable_host,
            "interface": config.interface,
            "timeout_s": self._forming_s,
        }
        await self._reducer.connect(facts, self._forming_s + CONNECT_SLACK_S)
        self.metrics.formed(group.backend or "gloo")
        self._events.put_nowait(Connected(order.epoch))

    @property
    def _forming_s(self) -> float:
        return self._config.forming_s(self._group.backend or "gloo")

    async def _greet(self, epoch: int) -> None:
        reducer, timeout_s = self._reducer, self._forming_s
        if reducer is None:
            return
        self._greeted = greeting_of(self._own, self._read_counters(), self._serving)
        blobs = await reducer.gather(self._greeted.pack(), timeout_s)
        layout = Layout.of([Greeting.unpack(blob) for blob in blobs])
        for blob in await reducer.gather(pack_departed(self.rates.departed(layout)), timeout_s):
            self.rates.learn(unpack_departed(blob), time.monotonic())
        self.rates.arrange(layout)
        self._layout = layout
        self._events.put_nowait(Greeted(epoch))

    async def _reduce(self, epoch: int) -> None:
        reducer, layout = self._reducer, self._layout
        if reducer is None or layout is None:
            return
        sums = self._read_counters()
        ours = greeting_of(self._own, sums, self._serving)
        vector = layout.encode(self._rank, sums, ours != self._greeted)
        reduced = await reducer.reduce(vector, self._config.deadline_s, SLACK_S)
        cells, news = layout.decode(reduced.sums)
        self.rates.update(cells, time.monotonic())
        self._collective_s = reduced.seconds
        self._events.put_nowait(ReduceDone(epoch, news > 0))

    async def _fail(self, epoch: int, failure: ReduceFailure) -> None:
        """Names who could not be reached before the failure is reported."""
        self.metrics.error(failure.reason)
        if isinstance(failure, NoAnswer) and self._epochs.state is EpochState.FORMING:
            self._forkserver.abort()  # frozen, or waiting for a child that cannot die; `_keep_forkserver` makes another
        suspects = set(failure.suspects)
        addresses = [member.store_address for member in self._group.members]
        suspects |= await unreachable(addresses, self._rank)
        log_event(
            logger,
            "epoch.broke",
            str(failure),
            level=logging.WARNING,
            epoch=epoch,
            reason=failure.reason,
            suspects=sorted(suspects),
        )
        self._events.put_nowait(Broke(epoch, str(failure), tuple(sorted(suspects))))

    def _names(self, ranks: Iterable[int]) -> tuple[str, ...]:
        members = self._group.members
        return tuple(members[rank].agent for rank in ranks if rank < len(members))

    async def _try_links(self) -> None:
        """Outside a group, tells the controller which members it cannot reach: it would only break the group."""
        while True:
            await asyncio.sleep(LINKS_CHECK_S)
            if self._epochs.state is EpochState.OUTSIDE and self._group.members:
                group = self._group
                missing = await unreachable([member.store_address for member in group.members], -1)
                if group is self._group and self._epochs.state is EpochState.OUTSIDE:
                    self._problem = (self._problem[0], self._names(sorted(missing)))

    def _read_counters(self) -> NodeSums:
        now = time.monotonic()
        readings = self._files.read()
        fallen = self._ledger.record(readings, now)
        for fall in fallen:
            log_event(logger, "counter.backwards", str(fall), level=logging.ERROR, id=fall.writer.id)
        for problem in self._files.problems:
            log_event(logger, "counter.unreadable", problem, level=logging.ERROR)
        self.metrics.faults(len(self._files.problems), len(fallen))
        self._files.problems.clear()
        workers = sum(writer.kind == "worker" for writer, _ in readings)
        self.metrics.files(workers, len(readings) - workers)
        return self._ledger.sums(now, self._serving)

    def _publish(self, epoch: int, tick: int) -> None:
        now = time.monotonic()
        unix_s = self._stamp(now)
        self.metrics.complete(self._collective_s, now - self._regrouped_s if tick == 1 else None)
        self.last_complete_s = now
        ranks = len(self._group.members)
        backend = self._group.backend or "gloo"
        self.samples.post(Outcome(epoch, tick, unix_s, True, "", ranks, self._collective_s, backend))

    def _publish_incomplete(self, epoch: int, tick: int, reason: str) -> None:
        self.metrics.incomplete()
        why = self._refused or reason
        if not self._link.connected:
            why += "; no controller answers"
        ranks = len(self._group.members)
        unix_s = self._stamp(time.monotonic())
        self.samples.post(Outcome(epoch, tick, unix_s, False, why, ranks, 0.0, self._group.backend or "gloo"))

    def _stamp(self, now: float) -> float:
        """The wall clock, for people; nothing is computed from it. A jump is counted and named."""
        unix_s = time.time()
        jump = unix_s - now - self._clock_offset
        if abs(jump) > CLOCK_JUMP_S:
            self._clock_offset += jump
            self.metrics.clock_jumps.inc()
            log_event(
                logger, "clock.jump", f"the wall clock moved by {jump:+.3f} s", level=logging.WARNING, jump_s=jump
            )
        return unix_s

    def _report(self, report: Report) -> None:
        agents = [member.agent for member in self._group.members]
        if report.state is not EpochState.OUTSIDE:  # outside, whom it could not reach stands until it was tried again
            self._problem = (report.problem[:300], self._names(report.suspects))
        log_event(logger, f"epoch.{report.state}", epoch=report.epoch, ranks=len(agents), rank=self._rank)
        self._link.hurry()
