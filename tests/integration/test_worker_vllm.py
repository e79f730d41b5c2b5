"""A worker on real vLLM: what only the real engine can show. One engine serves the whole module."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from megatoken.counters import INDEX, read_counters
from megatoken.process.tree import descendants
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1 import worker_pb2, worker_pb2_grpc
from megatoken.worker.models import resolve_source
from tests.support.processes import Processes, Started
from tests.support.worker_client import TestSession, generate, request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SOURCE = "builtin:smollm2-135m-instruct"
START_S = 300.0
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]


def config(directory: Path, **fields: Any) -> dict[str, Any]:
    return {
        "replica": "v0",
        "model": "smollm2",
        "source": SOURCE,
        "dtype": "float32",
        "max_model_len": 512,
        "max_running": 16,
        "kv_cache_gib": 0.5,
        "counters_dir": str(directory),
        **fields,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def worker(directory: Path) -> Iterator[Started]:
    with Processes() as processes:
        yield processes.start("worker", config(directory), timeout_s=START_S)


@pytest.fixture
async def channel(worker: Started) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(worker.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_source(SOURCE))


@pytest.fixture(scope="module")
def question(tokenizer: Any) -> list[int]:
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


@pytest.fixture(scope="module")
def story(tokenizer: Any) -> list[int]:
    messages = [{"role": "user", "content": "Tell a long story about a lighthouse."}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


async def test_it_answers(channel: grpc.aio.Channel, tokenizer: Any, question: list[int]) -> None:
    tokens, finish = await generate(channel, question, temperature=0.0, max_tokens=30)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of Japan is Tokyo."
    assert finish.reason == pb.FINISH_REASON_STOP
    assert not finish.HasField("stop_token")
    assert (finish.prompt_tokens, finish.generated_tokens) == (len(question), len(tokens))


async def test_it_names_itself(worker: Started, channel: grpc.aio.Channel) -> None:
    described = await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=10)
    assert (described.engine, described.max_model_len, described.max_running) == ("vllm", 512, 16)
    assert described.kv_cache_tokens > 512
    assert worker.ready["vocab_size"] == described.vocab_size == 49152
    assert (await worker_pb2_grpc.WorkerStub(channel).Probe(worker_pb2.ProbeRequest(), timeout=30)).seconds > 0


def busy_threads(pid: int) -> dict[str, int]:
    """Ticks that each thread of a process and of those below it has used."""
    used = {}
    for one in (pid, *descendants(pid)):
        for stat in Path(f"/proc/{one}/task").glob("*/stat"):
            fields = stat.read_text().rpartition(")")[2].split()
            used[stat.parent.name] = int(fields[11]) + int(fields[12])
    return used


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: a rank has one thread anyway")
async def test_a_rank_computes_with_fewer_threads_once_others_share_its_cores(
    worker: Started, channel: grpc.aio.Channel
) -> None:
    cores = len(os.sched_getaffinity(0))
    described = await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=10)
    busy, answers = [], []
    for ranks in (1, cores, 1):
        renewal = worker_pb2.RenewRequest(
            lease_s=600, replica=described.replica, incarnation=described.incarnation, cpu_ranks=ranks
        )
        await worker_pb2_grpc.WorkerStub(channel).Renew(renewal, timeout=10)
        before = busy_threads(worker.pid)
        tokens, _ = await generate(channel, [1, 2, 3], max_tokens=24, temperature=0.0, ignore_eos=True)
        used = [ticks - before.get(thread, 0) for thread, ticks in busy_threads(worker.pid).items()]
        busy.append(sum(ticks > max(used) / 3 for ticks in used))
        answers.append(tokens)
    assert busy[1] == 1
    assert min(busy[0], busy[2]) >= 2
    assert answers[0] == answers[1] == answers[2]


async def test_many_streams_share_frames(channel: grpc.aio.Channel, story: list[int]) -> None:
    async with TestSession(channel) as session:
        requests = {
            number: request([number + 5, *story], temperature=0.0, max_tokens=24, ignore_eos=True)
            for number in range(16)
        }
        await session.start(requests)
        await session.until(*requests)
    assert all(len(session.tokens[number]) == 24 for number in requests)
    assert session.widest > 4  # a step's tokens come in one frame
    assert max(load.running for load in session.loads) > 4


async def test_stop_tokens_and_length(channel: grpc.aio.Channel, story: list[int]) -> None:
    whole, finish = await generate(channel, story, temperature=0.0, max_tokens=12, ignore_eos=True)
    assert finish.reason == pb.FINISH_REASON_LENGTH
    stop = whole[5]
    first = whole.index(stop)
    tokens, finish = await generate(channel, story, temperature=0.0, max_tokens=12, stop_token_ids=[stop])
    assert tokens == whole[: first + 1]
    assert (finish.reason, finish.stop_token) == (pb.FINISH_REASON_STOP, stop)


async def test_the_prefix_cache_is_told(channel: grpc.aio.Channel, worker: Started) -> None:
    prompt = list(range(1000, 1000 + 3 * worker.ready["block_size"]))
    await generate(channel, prompt, temperature=0.0, max_tokens=1)
    _, finish = await generate(channel, prompt, temperature=0.0, max_tokens=1)
    assert finish.cached_tokens >= 2 * worker.ready["block_size"]


async def test_n_choices_are_consecutive_streams(channel: grpc.aio.Channel, story: list[int]) -> None:
    async def choices(seed: int) -> dict[int, list[int]]:
        async with TestSession(channel) as session:
            await session.start({10: request(story, temperature=1.0, seed=seed, n=3, max_tokens=8)})
            await session.until(10, 11, 12)
        return session.tokens

    first = await choices(7)
    assert sorted(first) == [10, 11, 12]
    assert len({tuple(tokens) for tokens in first.values()}) == 3
    assert first == await choices(7)


async def test_logprobs_come_with_their_tokens(channel: grpc.aio.Channel, question: list[int]) -> None:
    async with TestSession(channel) as session:
        await session.start({3: request(question, temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=1)})
        await session.until(3)
    rows = [detail.logprobs for detail in session.details[3] if detail.HasField("logprobs")]
    assert [row.token[0] for row in rows] == session.tokens[3]
    assert all(row.width == 3 and len(row.logprob) == 3 and row.rank[0] == 1 for row in rows)
    prompt = [detail.prompt_logprobs for detail in session.details[3] if detail.HasField("prompt_logprobs")]
    assert len(prompt) == 1
    assert list(prompt[0].token[:: prompt[0].width]) == question[1:]


async def test_structured_outputs(channel: grpc.aio.Channel, tokenizer: Any, question: list[int]) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    for constraint, fits in (
        (pb.StructuredOutputs(choice=pb.StringList(values=["Rome", "Oslo"])), lambda text: text in ("Rome", "Oslo")),
        (pb.StructuredOutputs(regex="[0-9]{3}"), lambda text: len(text) == 3 and text.isdigit()),
        (
            pb.StructuredOutputs(json_schema=json.dumps(schema)),
            lambda text: json.loads(text)["city"] in ("Paris", "Rome"),
        ),
    ):
        tokens, finish = await generate(
            channel, question, temperature=0.0, max_tokens=40, structured_outputs=constraint
        )
        assert finish.reason == pb.FINISH_REASON_STOP
        assert fits(tokenizer.decode(tokens, skip_special_tokens=True))


async def test_sampling_fields_reach_the_engine(channel: grpc.aio.Channel, story: list[int]) -> None:
    greedy, _ = await generate(channel, story, temperature=0.0, max_tokens=6)
    one, _ = await generate(channel, story, temperature=0.0, max_tokens=1, logit_bias={4321: 100.0})
    assert one == [4321]
    only, _ = await generate(channel, story, temperature=1.0, max_tokens=5, allowed_token_ids=[700], ignore_eos=True)
    assert set(only) == {700}
    other, _ = await generate(channel, story, temperature=0.0, max_tokens=6, bad_words_token_ids=[greedy[0]])
    assert greedy[0] not in other
    extra, _ = await generate(channel, story, temperature=0.0, max_tokens=6, extra_json='{"logit_bias": {"4321": 100}}')
    assert extra[0] == 4321
    long, finish = await generate(channel, story, temperature=0.0, max_tokens=3, min_tokens=3, logit_bias={2: 100.0})
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert 2 not in long[:2]


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": 3.0}, "sampling.temperature"),
        ({"logprobs": 100}, "sampling.logprobs"),
        ({"max_tokens": 512}, "sampling.max_tokens"),
        ({"extra_json": '{"colour": 1}'}, "sampling.extra_json"),
        ({"extra_json": '{"stop": ["x"]}'}, "sampling.extra_json.stop"),
        ({"extra_json": '{"logit_bias": "x"}'}, "sampling.extra_json"),
        (
            {"extra_json": '{"extra_args": {"megatoken_penalties": ["a", "b", "c"], "megatoken_resumed_tokens": 1}}'},
            "sampling.extra_json.extra_args.megatoken_penalties",
        ),
        ({"extra_json": '{"extra_args": {"kv_transfer_params": {}}}'}, "sampling.extra_json.extra_args.kv_transfer"),
        ({"extra_json": '{"seed": 18446744073709551616}'}, "sampling.extra_json"),
        ({"structured_outputs": pb.StructuredOutputs(regex="(")}, "sampling"),
        ({"structured_outputs": pb.StructuredOutputs(grammar="nonsense <-")}, "sampling"),
    ],
)
async def test_the_engines_refusals_name_the_field(
    channel: grpc.aio.Channel, question: list[int], sampling: dict[str, Any], field: str
) -> None:
    async with TestSession(channel) as session:
        await session.start({1: request(question, **sampling), 2: request(question, temperature=0.0, max_tokens=3)})
        await session.until(1, 2)
    assert session.finishes[1].code == INVALID, session.finishes[1].message
    assert session.finishes[1].message.startswith(field)
    assert session.finishes[2].reason == pb.FINISH_REASON_LENGTH


async def resumed(
    channel: grpc.aio.Channel, prompt: list[int], at: int, length: int, **sampling: Any
) -> tuple[list[int], list[int], pb.Finish]:
    """The whole undisturbed run, the resumed run put together, and the resumed run's finish."""
    whole, _ = await generate(channel, prompt, max_tokens=length, **sampling)
    async with TestSession(channel) as session:
        rest = request([*prompt, *whole[:at]], resumed_tokens=at, max_tokens=length - at, **sampling)
        await session.start({1: rest})
        await session.until(1)
    return whole, whole[:at] + session.tokens.get(1, []), session.finishes[1]


async def test_a_greedy_request_resumes_exactly(channel: grpc.aio.Channel, story: list[int]) -> None:
    whole, joined, finish = await resumed(channel, story, 9, 32, temperature=0.0)
    assert joined == whole
    assert (finish.prompt_tokens, finish.generated_tokens, finish.resume_note) == (len(story), len(whole), "")


async def test_penalties_resume_exactly(channel: grpc.aio.Channel, story: list[int]) -> None:
    penalties = {"presence_penalty": 0.9, "frequency_penalty": 0.7, "repetition_penalty": 1.1}
    whole, joined, finish = await resumed(channel, story, 16, 40, temperature=0.0, **penalties)
    plain, _ = await generate(channel, story, temperature=0.0, max_tokens=40)
    assert whole != plain
    assert joined == whole
    assert finish.resume_note == ""


async def test_structured_outputs_resume_inside_their_grammar(
    channel: grpc.aio.Channel, tokenizer: Any, question: list[int]
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
    }
    constraint = pb.StructuredOutputs(json_schema=json.dumps({**schema, "additionalProperties": False}))
    whole, joined, finish = await resumed(channel, question, 4, 60, temperature=0.0, structured_outputs=constraint)
    assert joined == whole
    assert finish.resume_note == ""
    assert set(json.loads(tokenizer.decode(joined, skip_special_tokens=True))) == {"a", "b"}


async def test_a_seeded_request_says_that_its_random_numbers_restarted(
    channel: grpc.aio.Channel, story: list[int]
) -> None:
    _, _, finish = await resumed(channel, story, 4, 8, temperature=1.0, seed=3)
    assert "seed" in finish.resume_note


async def until_idle(channel: grpc.aio.Channel, timeout_s: float) -> float:
    """Seconds until the engine has nothing left."""
    stub = worker_pb2_grpc.WorkerStub(channel)
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while True:
            load = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
            if load.running + load.waiting == 0:
                return time.monotonic() - began
            await asyncio.sleep(0.02)


async def test_cancel_and_deadline_free_the_engine(channel: grpc.aio.Channel, story: list[int]) -> None:
    async with TestSession(channel) as session:
        await session.start(
            {
                1: request(story, temperature=0.0, max_tokens=400, ignore_eos=True),
                2: request(story, timeout_ms=300, temperature=0.0, max_tokens=400, ignore_eos=True),
                3: request(story, temperature=0.0, max_tokens=30, ignore_eos=True),
            }
        )
        await session.until_tokens(1, 3)
        await session.cancel(1)
        await session.until(1, 2, 3)
        assert session.finishes[1].reason == pb.FINISH_REASON_CANCELLED
        assert session.finishes[2].code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert len(session.tokens[3]) == 30
        await until_idle(channel, 20)


async def test_the_accounts_agree(worker: Started, channel: grpc.aio.Channel, directory: Path) -> None:
    import urllib.request

    load = await worker_pb2_grpc.WorkerStub(channel).GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
    _, totals = read_counters(directory / f"v0.{worker.ready['incarnation']}.counters")
    assert totals[INDEX["generated_tokens"]] == load.generated_tokens > 0
    address = f"http://{worker.ready['metrics_address']}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=10).read().decode())
    shown = [line for line in text.splitlines() if line.startswith("megatoken_worker_generated_tokens_total{")]
    assert float(shown[0].rpartition(" ")[2]) == load.generated_tokens
    assert 'engine="vllm"' in shown[0]
    passed_on = [line for line in text.splitlines() if line.startswith("vllm:kv_cache_usage_perc{")]
    assert 'replica="v0"' in passed_on[0]
    assert 'model="smollm2"' in passed_on[0]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_dead_engine_core_ends_streams_then_the_worker(tmp_path: Path, story: list[int]) -> None:
    with Processes() as processes:
        worker = processes.start("worker", config(tmp_path, source="builtin:tiny-llama"), timeout_s=START_S)
        [engine_core] = children(worker.pid)
        async with grpc.aio.insecure_channel(worker.address) as channel, TestSession(channel) as session:
            await session.start({1: request(story, max_tokens=400, ignore_eos=True)})
            await session.until_tokens(1, 2)
            os.kill(engine_core, signal.SIGKILL)
            await session.until(1, timeout_s=20)
        assert session.finishes[1].code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert await asyncio.to_thread(worker.process.wait, 20) == 1
        assert "engine core ended" in worker.output()
        worker.check_nothing_left()


def test_a_model_that_cannot_work_is_told_in_one_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "worker.json"
    path.write_text(json.dumps(config(tmp_path, max_model_len=1_000_000)))
    command = [sys.executable, "-m", "megatoken.worker", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2
    assert "max_model_len" in done.stderr.splitlines()[-1]


def test_other_weights_than_a_replica_serves_elsewhere_are_not_served(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "worker.json"
    expected = {"weights": {"model.safetensors": "ab" * 32}, "weights_of": "chat-1 on alpha"}
    path.write_text(json.dumps(config(tmp_path, **expected)))
    command = [sys.executable, "-m", "megatoken.worker", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2
    assert "is not allowed; chat-1 on alpha has no such file, here it is SHA-256" in done.stderr.splitlines()[-1]


def test_a_killed_worker_takes_its_engine_core_along(worker: Started) -> None:
    # Last in the module: it ends the engine that the tests above share.
    assert len(worker.left()) >= 2
    worker.kill()
    worker.check_nothing_left()
