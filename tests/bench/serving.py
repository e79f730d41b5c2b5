"""`make bench`: what the fleet costs over vLLM alone, on this machine, in one run.

The same prompts go through LLM.generate, through client -> router -> worker, and through the edge, in turns; medians
are compared. The added time to the first token is a single stream's, against the engine core driven directly. Only one
engine works at a time: the others wait for requests and use no CPU. Prints a table and writes
bench-results/serving.json.
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

from megatoken.router.client.client import TokenClient
from megatoken.worker.models import resolve_source
from tests.bench.serving_clients import edge_first_token, edge_load, session_first_token, session_load
from tests.support.processes import MARKER, Processes, command_line, marked

RESULTS = Path("bench-results/serving.json")
MODEL, SOURCE = "smollm2", "builtin:smollm2-135m-instruct"
REQUESTS, TOKENS, AT_ONCE = 64, 64, 32
BARS = {"vs_offline": (0.95, "at least"), "edge_vs_offline": (0.90, "at least"), "ttft_added_ms_p50": (3.0, "under")}
KV_CACHE_GIB = 1.0


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

    def __init__(self, processes: Processes, offline: Offline, source: str) -> None:
        self._offline = offline
        self._tokenizer = Tokenizer.from_file(f"{source}/tokenizer.json")
        self.runs: dict[str, list[float]] = {"offline": [], "fleet": [], "edge_stream": [], "edge_whole": []}
        self.ttft_ms: dict[str, list[float]] = {"direct": [], "fleet": [], "edge": []}
        self.cpu_us_per_token: dict[str, list[float]] = {"worker": [], "router": [], "edge": []}
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

    async def round(self, number: int) -> None:
        """One turn of each way, with the same prompts; the order turns with the round."""
        prompts = self.prompts(number, REQUESTS)
        async with TokenClient([self._router.address]) as client:
            ways: list[tuple[str, Any]] = [
                ("offline", lambda: self._alone(prompts)),
                ("fleet", lambda: session_load(client, MODEL, prompts, TOKENS, AT_ONCE)),
                ("edge_stream", lambda: edge_load(self._edge.address, MODEL, prompts, TOKENS, AT_ONCE, stream=True)),
                ("edge_whole", lambda: edge_load(self._edge.address, MODEL, prompts, TOKENS, AT_ONCE, stream=False)),
            ]
            shift = number % len(ways)
            for name, run in ways[shift:] + ways[:shift]:
                before = self._cpu_s()
                seen = await run()
                if seen["tokens"] != REQUESTS * TOKENS:
                    raise RuntimeError(f"{name} made {seen['tokens']} tokens, not {REQUESTS * TOKENS}")
                if name == "edge_stream":
                    for part, used in self._cpu_s().items():
                        self.cpu_us_per_token[part].append(1e6 * (used - before[part]) / seen["tokens"])
                self.runs[name].append(seen["tokens"] / seen["seconds"])
                print(f"  round {number}: {name:12} {self.runs[name][-1]:7.1f} tokens/s", flush=True)

    async def first_tokens(self, samples: int) -> None:
        """Single streams, one way after the other."""
        prompts = self.prompts(1_000_000, samples)
        async with TokenClient([self._router.address]) as client:
            for prompt in prompts:
                direct = await asyncio.to_thread(self._offline.ask, do="first_token", prompt=prompt)
                self.ttft_ms["direct"].append(1e3 * direct["seconds"])
                self.ttft_ms["fleet"].append(1e3 * await session_first_token(client, MODEL, prompt))
                again = [*prompt, 0]  # the worker has the prompt in its prefix cache by now
                self.ttft_ms["edge"].append(1e3 * await edge_first_token(self._edge.address, MODEL, again[::-1]))

    def warm_up(self) -> None:
        """A turn of each that is not counted."""
        asyncio.run(self.round(0))
        asyncio.run(self.first_tokens(3))
        for series in (*self.runs.values(), *self.ttft_ms.values(), *self.cpu_us_per_token.values()):
            series.clear()

    async def _alone(self, prompts: list[list[int]]) -> dict[str, Any]:
        return await asyncio.to_thread(self._offline.ask, do="generate", prompts=prompts, max_tokens=TOKENS)

    def _cpu_s(self) -> dict[str, float]:
        return {"worker": self._worker.cpu_s(), "router": self._router.cpu_s(), "edge": self._edge.cpu_s()}


def added_ms(ttft_ms: dict[str, list[float]], way: str) -> float:
    """Median of what a way adds to the direct drive just before it: a machine that slows down slows both of a pair."""
    return statistics.median(taken - direct for taken, direct in zip(ttft_ms[way], ttft_ms["direct"], strict=True))


def summary(bench: Bench) -> dict[str, Any]:
    """The figures, medians over rounds, and the raw runs."""
    median = {name: statistics.median(values) for name, values in bench.runs.items()}
    ttft = {name: statistics.median(values) for name, values in bench.ttft_ms.items()}
    ratios = {name: rate / median["offline"] for name, rate in median.items()}
    return {
        "vs_offline": ratios["fleet"],
        "edge_vs_offline": ratios["edge_stream"],
        "edge_whole_vs_offline": ratios["edge_whole"],
        "ttft_added_ms_p50": added_ms(bench.ttft_ms, "fleet"),
        "edge_ttft_added_ms_p50": added_ms(bench.ttft_ms, "edge"),
        "tokens_per_s": median,
        "ttft_ms_p50": ttft,
        "cpu_us_per_token": {name: statistics.median(values) for name, values in bench.cpu_us_per_token.items()},
        "raw": {"tokens_per_s": bench.runs, "ttft_ms": bench.ttft_ms, "cpu_us_per_token": bench.cpu_us_per_token},
        "load": {"requests": REQUESTS, "tokens": TOKENS, "at_once": AT_ONCE, "model": SOURCE, "dtype": "bfloat16"},
        "machine": {"cpus": os.cpu_count(), "load_average": os.getloadavg()},
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    rate, ttft = found["tokens_per_s"], found["ttft_ms_p50"]
    lines = [
        f"{REQUESTS} requests of {TOKENS} tokens, {AT_ONCE} at a time, {SOURCE}, medians",
        f"{'':34}{'tokens/s':>10}{'of LLM.generate':>18}{'first token':>14}",
    ]
    rows = [
        ("LLM.generate", rate["offline"], 1.0, ttft["direct"]),
        ("client -> router -> worker", rate["fleet"], found["vs_offline"], ttft["fleet"]),
        ("edge, streaming", rate["edge_stream"], found["edge_vs_offline"], ttft["edge"]),
        ("edge, whole answers", rate["edge_whole"], found["edge_whole_vs_offline"], None),
    ]
    for name, tokens_per_s, ratio, milliseconds in rows:
        shown = "" if milliseconds is None else f"{milliseconds:.1f} ms"
        lines.append(f"{name:34}{tokens_per_s:10.1f}{ratio:18.3f}{shown:>14}")
    for name, (bar, kind) in BARS.items():
        value = found[name]
        met = value >= bar if kind == "at least" else value < bar
        lines.append(f"{name:24} {value:8.3f}   {kind} {bar:g}: {'met' if met else 'MISSED'}")
    used = ", ".join(f"{name} {value:.1f}" for name, value in found["cpu_us_per_token"].items())
    lines.append(f"CPU us a token while the edge streams: {used}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=40, help="single streams for the time to the first token")
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
        bench = Bench(processes, offline, source)
        bench.warm_up()
        for number in range(1, arguments.rounds + 1):
            asyncio.run(bench.round(number))
        asyncio.run(bench.first_tokens(arguments.samples))
        found = summary(bench)
    print(table(found))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {RESULTS}")
    missed = [name for name, (bar, kind) in BARS.items() if (found[name] < bar) == (kind == "at least")]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
