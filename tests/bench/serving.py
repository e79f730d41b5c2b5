"""`make bench`: what the fleet costs over vLLM alone, on this machine, in one run.

A pair is a short turn of LLM.generate and one of client -> router -> worker, or of the edge, with the same prompts, the
order alternating; what counts are the ratios of pairs, their median and its 95% interval (pairs.py). The added time to
the first token is a single stream's, against the engine core driven directly, pair by pair too. Only one engine works
at a time: the others wait for requests and use no CPU. Prints a table, writes bench-results/serving.json, and exits
with 1 where a bar is missed, with 3 where the machine was too noisy to tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatoken.router.client.client import TokenClient
from megatoken.worker.models import resolve_source
from tests.bench.bars import Bar, rows, status
from tests.bench.bars import lines as bar_lines
from tests.bench.pairs import Interval, interval, spread
from tests.bench.serving_clients import (
    edge_chat_first_token,
    edge_first_token,
    edge_load,
    session_first_token,
    session_load,
)
from tests.support.processes import MARKER, Processes, command_line, marked

RESULTS = Path("bench-results/serving.json")
MODEL, SOURCE = "smollm2", "builtin:smollm2-135m-instruct"
REQUESTS, TOKENS, AT_ONCE = 32, 32, 32  # of a turn: a second or two
BARS = (
    Bar("vs_offline", 0.95, True, "client -> router -> worker over LLM.generate"),
    Bar("edge_vs_offline", 0.93, True, "the edge, streaming, over LLM.generate"),
    Bar("ttft_added_ms", 3.0, False, "first token of a single stream, added by router and worker"),
    Bar("edge_path_cpu_us_per_token", 70.0, False, "worker, router and edge while the edge streams 32"),
    Bar(
        "prefix_ttft_ratio",
        1.05,
        False,
        "first token of chats that share 1,500 tokens, the edge over vLLM",
    ),
    Bar("prefix_cached_share", 0.95, True, "of the shared tokens, as streams report them"),
)
PARTS = ("worker", "router", "edge")
WAYS = ("fleet", "edge_stream", "edge_whole")
KV_CACHE_GIB = 1.0
SHARED_TOKENS = 1500  # of the system prompt that all chats of the prefix part have
CALM_S = 0.1  # until threads of vLLM alone, which spin for some milliseconds after a step, leave the cores


class Offline:
    """vLLM alone, in its own process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.serving_offline", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, MARKER: self._mark},
        )

    def answer(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise RuntimeError("no output of the offline process")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the offline process ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **request: Any) -> dict[str, Any]:
        if self._process.stdin is None:
            raise RuntimeError("no input of the offline process")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        for pid in marked(self._mark):  # an engine that outlived its front-end
            print(f"  ended {pid} ({command_line(pid)}), which vLLM left running", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)


class Bench:
    """Three ways to the same model, started once, measured in turns."""

    def __init__(self, processes: Processes, offline: Offline, source: str, env: dict[str, str]) -> None:
        self._offline = offline
        self._tokenizer = Tokenizer.from_file(f"{source}/tokenizer.json")
        self._chat = AutoTokenizer.from_pretrained(source)
        self.offline_rates: list[float] = []
        self.rates: dict[str, list[float]] = {way: [] for way in WAYS}
        self.ratios: dict[str, list[float]] = {way: [] for way in WAYS}
        self.ttft_ms: dict[str, list[float]] = {"direct": [], "fleet": [], "edge": []}
        self.prefix_ttft_ms: dict[str, list[float]] = {"direct": [], "edge": []}
        self.prefix_cached: list[float] = []
        self.cpu_us: dict[str, dict[str, list[float]]] = {way: {part: [] for part in PARTS} for way in WAYS}
        self._worker = processes.start(
            "worker",
            {
                "replica": "bench-0",
                "model": MODEL,
                "source": source,
                "dtype": "bfloat16",
                "counters_dir": str(processes.directory / "counters"),
                "max_running": AT_ONCE,
                "kv_cache_gib": KV_CACHE_GIB,
                "log_level": "warning",
                "env": env,
            },
            timeout_s=300,
        )
        ready = self._worker.ready
        replica = {
            "replica": "bench-0",
            "model": MODEL,
            "address": ready["address"],
            "phase": "REPLICA_PHASE_READY",
            "incarnation": str(ready["incarnation"]),
            "maxModelLen": ready["max_model_len"],
            "devices": 1,
            "vocabSize": ready["vocab_size"],
            "maxRunning": ready["max_running"],
            "engine": ready["engine"],
        }
        snapshot = {"epoch": "1", "version": "1", "replicas": [replica], "models": [{"model": MODEL}]}
        self._router = processes.start("router", {"router": "bench", "static_snapshot": snapshot})
        self._edge = processes.start(
            "router.edge",
            {
                "edge": "bench",
                "router": self._router.address,
                "models": [{"name": MODEL, "source": source, "dtype": "bfloat16"}],
            },
        )

    def prompts(self, round_number: int, count: int) -> list[list[int]]:
        """Prompts that no other round uses, so that no prefix cache helps one way and not another."""
        return [
            self._tokenizer.encode(
                f"Round {round_number}, question {number}: tell a short story of a lighthouse keeper who counts ships."
            ).ids
            for number in range(count)
        ]

    async def pair(self, number: int, way: str) -> None:
        """A turn of LLM.generate and one of the way."""
        prompts = self.prompts(number * len(WAYS) + WAYS.index(way), REQUESTS)
        if number % 2:
            through = await self._through(way, prompts)
            alone = await self._alone(prompts)
        else:
            alone = await self._alone(prompts)
            through = await self._through(way, prompts)
        self.offline_rates.append(alone)
        self.rates[way].append(through)
        self.ratios[way].append(through / alone)
        print(f"  pair {number}: {way:12} {through:7.1f} of {alone:7.1f} tokens/s: {through / alone:.3f}", flush=True)

    async def _alone(self, prompts: list[list[int]]) -> float:
        """Tokens/s."""
        seen = await asyncio.to_thread(self._offline.ask, do="generate", prompts=prompts, max_tokens=TOKENS)
        return _rate("offline", seen)

    async def _through(self, way: str, prompts: list[list[int]]) -> float:
        """Tokens/s; notes the CPU time of each process."""
        before = self._cpu_s()
        if way == "fleet":
            async with TokenClient([self._router.address]) as client:
                seen = await session_load(client, MODEL, prompts, TOKENS, AT_ONCE)
        else:
            stream = way == "edge_stream"
            seen = await edge_load(self._edge.address, MODEL, prompts, TOKENS, AT_ONCE, stream=stream)
        for part, used in self._cpu_s().items():
            self.cpu_us[way][part].append(1e6 * (used - before[part]))
        return _rate(way, seen)

    async def first_tokens(self, samples: int) -> None:
        """Single streams, one way after the other."""
        prompts = self.prompts(1_000_000, samples)
        async with TokenClient([self._router.address]) as client:
            for prompt in prompts:
                await asyncio.sleep(CALM_S)
                direct = await asyncio.to_thread(self._offline.ask, do="first_token", prompt=prompt)
                self.ttft_ms["direct"].append(1e3 * direct["seconds"])
                await asyncio.sleep(CALM_S)
                self.ttft_ms["fleet"].append(1e3 * await session_first_token(client, MODEL, prompt))
                again = [*prompt, 0]  # the worker has the prompt in its prefix cache by now
                self.ttft_ms["edge"].append(1e3 * await edge_first_token(self._edge.address, MODEL, again[::-1]))

    async def shared_prefix(self, samples: int) -> None:
        """Chats with one long system prompt, which both engines have in their prefix caches after the first."""
        words = self._tokenizer.encode(" a ship passed the lighthouse at dusk and was counted;" * 200).ids
        shared = self._tokenizer.decode(words[:SHARED_TOKENS])
        for number in range(samples + 1):
            messages = [
                {"role": "system", "content": shared},
                {"role": "user", "content": f"How many by day {number}?"},
            ]
            prompt = self._chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            await asyncio.sleep(CALM_S)
            direct = await asyncio.to_thread(self._offline.ask, do="first_token", prompt=list(prompt))
            await asyncio.sleep(CALM_S)
            seconds, cached = await edge_chat_first_token(self._edge.address, MODEL, messages)
            if number:
                self.prefix_ttft_ms["direct"].append(1e3 * direct["seconds"])
                self.prefix_ttft_ms["edge"].append(1e3 * seconds)
                self.prefix_cached.append(cached / SHARED_TOKENS)

    def warm_up(self) -> None:
        """A pair of each that is not counted."""
        for way in WAYS:
            asyncio.run(self.pair(0, way))
        asyncio.run(self.first_tokens(3))
        for series in (self.offline_rates, *self.rates.values(), *self.ratios.values(), *self.ttft_ms.values()):
            series.clear()
        for parts in self.cpu_us.values():
            for used in parts.values():
                used.clear()

    def _cpu_s(self) -> dict[str, float]:
        return {"worker": self._worker.cpu_s(), "router": self._router.cpu_s(), "edge": self._edge.cpu_s()}


def _rate(way: str, seen: dict[str, Any]) -> float:
    if seen["tokens"] != REQUESTS * TOKENS:
        raise RuntimeError(f"{way} made {seen['tokens']} tokens, not {REQUESTS * TOKENS}")
    return float(seen["tokens"] / seen["seconds"])


def added_ms(ttft_ms: dict[str, list[float]], way: str) -> Interval:
    """What a way adds to the direct drive just before it."""
    return interval([taken - direct for taken, direct in zip(ttft_ms[way], ttft_ms["direct"], strict=True)])


def summary(bench: Bench) -> dict[str, Any]:
    """Intervals over pairs, and the raw series."""
    per_token = {
        way: {part: interval([value / (REQUESTS * TOKENS) for value in used]) for part, used in parts.items()}
        for way, parts in bench.cpu_us.items()
    }
    together = [sum(values) / (REQUESTS * TOKENS) for values in zip(*bench.cpu_us["edge_stream"].values(), strict=True)]
    ratios = {way: interval(values) for way, values in bench.ratios.items()}
    shared = bench.prefix_ttft_ms
    prefix = interval([edge / direct for edge, direct in zip(shared["edge"], shared["direct"], strict=True)])
    added = {way: added_ms(bench.ttft_ms, way) for way in ("fleet", "edge")}
    return {
        "vs_offline": ratios["fleet"].json(),
        "vs_offline_low": ratios["fleet"].low,
        "edge_vs_offline": ratios["edge_stream"].json(),
        "edge_vs_offline_low": ratios["edge_stream"].low,
        "edge_whole_vs_offline": ratios["edge_whole"].json(),
        "ttft_added_ms": added["fleet"].json(),
        "ttft_added_ms_p50": added["fleet"].median,
        "edge_ttft_added_ms": added["edge"].json(),
        "prefix_ttft_ratio": prefix.json(),
        "prefix_ttft_ms_p50": {name: statistics.median(values) for name, values in shared.items()},
        "prefix_cached_share": statistics.median(bench.prefix_cached),
        "edge_path_cpu_us_per_token": interval(together).json(),
        "cpu_us_per_token": {
            way: {part: one.median for part, one in parts.items()} for way, parts in per_token.items()
        },
        "cpu_us_per_request": {
            way: {part: one.median * TOKENS for part, one in parts.items()} for way, parts in per_token.items()
        },
        "tokens_per_s": {
            "offline": statistics.median(bench.offline_rates),
            **{way: statistics.median(values) for way, values in bench.rates.items()},
        },
        "ttft_ms_p50": {name: statistics.median(values) for name, values in bench.ttft_ms.items()},
        "noise": spread(bench.offline_rates),
        "pairs": len(bench.ratios["fleet"]),
        "raw": {"ratios": bench.ratios, "offline_tokens_per_s": bench.offline_rates, "ttft_ms": bench.ttft_ms},
        "load": {"requests": REQUESTS, "tokens": TOKENS, "at_once": AT_ONCE, "model": SOURCE, "dtype": "bfloat16"},
        "machine": {"cpus": os.cpu_count(), "load_average": os.getloadavg()},
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    rate, ttft = found["tokens_per_s"], found["ttft_ms_p50"]
    lines = [
        f"{found['pairs']} pairs of turns of {REQUESTS} requests of {TOKENS} tokens, {AT_ONCE} at a time, {SOURCE}",
        f"vLLM alone: {rate['offline']:.1f} tokens/s; turns are {100 * found['noise']:.0f} % apart (middle half)",
        f"{'':30}{'tokens/s':>10}{'of LLM.generate (95%)':>26}{'first token':>14}{'added (95%)':>22}",
    ]
    ways = [
        ("client -> router -> worker", "fleet", "vs_offline", "fleet", "ttft_added_ms"),
        ("edge, streaming", "edge_stream", "edge_vs_offline", "edge", "edge_ttft_added_ms"),
        ("edge, whole answers", "edge_whole", "edge_whole_vs_offline", "", ""),
    ]
    for title, way, ratio, first, added in ways:
        line = f"{title:30}{rate[way]:10.1f}{_shown(found[ratio], 3):>26}"
        lines.append(f"{line}{ttft[first]:11.1f} ms{_shown(found[added], 1):>22}" if first else line)
    lines.append(f"{'CPU us a token (a request)':30}" + "".join(f"{part:>20}" for part in PARTS))
    for way in WAYS:
        token, request = found["cpu_us_per_token"][way], found["cpu_us_per_request"][way]
        lines.append(f"{way:30}" + "".join(f"{f'{token[part]:.1f} ({request[part]:.0f})':>20}" for part in PARTS))
    shared = found["prefix_ttft_ms_p50"]
    lines.append(
        f"chats that share {SHARED_TOKENS} tokens: first token {shared['edge']:.1f} ms through the edge, "
        f"{shared['direct']:.1f} ms alone"
    )
    lines += bar_lines(rows(BARS, found))
    return "\n".join(lines)


def _shown(one: dict[str, float], digits: int) -> str:
    return f"{one['median']:.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving")
    parser.add_argument("--pairs", type=int, default=30, help="of each way; fewer give wider intervals")
    parser.add_argument("--samples", type=int, default=40, help="single streams for the time to the first token")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of the worker and its engine")
    parser.add_argument("--default-executor", action="store_true", help="compare with vLLM's own default executor")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    source = resolve_source(SOURCE)
    settings = {
        "model": source,
        "dtype": "bfloat16",
        "max_num_seqs": AT_ONCE,
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(KV_CACHE_GIB * 2**30),
        "one_process_engine": not arguments.default_executor,
    }
    print("starting vLLM alone, a worker, a router and an edge: about a minute", flush=True)
    with Offline(settings) as offline, Processes() as processes:
        offline.answer()
        bench = Bench(processes, offline, source, dict(pair.split("=", 1) for pair in arguments.env))
        bench.warm_up()
        for number in range(1, arguments.pairs + 1):
            for way in WAYS:
                asyncio.run(bench.pair(number, way))
        asyncio.run(bench.first_tokens(arguments.samples))
        asyncio.run(bench.shared_prefix(arguments.samples))
        found = summary(bench)
    print(table(found))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {RESULTS}")
    return status(rows(BARS, found))


if __name__ == "__main__":
    sys.exit(main())
