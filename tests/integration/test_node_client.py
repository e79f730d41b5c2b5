"""A client in another language, written from the .proto comments alone, speaks Generate and Session to a router."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Processes

HERE = Path(__file__).parent / "node_client"
PROTO = Path(__file__).parents[2] / "proto"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with its packages installed, outside the checkout."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node_client")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install @grpc/grpc-js here: {installed.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(scope="module")
def router_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router over one worker with the simulated engine."""
    with Processes() as processes:
        counters = str(tmp_path_factory.mktemp("counters"))
        worker = processes.start(
            "worker",
            {"replica": "r1", "model": "m", "engine": "simulated", "simulated": {}, "counters_dir": counters},
        )
        member = {
            "replica": "r1",
            "model": "m",
            "address": worker.address,
            "incarnation": str(worker.ready["incarnation"]),
            "phase": "REPLICA_PHASE_READY",
            "maxModelLen": worker.ready["max_model_len"],
            "vocabSize": worker.ready["vocab_size"],
            "maxRunning": worker.ready["max_running"],
        }
        snapshot = {"epoch": "1", "version": "1", "replicas": [member], "models": [{"model": "m", "replicasReady": 1}]}
        router = processes.start("router", {"router": "router-1", "static_snapshot": snapshot})
        yield router.address


@pytest.fixture(scope="module")
def answer(node_client: Path, router_address: str) -> dict[str, Any]:
    done = subprocess.run(
        ["node", "client.mjs", router_address, "m", str(PROTO)],
        cwd=node_client,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(done.stderr)
    return json.loads(done.stdout)


def test_generate_streams_every_token(answer: dict[str, Any]) -> None:
    assert len(answer["single"]["tokens"]) == 16
    assert answer["single"]["finish"]["reason"] == "FINISH_REASON_LENGTH"
    assert answer["single"]["finish"]["generatedTokens"] == 16


def test_session_carries_several_requests(answer: dict[str, Any]) -> None:
    streams = answer["many"]
    assert [len(stream["tokens"]) for stream in streams] == [16, 16, 16]
    assert streams[0]["tokens"] == answer["single"]["tokens"]  # the same greedy request either way
    assert streams[1]["tokens"] != streams[0]["tokens"]


def test_a_wrong_request_is_told_what_is_allowed(answer: dict[str, Any]) -> None:
    assert answer["negative"]["code"] == 3
    assert "temperature" in answer["negative"]["details"]
    assert "-1" in answer["negative"]["details"]
