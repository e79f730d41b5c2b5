"""Replicas that Ray calls alive and that do not live: found by the controller, named, replaced. Simulated engines."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

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
