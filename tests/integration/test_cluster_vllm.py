"""The main job with a real engine: a cluster of vLLM on CPU answers through the router and the edge."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.clusters import RunningCluster, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of Japan?"
ANSWER = "The capital of Japan is Tokyo."
SPEC: dict[str, Any] = {
    "cluster": "real",
    "ray": {"cpu_devices": 1},
    "control": {"port": 0},
    "routers": {"port": 0},
    "edge": {"port": 0},
    "models": [
        {
            "name": MODEL,
            "source": f"builtin:{MODEL}",
            "dtype": "bfloat16",
            "max_model_len": 512,
            "kv_cache_gib": 0.25,
            "engine_args": {"enforce_eager": True},
        }
    ],
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running(tmp_path_factory.mktemp("real"), SPEC) as started:
        yield started


def chat(edge: str, question: str) -> str:
    connection = http.client.HTTPConnection(edge, timeout=120)
    try:
        body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        return str(json.loads(response.read())["choices"][0]["message"]["content"])
    finally:
        connection.close()


def test_it_answers_through_the_router_and_through_the_edge(cluster: RunningCluster) -> None:
    assert cluster.run("generate", QUESTION).strip() == ANSWER
    assert chat(cluster.address("edge"), QUESTION).strip() == ANSWER
    status = cluster.status()
    assert [row["engine"] for row in status["replicas"]] == ["vllm"]
    phases = {entry["phase"]: entry["seconds"] for entry in status["replicas"][0]["start_phases"]}
    assert list(phases) == ["place", "start", "import", "verify", "engine", "weights", "compile", "warm up"]
    assert sum(phases.values()) <= status["replicas"][0]["age_s"]
    assert "import" in cluster.run("events")
    too_long = cluster.run("generate", "--max-tokens", "5000", QUESTION, status=2)
    assert "max_tokens: 5000 is not allowed" in too_long
