"""`make bench-router`: what a router costs, with simulated workers in processes of their own.

CPU time is the router process's own, from the kernel. Prints a table and writes bench-results/router.json. Parts can
be chosen: `python -m tests.bench.router session generate --seconds 10`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes import Processes, Started

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


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {"session": bench_session, "generate": bench_generate}


def main() -> None:
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
            print(f"  {key:24} {value:,.3f}" if isinstance(value, float) else f"  {key:24} {value}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
