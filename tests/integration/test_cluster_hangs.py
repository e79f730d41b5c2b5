"""Replicas that Ray calls alive and that do not live: found by the controller, named, replaced. Simulated engines."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatoken.process.tag import replica_tag, tagged_processes
from megatoken.router.client.client import TokenClient
from tests.support.clusters import RunningCluster, running

MODEL = "m"


def spec(**simulated: Any) -> dict[str, Any]:
    return {
        "cluster": "hangs",
        "control": {"port": 0, "worker_lease_s": 4, "hang_s": 3, "probe_s": 1, "restart_backoff_s": 0.2},
        "routers": {"port": 0, "resume": {"hang_s": 2}},
        "edge": {"count": 0},
        "agents": {"enabled": False},
        "ray": {"cpu_devices": 2},
        "models": [{"name": MODEL, "engine": "simulated", "simulated": simulated}],
    }


def replaced(cluster: RunningCluster, old: str, within_s: float) -> dict[str, Any]:
    """The row of the failed replica, once another one serves in its place."""

    def met(status: dict[str, Any]) -> bool:
        rows = [row for row in status["replicas"] if row["model"] == MODEL]
        return any(row["state"] == "READY" and row["replica"] != old for row in rows)

    rows = cluster.wait(met, within_s)["replicas"]
    return next(row for row in rows if row["replica"] == old)


async def test_an_idle_engine_that_stands_still_is_found_and_replaced(tmp_path: Path) -> None:
    with running(tmp_path, spec(faults=[{"kind": "hang", "after_s": 4}])) as cluster:
        row = replaced(cluster, f"{MODEL}-1", 40.0)
        assert row["state"] == "FAILED"
        # Idle, or with the controller's own question for a token, whichever it had when it stood still.
        assert "has made no step for" in row["reason"]
        assert "rank 0: local device 0" in row["reason"]


async def test_a_frozen_worker_is_replaced_and_serves_nobody_when_it_wakes(tmp_path: Path) -> None:
    with running(tmp_path, spec(decode_tokens_per_s=200, max_running=4)) as cluster:
        router = cluster.address("router")
        worker = cluster.pid("-m megatoken.worker ", f"{MODEL}-1.json")
        async with TokenClient([router]) as client:
            stream = client.generate(MODEL, prompt=[1, 2, 3], max_tokens=400, ignore_eos=True, temperature=0.0)
            got: list[int] = []
            frozen_s = 0.0
            async for delta in stream:
                got += delta.tokens
                if not frozen_s and len(got) > 20:
                    os.kill(worker, signal.SIGSTOP)
                    frozen_s = time.monotonic()
            assert len(got) == 400, "the request went on on the replacement, no token lost or doubled"
            undisturbed = await client.generate(
                MODEL, prompt=[1, 2, 3], max_tokens=400, ignore_eos=True, temperature=0.0
            ).tokens()
            assert got == undisturbed
        row = replaced(cluster, f"{MODEL}-1", 10.0)
        assert "its worker has not answered for" in row["reason"]
        assert f"its worker on local: process {worker} is stopped" in row["reason"]
        assert not Path(f"/proc/{worker}").exists(), "a frozen process is ended, not left"


@pytest.mark.vllm
@pytest.mark.timeout(600)
async def test_a_frozen_rank_of_a_wide_replica_is_named_and_the_replica_replaced(tmp_path: Path) -> None:
    wide = {
        "cluster": "wide",
        "control": {"port": 0, "worker_lease_s": 10, "hang_s": 6, "probe_s": 2},
        "routers": {"port": 0},
        "edge": {"count": 0},
        "agents": {"enabled": False},
        "ray": {"cpu_devices": 2},
        "models": [
            {
                "name": MODEL,
                "source": "builtin:tiny-llama",
                "dtype": "float32",
                "max_model_len": 256,
                "kv_cache_gib": 0.25,
                "parallel": {"tensor": 2},
            }
        ],
    }
    tag = replica_tag(tmp_path / "run" / "wide", f"{MODEL}-1")
    with running(tmp_path, wide) as cluster:
        (rank,) = [process for process in tagged_processes(tag) if process.part == "rank 1"]
        os.kill(rank.pid, signal.SIGSTOP)

        def failed(status: dict[str, Any]) -> bool:
            return any(row["replica"] == f"{MODEL}-1" and row["state"] == "FAILED" for row in status["replicas"])

        rows = cluster.wait(failed, 60.0)["replicas"]
        reason = next(row["reason"] for row in rows if row["replica"] == f"{MODEL}-1")
        assert f"rank 1: local device 1: process {rank.pid} is stopped" in reason
        replaced(cluster, f"{MODEL}-1", 240.0)
        assert not Path(f"/proc/{rank.pid}").exists(), "a frozen rank is ended with its replica"
