"""`make demo`: the main job on one machine, from nothing to nothing, in front of the reader's eyes.

    python -m megatoken.cluster.demo

Starts a local cluster of two replicas of the built-in model on vLLM's CPU build, streams chat answers through the
OpenAI-compatible edge and token requests through the router over gRPC, prints tokens/s for each replica and for the
cluster, takes everything down, and exits 0. Exits 1 when an answer is not what it must be.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import time
from collections.abc import Iterator

from megatoken.cluster.cli.down import take_down
from megatoken.cluster.cli.generate import Tokenizer, load_tokenizer
from megatoken.cluster.cli.up import check, prepare_models
from megatoken.cluster.client.control import CommandError, ControlClient, client_of
from megatoken.cluster.client.progress import Progress, wait_until_settled
from megatoken.cluster.spec.cluster import DEFAULT_MODEL, ClusterSpec, default_spec
from megatoken.cluster.start.bring_up import Up, bring_up
from megatoken.cluster.view.human import number, table
from megatoken.cluster.view.text import rates_of
from megatoken.errors import MegatokenError
from megatoken.process.tree import descendants
from megatoken.router.client.client import TokenClient
from megatoken.v1 import control_pb2

REPLICAS = 2
START_TIMEOUT_S = 600.0
QUESTIONS = ("What is the capital of Japan?", "Name three colours of the rainbow.")
MUST_ANSWER = {"What is the capital of Japan?": "The capital of Japan is Tokyo."}
REQUESTS, REQUEST_TOKENS = 16, 64  # of the throughput part, spread over the replicas
CALL_TIMEOUT_S = 120.0
WINDOW_S = 10  # of the throughput that the agents sum


class DemoFailed(CommandError):
    """An answer, or what is left at the end, is not what it must be."""


def main() -> int:
    progress = Progress(lambda line: print(line, flush=True))
    spec = demo_spec()
    try:
        check(spec)
        prepare_models(spec, progress)
        progress.say(f"1/5  a cluster of {REPLICAS} replicas of {DEFAULT_MODEL}, vLLM on CPU, under a local Ray")
        up = bring_up(spec, progress, attached=True)
        with client_of(up.record) as client:
            try:
                show(client, progress)
            finally:
                progress.say("5/5  taking everything down")
                end(up, client, progress)
        progress.say("done: nothing is left running")
        return 0
    except MegatokenError as error:
        return failed(progress, str(error))
    except CommandError as error:
        return failed(progress, str(error))
    except KeyboardInterrupt:
        return 130


def demo_spec() -> ClusterSpec:
    """The embedded default with two replicas, on ports that are free."""
    spec = default_spec().with_replicas(DEFAULT_MODEL, REPLICAS)
    small = spec.models[0].model_copy(update={"kv_cache_gib": 0.5})
    return ClusterSpec(
        cluster="demo",
        control=spec.control.model_copy(update={"port": 0}),
        routers=spec.routers.model_copy(update={"port": 0}),
        edge=spec.edge.model_copy(update={"port": 0}),
        models=(small,),
    )


def show(client: ControlClient, progress: Progress) -> None:
    """Everything between up and down."""
    wait_until_settled(client, timeout_s=START_TIMEOUT_S, progress=progress)
    status = client.status()
    edge, router = address_of(status, "edge"), address_of(status, "router")
    progress.say(f"2/5  chat through the OpenAI-compatible edge: http://{edge}/v1")
    for question in QUESTIONS:
        answer = chat_shown(edge, question)
        if question in MUST_ANSWER and answer != MUST_ANSWER[question]:
            raise DemoFailed(f"greedy {question!r} answered {answer!r}; it must be {MUST_ANSWER[question]!r}")
    tokenizer = load_tokenizer(None, status.models[0].source)
    progress.say(f"3/5  token requests through the router, over gRPC: {router}")
    text = asyncio.run(one_request(router, tokenizer))
    print(f"     tokens in, tokens out: {text!r}", flush=True)
    progress.say(f"     {REQUESTS} requests of {REQUEST_TOKENS} tokens at once")
    elapsed_s = asyncio.run(many_requests(router, tokenizer, progress))
    progress.say("4/5  tokens per second")
    time.sleep(2.5)  # two ticks of the agents: the last tokens are in their sum
    print("\n".join(f"     {line}" for line in throughput_lines(status, client.status(), elapsed_s)), flush=True)


def chat_shown(edge: str, question: str) -> str:
    """Asks the edge, greedily, and prints the answer as it streams; returns it."""
    print(f"     > {question}\n     ", end="", flush=True)
    parts = []
    for part in chat(edge, question):
        parts.append(part)
        print(part, end="", flush=True)
    print(flush=True)
    return "".join(parts).strip()


def chat(edge: str, question: str) -> Iterator[str]:
    """The pieces of a streamed chat completion. Raises DemoFailed for an error of the edge."""
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 48,
        "stream": True,
    }
    connection = http.client.HTTPConnection(edge, timeout=CALL_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise DemoFailed(f"the edge answered {response.status}: {response.read(500).decode(errors='replace')}")
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("content") or ""
    finally:
        connection.close()


async def one_request(router: str, tokenizer: Tokenizer) -> str:
    """One greedy request, token ids both ways; returns its text."""
    async with TokenClient([router]) as client:
        prompt = tokenizer.encode(QUESTIONS[0], raw=False)
        stream = client.generate(DEFAULT_MODEL, prompt, max_tokens=32, temperature=0.0)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return tokenizer.decode(await stream.tokens())


async def many_requests(router: str, tokenizer: Tokenizer, progress: Progress) -> float:
    """Keeps every replica busy; returns the seconds it took."""
    began = time.monotonic()
    async with TokenClient([router]) as client, asyncio.timeout(CALL_TIMEOUT_S):

        async def one(place: int) -> None:
            prompt = tokenizer.encode(f"Write a story about the number {place}.", raw=False)
            stream = client.generate(
                DEFAULT_MODEL, prompt, max_tokens=REQUEST_TOKENS, temperature=0.8, seed=place, ignore_eos=True
            )
            await stream.tokens()

        running = [asyncio.create_task(one(place)) for place in range(REQUESTS)]
        for done, finished in enumerate(asyncio.as_completed(running), 1):
            await finished
            if done % (REQUESTS // 4) == 0:
                progress.say(f"     {done} of {REQUESTS} done")
    return time.monotonic() - began


def throughput_lines(
    before: control_pb2.ClusterStatus, after: control_pb2.ClusterStatus, elapsed_s: float
) -> list[str]:
    """Rates of the replicas and of the cluster over the run, and what the agents' collective summed."""
    earlier = {row.replica: row.generated_tokens for row in before.replicas}
    rows, total = [], 0
    for row in after.replicas:
        made = row.generated_tokens - earlier.get(row.replica, 0)
        total += made
        rows.append([row.replica, f"{made:,}", number(made / elapsed_s)])
    rows.append(["cluster", f"{total:,}", number(total / elapsed_s)])
    lines = table(["", "TOKENS", "TOKENS/S"], rows)
    sample = after.throughput
    cluster = next((row for row in sample.rows if row.kind == "cluster"), None)
    if cluster is not None:
        rate = rates_of(sample, WINDOW_S).get(("cluster", cluster.name), 0.0)
        lines.append(
            f"the agents' {sample.backend} collective counts {cluster.workers.generated_tokens:,} tokens in all,"
            f" {number(rate)}/s over the last {WINDOW_S} s; the routers delivered {cluster.routers.generated_tokens:,}"
        )
    return lines


def address_of(status: control_pb2.ClusterStatus, kind: str) -> str:
    """host:port of the first process of a kind. Raises DemoFailed."""
    found = next((entry.address for entry in status.processes if entry.kind == kind and entry.address), None)
    if found is None:
        raise DemoFailed(f"no {kind} serves")
    return found


def end(up: Up, client: ControlClient, progress: Progress) -> None:
    """Takes the cluster down and looks whether anything of it is left. Raises DemoFailed."""
    if up.guard is None:
        raise DemoFailed("the demo's cluster is not local")
    below = descendants(up.guard.pid)
    progress.say(f"     {len(below)} processes to end")
    take_down(client, up.record, progress, drain_s=5.0, guard=up.guard)
    left = [pid for pid in below if is_running(pid)]
    if left:
        raise DemoFailed(f"processes are left: {left}")


def is_running(pid: int) -> bool:
    """Whether a process of that id runs and is not merely waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def failed(progress: Progress, text: str) -> int:
    for line in text.splitlines():
        progress.say(f"FAILED: {line}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
