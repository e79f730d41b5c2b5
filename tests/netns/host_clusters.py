"""A whole Megatoken cluster on hosts, brought up by `megatoken up` on node0, and watched from outside."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from deploy.netns.hosts import Host
from deploy.netns.ray_nodes import RayNodes
from megatoken.cluster.client.control import CommandError, ControlClient
from megatoken.errors import MegatokenError
from megatoken.router.client.client import TokenClient
from megatoken.v1 import control_pb2

UP_TIMEOUT_S = 300.0
FLOW_S = 60.0
Met = Callable[[control_pb2.ClusterStatus], bool]


class HostCluster:
    """One cluster. Commands run on node0; status and requests come from this machine, over the bridge."""

    def __init__(self, nodes: RayNodes, spec: Mapping[str, Any]) -> None:
        self.nodes = nodes
        self.spec: dict[str, Any] = {
            "cluster": "lab",
            "ray": {"address": "auto"},
            "control": {"worker_lease_s": 10},  # a replica lost with its node is replaced only when its lease is over
            "edge": {"count": 0},
            "agents": {"enabled": False},
            **spec,
        }
        self.control = ControlClient(f"{nodes.head.address}:7700")  # until `up` made an operator's token
        self.router = f"{nodes.head.address}:7701"

    def command(self, *words: str, timeout_s: float = UP_TIMEOUT_S, check: bool = True) -> str:
        """Runs `megatoken WORDS` on node0; returns what it wrote."""
        argv = [sys.executable, "-m", "megatoken.cluster.cli", *words]
        done = self.nodes.head.run(argv, self.nodes.environment(self.nodes.head), timeout_s=timeout_s, check=check)
        return done.stdout + done.stderr

    def write_spec(self) -> str:
        self.nodes.head.path("/tmp/spec.yaml").write_text(yaml.safe_dump(self.spec))
        return "/tmp/spec.yaml"

    def up(self, spec: str = "") -> None:
        """Brings it up, from a spec's file or from its own."""
        claimed = self.nodes.gpus is not None  # devices that no driver shows: the doctor would stop the launch
        self.command("up", "-f", spec or self.write_spec(), *(["--no-doctor"] if claimed else []))
        self.control = ControlClient(f"{self.nodes.head.address}:7700", token=self.command("token").strip())

    def apply(self, change: Callable[[dict[str, Any]], None]) -> str:
        change(self.spec)
        return self.command("apply", "-f", self.write_spec())

    def down(self) -> None:
        self.command("down", "--drain", "5")

    def status(self) -> control_pb2.ClusterStatus:
        return self.control.status()

    def wait(self, met: Met, timeout_s: float) -> control_pb2.ClusterStatus:
        """The first status that meets a condition, while the controller may be away. Raises with the last one."""
        deadline, last = time.monotonic() + timeout_s, "the controller never answered"
        while True:
            try:
                status = self.status()
                if met(status):
                    return status
                last = str(status)
            except CommandError as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not met within {timeout_s:g} s; last: {last}\n{self.events()[-4000:]}")
            time.sleep(0.05)

    def events(self) -> str:
        return self.command("events", check=False)

    def wait_ready(self, model: str, count: int, timeout_s: float = 60.0) -> list[control_pb2.ReplicaStatus]:
        """The READY replicas of a model, once there are `count` and nothing else of it is live."""

        def met(status: control_pb2.ClusterStatus) -> bool:
            live = [row for row in status.replicas if row.model == model and row.state not in ("STOPPED", "FAILED")]
            return len(live) == count and all(row.state == "READY" for row in live)

        status = self.wait(met, timeout_s)
        return [row for row in status.replicas if row.model == model and row.state == "READY"]

    def host_of(self, replica: control_pb2.ReplicaStatus) -> Host:
        """The host that a replica's worker runs on."""
        address = replica.address.rpartition(":")[0]
        return next(host for host in self.nodes.network.hosts if host.address == address)

    def worker_pid(self, replica: control_pb2.ReplicaStatus) -> int:
        """PID, on this machine, of a replica's worker process."""
        host = self.host_of(replica)
        (pid,) = [
            pid
            for pid, command in host.processes().items()
            if "-m megatoken.worker" in command and f"/{replica.replica}.json" in command
        ]
        return pid


@contextmanager
def running(nodes: RayNodes, spec: Mapping[str, Any]) -> Iterator[HostCluster]:
    """A cluster that is up; takes it down and checks that it left no process of its own on any host."""
    cluster = HostCluster(nodes, spec)
    cluster.up()
    with cluster.control:
        yield cluster
        cluster.down()
    words = ("-m megatoken.worker", "-m megatoken.router", "ProcessActor", "EngineCore", "CpuRank", "ControllerActor")
    deadline = time.monotonic() + 15
    while left := [
        f"{host.name}: {command}"
        for host in nodes.network.hosts
        for command in host.processes().values()
        if any(word in command for word in words)
    ]:
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind by `megatoken down`: {left}")
        time.sleep(0.1)


@dataclass
class Report:
    """What clients saw while something was lost."""

    answers: list[list[int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resumes: int = 0
    longest_gap_s: float = 0.0


class Traffic:
    """Clients that stream through the router from a thread, one request after another, until `stop`."""

    def __init__(self, router: str, model: str, prompts: Sequence[Sequence[int]], tokens: int, streams: int) -> None:
        self.report = Report()
        self._arguments = (router, model, prompts, tokens, streams)
        self._stopping = threading.Event()
        self._flowing: set[int] = set()  # streams that have had a token
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        if not self._started.wait(FLOW_S):
            raise RuntimeError(f"not every stream had a token within {FLOW_S} s: {self.report.errors[:3]}")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def stop(self, timeout_s: float = 60.0) -> Report:
        """Lets every running request end; returns what was seen."""
        self._stopping.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise AssertionError(f"requests still run {timeout_s} s after the last was sent: a stream hangs")
        return self.report

    async def _run(self) -> None:
        router, model, prompts, tokens, streams = self._arguments
        async with TokenClient([router]) as client:
            await asyncio.gather(
                *(
                    self._stream(client, model, prompts[number % len(prompts)], tokens, number)
                    for number in range(streams)
                )
            )

    async def _stream(self, client: TokenClient, model: str, prompt: Sequence[int], tokens: int, number: int) -> None:
        while not self._stopping.is_set():
            stream = client.generate(model, prompt=list(prompt), max_tokens=tokens, temperature=0.0, ignore_eos=True)
            got: list[int] = []
            last_s = time.monotonic()
            try:
                async for delta in stream:
                    got += delta.tokens
                    now = time.monotonic()
                    self.report.longest_gap_s = max(self.report.longest_gap_s, now - last_s)
                    last_s = now
                    self._flow(number)
            except MegatokenError as error:
                self.report.errors.append(f"{type(error).__name__}: {error}")
                continue
            self.report.answers.append(got)
            self.report.resumes += stream.finish.resumes if stream.finish is not None else 0

    def _flow(self, number: int) -> None:
        self._flowing.add(number)
        if len(self._flowing) == self._arguments[4]:
            self._started.set()


def ask(router: str, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Greedy answers to prompts, one after another."""

    async def run() -> list[list[int]]:
        async with TokenClient([router]) as client:
            return [
                await client.generate(
                    model, prompt=list(prompt), max_tokens=tokens, temperature=0.0, ignore_eos=True
                ).tokens()
                for prompt in prompts
            ]

    return asyncio.run(run())


def as_json(status: control_pb2.ClusterStatus) -> str:
    """A status in a failure's message."""
    return json.dumps([f"{row.replica} {row.state} {row.reason}" for row in status.replicas])
