"""Campaigns of faults: each does one kind of harm on purpose while work goes on, and counts what came of it.

    python -m tests.chaos [NAME ...]      all campaigns, or those named, in full; writes bench-results/chaos.json

Ends with 1 when one of them is not clean. test_campaigns.py runs the short form of each. A campaign is a module
campaign_*.py with `NAME`, a sentence `ABOUT`, and `async def run(scale: float) -> Outcome`; `scale` 1.0 is the full
size, less is shorter.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

import tests.chaos as package
from tests.chaos.outcome import Outcome

REPORT = Path("bench-results/chaos.json")
LIMIT_S = 300.0  # of one campaign


def campaigns() -> dict[str, Any]:
    """Modules by campaign name, in the order of their names."""
    found = {}
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.name.startswith("campaign_"):
            module = importlib.import_module(f"tests.chaos.{entry.name}")
            found[module.NAME] = module
    return found


async def run_one(module: Any, scale: float) -> Outcome:
    """One campaign within its limit; an exception of its own counts as wrong."""
    try:
        async with asyncio.timeout(LIMIT_S):
            outcome: Outcome = await module.run(scale)
    except Exception as error:
        outcome = Outcome(wrong=1)
        outcome.problem(f"{type(error).__name__}: {error}")
    return outcome


def main() -> int:
    known = campaigns()
    wanted = sys.argv[1:] or list(known)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        print(f"campaign: {unknown[0]!r} is not allowed; one of: {', '.join(known)}", file=sys.stderr)
        return 2
    REPORT.parent.mkdir(exist_ok=True)
    report: dict[str, Any] = json.loads(REPORT.read_text()) if REPORT.exists() and sys.argv[1:] else {}
    failed = []
    for number, name in enumerate(wanted, start=1):
        print(f"[{number}/{len(wanted)}] {name}: {known[name].ABOUT}", flush=True)
        began = time.monotonic()
        outcome = asyncio.run(run_one(known[name], 1.0))
        report[name] = outcome.account() | {"seconds": round(time.monotonic() - began, 1)}
        REPORT.write_text(json.dumps(report, indent=2) + "\n")
        print(f"      {json.dumps(report[name])}", flush=True)
        if not outcome.clean:
            failed.append(name)
    print(f"wrote {REPORT}; " + (f"NOT CLEAN: {', '.join(failed)}" if failed else "all clean"), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
