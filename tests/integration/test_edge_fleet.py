"""An edge in front of a real router: a real vLLM replica, and a simulated one for many streams at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.support.collector import Collector
from tests.support.processes import Processes, Started

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.vllm]
pytest.importorskip("vllm", reason="vLLM is not installed")

REAL, SIMULATED = "smollm2", "simulated"
SOURCE = "builtin:smollm2-135m-instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
ANSWER = "The capital of Japan is Tokyo."


def member(worker: Started, model: str) -> dict[str, Any]:
    """A worker as a membership snapshot has it."""
    ready = worker.ready
    return {
        "replica": ready["replica"],
        "model": model,
        "address": ready["address"],
        "incarnation": str(ready["incarnation"]),
        "phase": "REPLICA_PHASE_READY",
        "maxModelLen": ready["max_model_len"],
        "vocabSize": ready["vocab_size"],
        "maxRunning": ready["max_running"],
        "engine": ready["engine"],
    }


def start_fleet(processes: Processes, collector: Collector) -> Started:
    """Two workers, a router, and the edge that is returned. Of themselves they trace nothing."""
    counters = str(processes.directory / "counters")
    tracing = {"endpoint": collector.endpoint, "sample": 0}
    simulated = processes.start(
        "worker",
        {"replica": "simulated-0", "model": SIMULATED, "engine": "simulated", "counters_dir": counters,
         "simulated": {"step_s": 0.005, "max_running": 64, "max_model_len": 8192}},
    )  # fmt: skip
    real = processes.start(
        "worker",
        {"replica": "real-0", "model": REAL, "source": SOURCE, "dtype": "bfloat16", "counters_dir": counters,
         "max_model_len": 2048, "max_running": 8, "log_level": "warning", "tracing": tracing},
        timeout_s=300,
    )  # fmt: skip
    replicas = [member(simulated, SIMULATED), member(real, REAL)]
    models = [{"model": SIMULATED}, {"model": REAL}]
    snapshot = {"epoch": "1", "version": "1", "replicas": replicas, "models": models}
    router = processes.start("router", {"router": "router-test", "static_snapshot": snapshot, "tracing": tracing})
    served = [
        {"name": REAL, "source": SOURCE, "dtype": "bfloat16", "max_model_len": 2048},
        {"name": SIMULATED, "source": SOURCE, "max_model_len": 8192},
    ]
    return processes.start(
        "router.edge",
        {"edge": "edge-test", "router": router.address, "models": served, "tracing": tracing},
        timeout_s=240,
    )


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(collector: Collector) -> AsyncIterator[openai.AsyncOpenAI]:
    with Processes() as processes:
        edge = await asyncio.to_thread(start_fleet, processes, collector)
        url = f"http://{edge.address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as made:
            yield made
        await asyncio.to_thread(processes.stop)


async def test_the_capital_of_japan(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=REAL, messages=QUESTION, temperature=0, max_tokens=32)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"


async def test_the_capital_of_japan_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=REAL, messages=QUESTION, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


async def test_a_request_that_its_client_traces_is_traced_to_the_engine_and_no_other(
    client: openai.AsyncOpenAI, collector: Collector
) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    stream = await client.chat.completions.create(
        model=REAL, messages=QUESTION, temperature=0, max_tokens=32, stream=True,
        extra_headers={"traceparent": f"00-{trace}-{span}-01"},
    )  # fmt: skip
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]) == ANSWER
    at_edge, at_router, at_worker = await asyncio.to_thread(collector.wait, 3, trace)
    assert (at_edge.service, at_edge.name) == ("megatoken-edge", "edge /v1/chat/completions")
    assert (at_edge.parent, at_router.parent, at_worker.parent) == (span, at_edge.span, at_router.span)
    assert at_edge.attributes["http.response.status_code"] == 200
    assert len({one.attributes["megatoken.request_id"] for one in (at_edge, at_router, at_worker)}) == 1
    assert at_worker.attributes["gen_ai.usage.output_tokens"] == 8
    assert {one.trace for one in collector.spans()} == {trace}


async def test_a_schema_is_kept(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model=REAL,
        messages=QUESTION,
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert list(json.loads(answer.choices[0].message.content or "")) == ["city"]


async def test_choices_of_a_list(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=REAL, messages=QUESTION, temperature=0, extra_body={"structured_outputs": {"choice": ["Rome", "Tokyo"]}}
    )
    assert answer.choices[0].message.content in ("Rome", "Tokyo")


async def test_words_that_are_not_wanted(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=REAL, messages=QUESTION, temperature=0, max_tokens=16, extra_body={"bad_words": ["Japan", "the capital"]}
    )
    assert "Japan" not in (answer.choices[0].message.content or "")


async def test_logprobs_are_those_of_the_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=REAL, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest


async def test_a_stop_string(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=REAL, messages=QUESTION, temperature=0, stop=[" of Japan"])
    assert answer.choices[0].message.content == "The capital"


@pytest.mark.parametrize("stream", [False, True])
async def test_many_at_once(client: openai.AsyncOpenAI, stream: bool) -> None:
    async def one(number: int) -> int:
        if not stream:
            answer = await client.completions.create(
                model=SIMULATED, prompt=f"Number {number}", max_tokens=40, extra_body={"ignore_eos": True}
            )
            return answer.usage.completion_tokens if answer.usage else 0
        usage = 0
        async for chunk in await client.completions.create(
            model=SIMULATED,
            prompt=f"Number {number}",
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            usage = chunk.usage.completion_tokens if chunk.usage else usage
        return usage

    assert await asyncio.gather(*(one(number) for number in range(96))) == [40] * 96


async def test_a_prompt_longer_than_the_replica_takes_is_refused_once(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="2048"):
        await client.completions.create(model=REAL, prompt="word " * 4000, max_tokens=4)
