"""An edge process in front of a scripted router, asked by the official openai client.

One edge serves the whole file; each test scripts the router for itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from megatoken.access.table import Program, callers_of_route
from megatoken.v1.tokens_pb2 import FINISH_REASON_ERROR, FINISH_REASON_LENGTH, Detail, Finish, Logprobs
from tests.support.fake_router import END, FakeRouter
from tests.support.processes import Processes, Started

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.vllm]
pytest.importorskip("vllm", reason="vLLM is not installed")

PARIS = [504, 3575, 282, 4649, 314, 7042, 30]  # "The capital of France is Paris."
EOS = 2
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Stage:
    """The edge, its router, and a client."""

    router: FakeRouter
    edge: Started
    client: openai.AsyncOpenAI

    @property
    def url(self) -> str:
        return f"http://{self.edge.address}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.edge.ready['metrics_address']}"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared() -> AsyncIterator[Stage]:
    config = {
        "edge": "edge-test",
        "metrics_port": 0,
        "models": [
            {"name": "smol", "source": "builtin:smollm2-135m-instruct", "served_names": ["alias"], "dtype": "bfloat16",
             "tool_parser": "hermes"},
            {"name": "tiny", "source": "builtin:tiny-llama", "max_model_len": 64, "loras": ["pirate"]},
        ],
        "limits": {"connect_timeout_s": 1.0, "drain_s": 1.0},
    }  # fmt: skip
    async with FakeRouter(lambda _: [END]) as router:
        with Processes() as processes:
            edge = await asyncio.to_thread(
                processes.start, "router.edge", {**config, "router": router.address}, timeout_s=120
            )
            async with openai.AsyncOpenAI(
                base_url=f"http://{edge.address}/v1", api_key="none", max_retries=0, timeout=30
            ) as client:
                yield Stage(router, edge, client)
            await asyncio.to_thread(processes.stop)


@pytest.fixture
def stage(shared: Stage) -> Stage:
    shared.router.script = lambda _: [*PARIS, EOS, END]
    shared.router.requests.clear()
    shared.router.cancelled.clear()
    shared.router.gate.set()
    return shared


async def post(stage: Stage, path: str, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(stage.url + path, json=body)


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Waits for what another process is about to do."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.01)


async def test_a_chat_answers(stage: Stage) -> None:
    answer = await stage.client.chat.completions.create(model="smol", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(PARIS) + 1
    (request,) = stage.router.requests
    assert request.model == "smol"
    assert len(request.prompt) == answer.usage.prompt_tokens
    assert request.sampling.temperature == 0
    assert request.request_id == answer.id


async def test_a_chat_streams(stage: Stage) -> None:
    stream = await stage.client.chat.completions.create(
        model="alias", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The capital of France is Paris."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(PARIS) + 1
    assert stage.router.requests[0].model == "smol"  # the router's name, whatever alias was asked for


async def test_a_streams_usage_says_what_was_cached(stage: Stage) -> None:
    stage.router.script = lambda _: [Detail(cached_tokens=5), *PARIS, END]
    for kind in ("chat", "completions"):
        options: Any = {"model": "smol", "stream": True, "stream_options": {"include_usage": True}}
        if kind == "chat":
            stream = await stage.client.chat.completions.create(messages=QUESTION, **options)
        else:
            stream = await stage.client.completions.create(prompt="Hello there", **options)
        usage = [chunk async for chunk in stream][-1].usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 5
        assert stage.router.requests[-1].tell_cached_tokens


async def test_the_first_token_does_not_wait_for_the_second(stage: Stage) -> None:
    stage.router.gate.clear()
    stage.router.script = lambda _: [*PARIS, END]
    stream = await asyncio.wait_for(
        asyncio.gather(
            stage.client.chat.completions.create(model="smol", messages=QUESTION, stream=True), open_gate_once(stage)
        ),
        20,
    )
    async for chunk in stream[0]:
        if chunk.choices[0].delta.content:
            break
    assert not stage.router.gate.is_set()
    stage.router.gate.set()


async def open_gate_once(stage: Stage) -> None:
    """Lets exactly one step of the one request pass."""
    await until(lambda: stage.router.requests)
    stage.router.gate.set()
    await asyncio.sleep(0)
    stage.router.gate.clear()


async def test_a_stop_string_ends_the_stream_and_cancels_at_the_router(stage: Stage) -> None:
    stage.router.script = lambda _: [*PARIS] * 50
    answer = await stage.client.chat.completions.create(model="smol", messages=QUESTION, stop=[" of"])
    assert answer.choices[0].message.content == "The capital"
    assert answer.choices[0].finish_reason == "stop"
    await until(lambda: stage.router.cancelled)


async def test_a_client_that_leaves_cancels_at_the_router(stage: Stage) -> None:
    stage.router.script = lambda _: [504] * 5000
    stage.router.step_s = 0.005
    try:
        stream = await stage.client.chat.completions.create(model="smol", messages=QUESTION, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await until(lambda: stage.router.cancelled)
    finally:
        stage.router.step_s = 0.0


async def test_choices_are_requests_of_their_own(stage: Stage) -> None:
    answer = await stage.client.chat.completions.create(model="smol", messages=QUESTION, n=3, seed=7)
    assert [choice.message.content for choice in answer.choices] == ["The capital of France is Paris."] * 3
    assert sorted(request.sampling.seed for request in stage.router.requests) == [7, 8, 9]


async def test_completions_with_logprobs(stage: Stage) -> None:
    def detail(token: int, other: int, logprob: float) -> Detail:
        part = Logprobs(width=2, token=[token, other], logprob=[logprob, -9.0], rank=[1])
        return Detail(logprobs=part)

    stage.router.script = lambda _: [
        *(detail(token, 11, -0.25) for token in PARIS), Finish(reason=FINISH_REASON_LENGTH, cached_tokens=1)
    ]  # fmt: skip
    answer = await stage.client.completions.create(model="smol", prompt="Hello there", max_tokens=7, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.25] * len(PARIS)
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "length"
    assert stage.router.requests[0].sampling.logprobs == 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


async def test_prompt_logprobs(stage: Stage) -> None:
    prompt = Logprobs(width=1, token=[5, 6], logprob=[-1.0, -2.0], rank=[3, 4])
    stage.router.script = lambda _: [Detail(prompt_logprobs=prompt), 504, END]
    response = await post(stage, "/v1/completions", model="smol", prompt=[4, 5, 6], max_tokens=1, prompt_logprobs=0)
    found = response.json()["choices"][0]["prompt_logprobs"]
    assert [None if entry is None else {k: v["logprob"] for k, v in entry.items()} for entry in found] == [
        None,
        {"5": -1.0},
        {"6": -2.0},
    ]


async def test_structured_outputs_reach_the_router(stage: Stage) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    await stage.client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    sent = stage.router.requests[0].sampling.structured_outputs
    assert json.loads(sent.json_schema) == schema


async def test_tools(stage: Stage) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    tokens = (await post(stage, "/tokenize", model="smol", prompt=text, add_special_tokens=False)).json()["tokens"]
    stage.router.script = lambda _: [*tokens, EOS, END]
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    answer = await stage.client.chat.completions.create(
        model="smol", messages=QUESTION, tools=[tool], tool_choice="auto"
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls is not None
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}


async def test_an_adapter_goes_by_its_name(stage: Stage) -> None:
    response = await post(stage, "/v1/completions", model="pirate", prompt="Hi", max_tokens=4)
    assert response.json()["model"] == "pirate"
    (request,) = stage.router.requests
    assert (request.model, request.lora) == ("tiny", "pirate")


async def test_the_trace_context_goes_on(stage: Stage) -> None:
    context = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with httpx.AsyncClient(timeout=30) as client:
        url = stage.url + "/v1/completions"
        body = {"model": "smol", "prompt": "Hi", "max_tokens": 4}
        await client.post(url, json=body, headers={"traceparent": context, "x-request-id": "mine"})
    assert stage.router.requests[0].traceparent == context
    assert stage.router.requests[0].request_id == "cmpl-mine-0"


async def test_tokenize_and_back(stage: Stage) -> None:
    tokens = (await post(stage, "/tokenize", model="tiny", prompt="Hello", add_special_tokens=False)).json()["tokens"]
    assert (await post(stage, "/detokenize", model="tiny", tokens=tokens)).json()["prompt"] == "Hello"


async def test_every_route_of_vllms_app_is_for_clients_or_closed(stage: Stage) -> None:
    closed = {"/load", "/version", "/metrics", "/kv_event_sources", "/v1/systemone", "/scale_elastic_ep"}
    closed |= {"/is_scaling_elastic_ep"}
    async with httpx.AsyncClient() as client:
        paths = (await client.get(stage.url + "/openapi.json")).json()["paths"]
        for path in paths:  # a new version of vLLM that has more is to be looked at
            named = callers_of_route(Program.EDGE, path.replace("{response_id}", "resp_1"))
            assert bool(named) is (path not in closed), path
        for path in closed:
            assert (await client.get(stage.url + path)).status_code == 404
            assert (await client.post(stage.url + path)).status_code == 404


async def test_models_health_metrics(stage: Stage) -> None:
    listed = await stage.client.models.list()
    assert [model.id for model in listed.data] == ["smol", "alias", "tiny", "pirate"]
    assert (await stage.client.models.retrieve("tiny")).id == "tiny"
    async with httpx.AsyncClient() as client:
        assert (await client.get(stage.url + "/health")).status_code == 200
        for path in ("/metrics", "/version"):
            assert (await client.get(stage.url + path)).status_code == 404
        assert set((await client.get(stage.metrics_url + "/version")).json()) == {"version"}
        async with asyncio.timeout(5):  # the connection's state is told once a second
            text = ""
            while "megatoken_edge_router_connected 1.0" not in text:
                text = (await client.get(stage.metrics_url + "/metrics")).text
                await asyncio.sleep(0.1)
    assert "http_requests_total" in text


BAD = [
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"max_tokens": 100_000}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "word " * 20_000}, 400, "8192"),
    ({"prompt": [1, 99_999_999]}, 400, "99999999"),
    ({"prompt": [1, -3]}, 400, "-3"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"model": "nobody"}, 404, "nobody"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("wrong", "status", "named"), BAD)
async def test_bad_input(stage: Stage, wrong: dict[str, Any], status: int, named: str, stream: bool) -> None:
    response = await post(stage, "/v1/completions", **{"model": "smol", "prompt": "Hi", "stream": stream, **wrong})
    assert response.status_code == status, response.text
    assert named in response.json()["error"]["message"]
    assert stage.router.requests == []


FAILURES = [
    (3, 400, "prompt: 9 tokens"),
    (5, 404, "no such model"),
    (8, 429, "full"),
    (14, 503, "gone"),
    (4, 504, "late"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status", "message"), FAILURES)
async def test_the_routers_errors(stage: Stage, code: int, status: int, message: str, stream: bool) -> None:
    stage.router.script = lambda _: [
        Finish(reason=FINISH_REASON_ERROR, code=code, message=message, retry_after_ms=1500)
    ]
    response = await post(stage, "/v1/chat/completions", model="smol", messages=QUESTION, stream=stream)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"].startswith(message)
    if status == 429:
        assert response.headers["retry-after"] == "2"
        assert response.headers["retry-after-ms"] == "1500"


async def test_an_error_in_mid_stream_is_a_chunk(stage: Stage) -> None:
    failed = Finish(reason=FINISH_REASON_ERROR, code=14, message="the replica is gone")
    stage.router.step_s = 0.05
    stage.router.script = lambda _: [*PARIS[:2], failed]
    try:
        response = await post(stage, "/v1/chat/completions", model="smol", messages=QUESTION, stream=True)
    finally:
        stage.router.step_s = 0.0
    assert response.status_code == 200
    assert '"content":"The"' in response.text
    assert "the replica is gone" in response.text
    assert response.text.rstrip().endswith("data: [DONE]")


async def test_one_failing_choice_ends_the_others(stage: Stage) -> None:
    failed = Finish(reason=FINISH_REASON_ERROR, code=8, message="full", retry_after_ms=100)
    stage.router.step_s = 0.01
    stage.router.script = lambda request: [failed] if request.sampling.seed == 1 else [504] * 5000
    try:
        response = await post(stage, "/v1/chat/completions", model="smol", messages=QUESTION, n=2, seed=1)
        assert response.status_code == 429
        await until(lambda: stage.router.cancelled)
    finally:
        stage.router.step_s = 0.0


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_lost_router_costs_no_request_a_token(stage: Stage, streamed: bool) -> None:
    stage.router.script = lambda request: [*PARIS, EOS, END][request.resumed_tokens :]
    stage.router.step_s = 0.05
    before = len(stage.router.requests)

    async def ask() -> str:
        if not streamed:
            answer = await stage.client.chat.completions.create(model="smol", messages=QUESTION)
            return answer.choices[0].message.content or ""
        chunks = await stage.client.chat.completions.create(model="smol", messages=QUESTION, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    try:
        running = asyncio.create_task(ask())
        for times in (1, 2):
            await until(lambda times=times: len(stage.router.requests) == before + times)  # type: ignore[misc]
            await asyncio.sleep(0.12)
            await stage.router.break_sessions()
        assert await asyncio.wait_for(running, 20) == "The capital of France is Paris."
    finally:
        stage.router.step_s = 0.0
    resumed = [request.resumed_tokens for request in stage.router.requests[before:]]
    assert resumed[0] == 0 < resumed[1] < resumed[2]


async def until_connected(stage: Stage) -> None:
    async with asyncio.timeout(10), httpx.AsyncClient() as client:
        while (await client.get(stage.url + "/health")).status_code != 200:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)


async def test_nothing_is_left_running_after_all_that(stage: Stage) -> None:
    async with httpx.AsyncClient() as client:
        text = (await client.get(stage.metrics_url + "/metrics")).text
    assert 'megatoken_edge_requests_running{model="smol"} 0.0' in text
