"""One running cluster of simulated replicas under Ray: orders, faults and updates, while clients go on."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatoken.router.client.client import TokenClient
from tests.support.clusters import RunningCluster, running

MODEL = "sim"
SPEC: dict[str, Any] = {
    "cluster": "fleet",
    "ray": {"cpu_devices": 3},
    "control": {"port": 0, "restart_backoff_s": 0.2, "device_pause_s": 3},
    "routers": {"port": 0},
    "edge": {"count": 0},
    "models": [
        {
            "name": MODEL,
            "engine": "simulated",
            "replicas": 1,
            "drain_timeout_s": 20,
            "simulated": {"decode_tokens_per_s": 500, "max_running": 8, "step_s": 0.02},
        }
    ],
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running(tmp_path_factory.mktemp("fleet"), SPEC) as started:
        yield started


class Traffic:
    """Streams that follow one another without pause; every failure is kept."""

    def __init__(self) -> None:
        self.done = 0
        self.failures: list[str] = []

    async def run(self, router: str, streams: int) -> None:
        async with TokenClient([router]) as client:
            await asyncio.gather(*(self._stream(client) for _ in range(streams)))

    async def _stream(self, client: TokenClient) -> None:
        while True:
            try:
                tokens = await client.generate(MODEL, [1, 2, 3], max_tokens=20, ignore_eos=True).tokens()
                assert len(tokens) == 20
                self.done += 1
            except Exception as error:
                self.failures.append(repr(error))


@contextlib.asynccontextmanager
async def traffic(cluster: RunningCluster, streams: int = 4) -> AsyncIterator[Traffic]:
    """Traffic while the block runs; it must have got through, and nothing may have failed."""
    flow = Traffic()
    task = asyncio.create_task(flow.run(await asyncio.to_thread(cluster.address, "router"), streams))
    try:
        yield flow
        before, deadline = flow.done, time.monotonic() + 20
        while flow.done < before + streams and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody else waits
            await asyncio.sleep(0.05)
        assert flow.done >= before + streams, "traffic stands still"
        assert not flow.failures
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def in_thread(call: Any, *words: Any, **options: Any) -> Any:
    return await asyncio.to_thread(lambda: call(*words, **options))


def wants(cluster: RunningCluster, ready: int, timeout_s: float = 60.0) -> dict[str, Any]:
    """Waits until exactly `ready` replicas serve and none is on its way."""

    def met(status: dict[str, Any]) -> bool:
        states = [row["state"] for row in status["replicas"] if row["state"] not in ("STOPPED", "FAILED")]
        return states == ["READY"] * ready

    return cluster.wait(met, timeout_s)


def replaced(cluster: RunningCluster, replica: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """Waits until one replica serves, and it is another than `replica`."""

    def met(status: dict[str, Any]) -> bool:
        serving = [row["replica"] for row in status["replicas"] if row["state"] == "READY"]
        live = [row for row in status["replicas"] if row["state"] not in ("STOPPED", "FAILED")]
        return len(serving) == len(live) == 1 and serving != [replica]

    return cluster.wait(met, timeout_s)


def test_status_names_what_runs_and_says_that_it_is_simulated(cluster: RunningCluster) -> None:
    status = cluster.wait(lambda found: found["models"][0]["ready"] == 1)
    replica = status["replicas"][0]
    assert (replica["engine"], replica["ranks"]) == ("simulated", ["rank 0: local device 0"])
    assert [node["state"] for node in status["nodes"]] == ["alive"]
    assert {entry["kind"] for entry in status["processes"]} == {"router", "agent"}
    assert "simulated (runs no model)" in cluster.run("status")
    assert "READY" in cluster.run("events")
    assert "replica.ready" in cluster.run("logs", replica["replica"])
    assert "controller.started" in json.loads(cluster.run("events", "--json").splitlines()[0])["kind"]


def test_generate_streams_and_names_what_is_wrong(cluster: RunningCluster) -> None:
    out = cluster.run("generate", "--tokens", "1,2,3", "--max-tokens", "5")
    assert len(out.split()) == 5
    for words, complaint in [
        (("--model", "nope", "--tokens", "1"), "model: 'nope' is not allowed; one of: sim"),
        (("--tokens", "1", "--temperature", "-1"), "temperature: -1.0 is not allowed"),
        (("--tokens", "99999999"), "is not allowed"),
        (("--tokens", "1", "--max-tokens", "10000000"), "max_tokens: 10000000 is not allowed"),
        (("--tokens", "x"), "--tokens: 'x' is not allowed"),
    ]:
        assert complaint in cluster.run("generate", *words, status=2)


async def test_scaling_under_load_fails_no_request(cluster: RunningCluster) -> None:
    assert ": planned on local" in await in_thread(cluster.run, "scale", f"{MODEL}=2", "--dry-run")
    assert len(await in_thread(cluster.ready, MODEL)) == 1
    async with traffic(cluster):
        await in_thread(cluster.run, "scale", f"{MODEL}=2", "--wait")
        assert len(await in_thread(cluster.ready, MODEL)) == 2
        await in_thread(cluster.run, "scale", f"{MODEL}=1", "--wait")
    status = wants(cluster, 1)
    ended = [row for row in status["replicas"] if row["state"] == "STOPPED"]
    assert ended
    assert "drained" in ended[-1]["reason"]


@pytest.mark.parametrize("victim", ["worker", "actor"])
async def test_a_killed_replica_comes_back_under_a_new_id(cluster: RunningCluster, victim: str) -> None:
    (replica,) = cluster.ready(MODEL)
    worker = cluster.pid("-m megatoken.worker", replica)
    killed = worker if victim == "worker" else cluster.parent(worker)
    os.kill(killed, signal.SIGKILL)
    status = await in_thread(replaced, cluster, replica)
    (failed,) = (row for row in status["replicas"] if row["replica"] == replica)
    assert failed["state"] == "FAILED"
    assert failed["reason"]
    assert not cluster.pids("-m megatoken.worker", f"{replica}.json")
    assert cluster.run("generate", "--tokens", "1", "--max-tokens", "2")


async def test_a_killed_controller_carries_on_and_traffic_does_not_pause(cluster: RunningCluster) -> None:
    before = cluster.status()
    workers = sorted(cluster.pids("-m megatoken.worker"))
    async with traffic(cluster):
        controller = next(pid for pid in cluster.pids("ray::ControllerActor"))
        os.kill(controller, signal.SIGKILL)

        def back() -> dict[str, Any]:
            deadline = time.monotonic() + 60
            while True:
                out = cluster.run("status", "--json", status=None)
                with contextlib.suppress(ValueError):
                    status: dict[str, Any] = json.loads(out)
                    if status["nodes"] and all(row["state"] == "READY" for row in status["processes"]):
                        return status
                assert time.monotonic() < deadline, out
                time.sleep(0.2)

        after = await in_thread(back)
    assert sorted(cluster.pids("-m megatoken.worker")) == workers
    assert after["generation"] == before["generation"]
    assert after["membership_epoch"] == before["membership_epoch"]
    assert after["membership_version"] >= before["membership_version"]
    live = [row["replica"] for row in after["replicas"] if row["state"] == "READY"]
    assert live == [row["replica"] for row in before["replicas"] if row["state"] == "READY"]
    assert "carries on" in cluster.run("events")


async def test_what_has_no_room_is_blocked_and_starts_by_itself(cluster: RunningCluster) -> None:
    assert "Needs 1 device" in cluster.run("scale", f"{MODEL}=4", "--dry-run")
    cluster.run("scale", f"{MODEL}=4")
    status = cluster.wait(lambda found: found["models"][0]["ready"] == 3 and found["models"][0]["blocked"] != "")
    assert "device" in status["models"][0]["blocked"]
    assert "is blocked" in cluster.run("status")
    cluster.run("scale", f"{MODEL}=1")
    wants(cluster, 1)
    assert not cluster.status()["models"][0]["blocked"]


async def test_an_update_exchanges_replicas_and_a_bad_one_is_rolled_back(cluster: RunningCluster) -> None:
    def reseed(spec: dict[str, Any]) -> None:
        spec["models"][0]["simulated"] = {**spec["models"][0]["simulated"], "seed": 7}

    (old,) = cluster.ready(MODEL)
    async with traffic(cluster):
        out = await in_thread(cluster.apply, reseed)
        assert "simulated changes" in out
        await in_thread(replaced, cluster, old)
    (updated,) = cluster.ready(MODEL)

    def break_it(spec: dict[str, Any]) -> None:
        spec["models"][0]["env"] = {"PYTHONPATH": "/nonexistent", "PYTHONHOME": "/nonexistent"}

    async with traffic(cluster):
        await in_thread(cluster.apply, break_it)
        await in_thread(cluster.wait, lambda _: "rolled back" in cluster.run("events"))
    wants(cluster, 1)
    assert cluster.ready(MODEL) == [updated]

    def mend(spec: dict[str, Any]) -> None:
        del spec["models"][0]["env"]

    assert "nothing changes" in cluster.apply(mend)


async def test_drains_of_a_replica_and_of_a_node(cluster: RunningCluster) -> None:
    (replica,) = cluster.ready(MODEL)
    async with traffic(cluster):
        await in_thread(cluster.run, "drain", "replica", replica)
        await in_thread(replaced, cluster, replica)
    assert "is not allowed" in cluster.run("drain", "replica", "nope", status=2)
    cluster.run("drain", "node", "local")
    status = cluster.wait(lambda found: found["nodes"][0]["state"] == "drained")
    assert status["models"][0]["blocked"]
    cluster.run("drain", "node", "local", "--undo")
    wants(cluster, 1)


async def test_a_cordoned_device_is_left_and_used_again_once_it_is_well(cluster: RunningCluster) -> None:
    (replica,) = cluster.ready(MODEL)
    rank = next(row for row in cluster.status()["replicas"] if row["replica"] == replica)["ranks"][0]
    device = f"local:{rank.rpartition(' ')[2]}"
    async with traffic(cluster):
        said = await in_thread(cluster.run, "cordon", device, "--reason", "its fan is loud")
        await in_thread(replaced, cluster, replica)
    assert replica in said
    assert "cordoned: its fan is loud" in cluster.status()["nodes"][0]["devices_out"][0]
    cluster.run("cordon", device, "--undo")
    cluster.wait(lambda found: not found["nodes"][0]["devices_out"])
    assert f"{device}: back in service" in cluster.run("events")
    assert "one of this node's: 0, 1, 2" in cluster.run("cordon", "local:9", status=2)
    assert "'local' is not allowed; e.g. gpu-03:5" in cluster.run("cordon", "local", status=2)


def test_a_device_on_which_replicas_keep_dying_goes_and_comes_back_after_a_check(cluster: RunningCluster) -> None:
    """A fault that the program itself raises: what ill memory does."""
    cluster.run("scale", f"{MODEL}=0", "--wait")
    cluster.run("scale", f"{MODEL}=1", "--wait")
    (replica,) = cluster.ready(MODEL)
    rank = next(row for row in cluster.status()["replicas"] if row["replica"] == replica)["ranks"][0]
    device = f"local:{rank.rpartition(' ')[2]}"
    for _ in range(3):
        os.kill(cluster.pid("-m megatoken.worker", f"/{replica}.json"), signal.SIGSEGV)
        (replica,) = [row["replica"] for row in replaced(cluster, replica)["replicas"] if row["state"] == "READY"]
    events = [json.loads(line) for line in cluster.run("events", "--json").splitlines()]
    (out,) = [row for row in events if row["kind"] == "device.out"]
    assert out["subject"] == device
    cluster.wait(lambda found: not found["nodes"][0]["devices_out"])
    assert f"{device}: back in service" in cluster.run("events")
    assert [replica] == cluster.ready(MODEL), "it stays where it was put"


def test_the_report_tells_of_the_last_hour(cluster: RunningCluster, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    text = cluster.run("report", "--since", "1h", "--html", str(page))
    assert "cluster fleet, " in text
    assert " ready after " in text, "cold starts with their phases"
    assert "MODEL" in text
    assert page.read_text().startswith("<!doctype html>")
    assert "--since: 'soon' is not allowed" in cluster.run("report", "--since", "soon", status=2)


def test_a_wrong_spec_names_the_field_and_changes_nothing(cluster: RunningCluster, tmp_path: Path) -> None:
    before = cluster.status()["generation"]
    for text, complaint in [
        ("cluster: fleet\nmodels: [{name: sim, engine: simulated, replicas: -1}]", "models.sim.replicas: -1"),
        ("cluster: fleet\nmodels: [{name: a, engine: simulated}, {name: a, engine: simulated}]", "given 2 times"),
        ("cluster: other\nmodels: []", "cluster"),
        ("cluster: fleet\nrouters: {policy: best}", "routers.policy: 'best'"),
        ("cluster: [", "not YAML"),
    ]:
        path = tmp_path / "wrong.yaml"
        path.write_text(text)
        assert complaint in cluster.run("apply", "-f", str(path), status=None)
    assert cluster.status()["generation"] == before
    assert "one of: sim" in cluster.run("scale", "nope=2", status=2)
