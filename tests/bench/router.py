"""`make bench-router`: what a router costs, with simulated workers in processes of their own.

CPU time is the router process's own, from the kernel. Prints a table and writes bench-results/router.json. Parts can
be chosen: `python -m tests.bench.router session generate --seconds 10`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.make import make_policy
from tests.bench.bars import Bar, lines, rows, status
from tests.support.processes import Processes, Started
from tests.support.router_core import CoreFleet
from tests.support.router_simulation import MIXED, Kind, Simulation, alone_cached, mixed_fleet

REPLICAS, RATE, STREAMS = 87, 12_000, 22_000
RESULTS = Path("bench-results/router.json")


class Side:
    """A helper program that prints JSON lines; killed at the end."""

    def __init__(self, module: str, settings: dict[str, Any]) -> None:
        command = [sys.executable, "-m", module, json.dumps(settings)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        if self.process.stdout is None:
            raise RuntimeError("no output of the helper program")
        text = self.process.stdout.readline()
        if not text:
            raise RuntimeError(f"the helper program ended with status {self.process.wait()}")
        return text.strip()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_router(processes: Processes, addresses: list[str], batch: int, **settings: Any) -> Started:
    replicas = [
        {"replica": f"m-{i}", "model": "m", "address": address, "incarnation": "1", "phase": "REPLICA_PHASE_READY",
         "max_model_len": 1 << 20, "max_running": batch, "device_kind": "simulated"}
        for i, address in enumerate(addresses)
    ]  # fmt: skip
    snapshot = {"epoch": "1", "version": "1", "replicas": replicas, "models": [{"model": "m"}]}
    return processes.start("router", {"router": "bench", "static_snapshot": snapshot, **settings})


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmRSS of process {pid}")


def measured(router: Started, client: dict[str, Any]) -> dict[str, Any]:
    """Runs a load and reads the router's CPU over its measured window."""
    with Side("tests.bench.router_clients", {"router": router.address, **client}) as load:
        if load.line() != "measuring":
            raise RuntimeError("the load did not say that it measures")
        before = router.cpu_s()
        seen: dict[str, Any] = json.loads(load.line())
        seen["cpu_s"] = router.cpu_s() - before
        seen["resident_bytes"] = resident_bytes(router.pid)
    if seen["errors"]:
        print(f"  errors: {seen['errors']}", file=sys.stderr)
    seen["cpu_us_per_token"] = 1e6 * seen["cpu_s"] / max(1, seen["tokens"])
    seen["tokens_per_s"] = seen["tokens"] / seen["seconds"]
    return seen


def bench_session(seconds: float, tokens: tuple[int, int] = (768, 1280), sessions: int = 4) -> dict[str, Any]:
    batch = -(-STREAMS // REPLICAS)
    with Processes() as processes, Side(
        "tests.bench.router_workers", {"replicas": REPLICAS, "rate": RATE, "batch": batch}
    ) as workers:  # fmt: skip
        router = start_router(processes, json.loads(workers.line())["addresses"], batch)
        idle = resident_bytes(router.pid)
        load = {"kind": "session", "streams": STREAMS, "sessions": sessions, "prompt": 128, "tokens": tokens}
        seen = measured(router, {**load, "ramp_s": 6, "warm_s": 4, "measure_s": seconds})
    return {
        "tokens_per_s": seen["tokens_per_s"],
        "duration_s": seen["seconds"],
        "cpu_us_per_token": seen["cpu_us_per_token"],
        "added_ms_p50": seen["added_ms_p50"],
        "added_ms_p99": seen["added_ms_p99"],
        "streams": STREAMS,
        "sessions": sessions,
        "tokens_a_request": sum(tokens) / 2,
        "requests_per_s": seen["requests"] / seen["seconds"],
        "messages_per_s": seen["messages"] / seen["seconds"],
        "bytes_per_stream": (seen["resident_bytes"] - idle) / STREAMS,
    }


def bench_generate(seconds: float) -> dict[str, Any]:
    with Processes() as processes, Side(
        "tests.bench.router_workers", {"replicas": 2, "rate": 1, "batch": 256, "step_s": 0.02}
    ) as workers:  # fmt: skip
        router = start_router(processes, json.loads(workers.line())["addresses"], 256)
        load = {"kind": "generate", "streams": 128, "prompt": 128, "tokens": (256, 256)}
        seen = measured(router, {**load, "ramp_s": 0, "warm_s": 2, "measure_s": seconds})
    return {
        "cpu_us_per_token": seen["cpu_us_per_token"],
        "tokens_per_s": seen["tokens_per_s"],
        "tokens_a_message": seen["tokens"] / max(1, seen["messages"]),
        "added_ms_p99": seen["added_ms_p99"],
    }


def bench_edge(seconds: float) -> dict[str, Any]:
    """SSE through worker, router and edge: 128 streams from two workers, a token a chunk, one every 20 ms each."""
    name = "smollm2-135m-instruct"
    with Processes() as processes:
        workers = []
        for i in range(2):
            simulated = {"step_s": 0.02, "max_running": 64, "max_model_len": 4096, "vocab_size": 49_152}
            config = {"replica": f"m-{i}", "incarnation": 1, "model": "m"}
            config |= {"engine": "simulated", "simulated": simulated}
            config |= {"counters_dir": str(processes.directory / "counters"), "metrics_port": None}
            workers.append(processes.start("worker", config))
        router = start_router(processes, [worker.address for worker in workers], 64)
        served = {"name": "m", "source": f"builtin:{name}", "dtype": "bfloat16", "max_model_len": 4096}
        edge = processes.start(
            "router.edge", {"edge": "bench", "router": router.address, "models": [served]}, timeout_s=180
        )
        path = {"worker": workers, "router": [router], "edge": [edge]}
        load = {"kind": "sse", "model": "m", "streams": 128, "prompt": 128, "tokens": (256, 256)}
        settings = {**load, "router": edge.address, "ramp_s": 0, "warm_s": 5, "measure_s": seconds}
        with Side("tests.bench.router_clients", settings) as client:
            client.line()
            before = {part: sum(one.cpu_s() for one in members) for part, members in path.items()}
            seen = json.loads(client.line())
            used = {part: sum(one.cpu_s() for one in members) - before[part] for part, members in path.items()}
    tokens = max(1, seen["tokens"])
    found = {f"{part}_us_per_token": 1e6 * spent / tokens for part, spent in used.items()}
    # The peers' whole path is vLLM's API server and vllm-router: 105-113 us on the machine of docs/decisions.md.
    return {
        "cpu_us_per_token": 1e6 * sum(used.values()) / tokens,
        "peer_cpu_us_per_token": None,
        "tokens_per_s": seen["tokens"] / seen["seconds"],
        **found,
    }


def bench_memory(seconds: float) -> dict[str, Any]:
    """Half the streams of the session benchmark, with an end and a start for each every second or two."""
    streams, tokens = 4000, (64, 192)
    with Processes() as processes, Side(
        "tests.bench.router_workers", {"replicas": 16, "rate": 12_000, "batch": 250}
    ) as workers:  # fmt: skip
        router = start_router(processes, json.loads(workers.line())["addresses"], 250)
        idle = resident_bytes(router.pid)
        load = {"kind": "session", "router": router.address, "streams": streams, "sessions": 4, "prompt": 512}
        settings = {**load, "tokens": tokens, "ramp_s": 3, "warm_s": max(5.0, seconds / 4), "measure_s": seconds}
        with Side("tests.bench.router_clients", settings) as client:
            client.line()
            first = resident_bytes(router.pid)
            seen = json.loads(client.line())
            last = resident_bytes(router.pid)
    return {
        "bytes_per_stream": (first - idle) / streams,
        "soak_growth_ratio": last / first,
        "soak_s": seconds,
        "requests": seen["requests"],
    }


def bench_assign(seconds: float) -> dict[str, Any]:
    """Assign and Release as fast as one client makes them: over one call, and in a call each."""
    found = {kind: _leases(kind, min(seconds, 10.0)) for kind in ("lease", "assign")}
    return {
        "cpu_us_per_assign_and_release": found["lease"]["cpu_us"],
        "requests_per_s": found["lease"]["requests_per_s"],
        "cpu_us_per_request": found["assign"]["cpu_us"] / 2,
    }


def _leases(kind: str, seconds: float) -> dict[str, float]:
    with Processes() as processes, Side(
        "tests.bench.router_workers", {"replicas": REPLICAS, "rate": RATE, "batch": 253}
    ) as workers:  # fmt: skip
        router = start_router(processes, json.loads(workers.line())["addresses"], 253)
        load = {"kind": kind, "streams": 32, "prompt": 128, "tokens": (128, 128)}
        seen = measured(router, {**load, "ramp_s": 1, "warm_s": 1, "measure_s": seconds})
    return {
        "cpu_us": 1e6 * seen["cpu_s"] / max(1, seen["requests"]),
        "requests_per_s": seen["requests"] / seen["seconds"],
    }


def bench_prompts(seconds: float) -> dict[str, Any]:
    """60,000-token prompts, one token each."""
    with Processes() as processes, Side(
        "tests.bench.router_workers", {"replicas": 4, "rate": 12_000, "batch": 64}
    ) as workers:  # fmt: skip
        router = start_router(processes, json.loads(workers.line())["addresses"], 64)
        load = {"kind": "session", "streams": 8, "sessions": 2, "prompt": 60_000, "tokens": (1, 1)}
        seen = measured(router, {**load, "ramp_s": 0, "warm_s": 2, "measure_s": min(seconds, 10.0)})
    return {
        "cpu_ms_per_request": 1e3 * seen["cpu_s"] / max(1, seen["requests"]),
        "requests_per_s": seen["requests"] / seen["seconds"],
    }


def bench_choose(_: float) -> dict[str, Any]:
    """One decision of the default policy, in this process."""
    found: dict[str, Any] = {}
    for size in (10, 1000):
        fleet = CoreFleet(replicas=size, max_running=256)
        policy, rng, asked = make_policy("least_tokens"), random.Random(1), RoutingRequest(128, 256)
        times = []
        for _ in range(20_000):
            began = time.perf_counter_ns()
            policy.choose(fleet.pool, asked, rng)
            times.append(time.perf_counter_ns() - began)
        found[f"us_p50_{size}"] = statistics.median(times) / 1000
        found[f"us_p99_{size}"] = sorted(times)[int(0.99 * len(times))] / 1000
    return found


def bench_mixed_fleet(_: float) -> dict[str, Any]:
    """Simulated on a virtual clock: the offered load is the sum of what the parts make alone."""
    total = sum(alone_cached(kind) for kind in MIXED)
    ours, turns = mixed_fleet("least_tokens", 1.0), mixed_fleet("round_robin", 1.0)
    by_hand = mixed_fleet("least_tokens", 1.0, weights=[kind.speed for kind in MIXED])
    evenly = mixed_fleet("least_tokens", 1.0, weights=[1.0] * len(MIXED))
    return {
        "efficiency": ours.tokens_per_s / total,
        "round_robin_efficiency": turns.tokens_per_s / total,
        "fixed_split_efficiency": by_hand.tokens_per_s / total,
        "even_split_efficiency": evenly.tokens_per_s / total,
        "ttft_p99_s": ours.first_token_p99_s(),
        "round_robin_ttft_p99_s": turns.first_token_p99_s(),
        "fixed_split_ttft_p99_s": by_hand.first_token_p99_s(),
    }


def bench_overload(_: float) -> dict[str, Any]:
    """Simulated: requests with a deadline of 5 s at 1, 2 and 10 times what the fleet can do."""
    kinds = [Kind("MI355X", 3.1)] * 4
    total = 4 * alone_cached(kinds[0])
    good = {}
    for load in (1.0, 2.0, 10.0):
        good[load] = Simulation(kinds, seed=3).run(load * total, 20.0, 15.0, timeout_s=5.0).goodput
    return {"goodput_ratio_2x": good[2.0] / good[1.0], "goodput_ratio_10x": good[10.0] / good[1.0]}


BARS = (
    Bar("session.tokens_per_s", 1_030_000, True),
    Bar("session.cpu_us_per_token", 0.45, False),
    Bar("session.added_ms_p99", 20.0, False),
    Bar("generate.cpu_us_per_token", 20.0, False),
    Bar("edge.cpu_us_per_token", 32.0, False),
    Bar("assign.cpu_us_per_assign_and_release", 150.0, False),
    Bar("choose.us_p50_1000", 20.0, False),
    Bar("prompts.cpu_ms_per_request", 0.3, False),
    Bar("session.bytes_per_stream", 4_000, False),
    Bar("memory.soak_growth_ratio", 1.05, False),
    Bar("mixed_fleet.efficiency", 0.985, True),
    Bar("overload.goodput_ratio_2x", 0.95, True),
    Bar("overload.goodput_ratio_10x", 0.95, True),
)


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "session": bench_session,
    "generate": bench_generate,
    "edge": bench_edge,
    "assign": bench_assign,
    "choose": bench_choose,
    "prompts": bench_prompts,
    "memory": bench_memory,
    "mixed_fleet": bench_mixed_fleet,
    "overload": bench_overload,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all unless named")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if RESULTS.exists() and arguments.parts:
        results = json.loads(RESULTS.read_text())
    for name in arguments.parts or PARTS:
        print(f"{name} ...", flush=True)
        results[name] = PARTS[name](arguments.seconds)
        for key, value in results[name].items():
            print(f"  {key:30} {value:,.3f}" if isinstance(value, float) else f"  {key:30} {value}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    judged = rows(BARS, results)
    print("\n".join(lines(judged)))  # the load average tells how far to trust times
    print(f"written: {RESULTS}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return status(judged)


if __name__ == "__main__":
    sys.exit(main())
