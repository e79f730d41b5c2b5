"""How many small changes of the decisions the unit tests notice: mutmut over the pure packages.

    python -m tests.mutants                 what changed since BASE (origin/main)
    python -m tests.mutants --all           every pure module
    python -m tests.mutants router/core/accounts.py ...

Works on a copy in build/mutants, in the layout that is installed, since mutmut finds modules by their paths. Prints
what went unnoticed, module by module, and writes bench-results/mutants.json. Exits with 1 below BAR.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from typing import Final

from tests.support.paths import REPOSITORY as ROOT

WORK: Final = ROOT / "build" / "mutants"
BAR: Final = 0.9
PURE: Final = (
    "cluster/decide", "cluster/placement", "cluster/inventory",
    "router/core", "router/intake", "router/streams", "router/fleet", "router/policies", "router/admission",
    "worker/streams", "worker/throughput/decide",
    "proto/megatoken/transitions.py", "proto/megatoken/reconnect.py", "proto/megatoken/tokens",
)  # fmt: skip
TESTS: Final = ("tests/unit/router", "tests/unit/cluster", "tests/unit/worker", "tests/unit/proto", "tests/transcripts",
    "tests/property")  # fmt: skip
UNFIT: Final = (  # they start processes, or look at the tree itself
    "tests/unit/cluster/ray/test_child.py",
    "tests/unit/cluster/launchers",
    "tests/unit/proto/test_generated_code.py",
)
CONFIG: Final = """
[tool.pytest.ini_options]
asyncio_mode = "auto"
pythonpath = ["."]
markers = ["vllm", "netns", "gpu", "xdist_group"]

[tool.mutmut]
source_paths = ["src"]
only_mutate = {modules}
also_copy = ["deploy", "docs"]
pytest_add_cli_args = ["-p", "no:xdist", "-p", "no:timeout", "-q"]
pytest_add_cli_args_test_selection = {tests}
process_isolation = "forkserver"
use_git_change_detection = false
"""


def pure_modules() -> list[str]:
    """Every module of PURE, by its path in the tree."""
    found = []
    for place in PURE:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"]


def changed_modules(base: str) -> list[str]:
    """Pure modules that differ from `base`."""
    done = subprocess.run(["git", "diff", "--name-only", base], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = set(done.stdout.split())
    return [module for module in pure_modules() if module in changed]


def installed_path(module: str) -> str:
    """Where the copy has a module of the tree."""
    return f"src/{module.removeprefix('proto/')}" if module.startswith("proto/") else f"src/megatoken/{module}"


def prepare(modules: list[str]) -> None:
    """The copy that mutmut works on."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "proto" / "megatoken", WORK / "src" / "megatoken", ignore=unwanted)  # follows the links
    for name in ("tests", "deploy", "docs"):
        shutil.copytree(ROOT / name, WORK / name, ignore=unwanted)
    for unfit in UNFIT:
        path = WORK / unfit
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = CONFIG.format(
        modules=json.dumps([installed_path(module) for module in modules]), tests=json.dumps(list(TESTS))
    )
    (WORK / "pyproject.toml").write_text(config)


def results() -> dict[str, Counter[str]]:
    """By module: how many mutants were killed, survived, or were reached by no test."""
    by_module: dict[str, Counter[str]] = {}
    for path in sorted((WORK / "mutants").rglob("*.meta")):
        meta = json.loads(path.read_text())
        module = str(path.relative_to(WORK / "mutants")).removesuffix(".meta")
        for code in meta["exit_code_by_key"].values():
            by_module.setdefault(module, Counter())[NAMES.get(code, "killed")] += 1
    return by_module


NAMES: Final = {  # mutmut.stats.status_by_exit_code
    0: "survived", 5: "not reached", 33: "not reached", None: "not run", 34: "skipped",
    24: "timed out", -24: "timed out", 36: "timed out", 152: "timed out", 255: "timed out",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutants")
    parser.add_argument("modules", nargs="*", help="paths in the tree; default: what changed since --base")
    parser.add_argument("--all", action="store_true", help="every pure module")
    parser.add_argument("--base", default=os.environ.get("BASE", "origin/main"))
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    modules = pure_modules() if arguments.all else arguments.modules or changed_modules(arguments.base)
    if not modules:
        print("no pure module changed")
        return 0
    prepare(modules)
    print(f"{len(modules)} modules", flush=True)
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(arguments.at_once)]
    done = subprocess.run(command, cwd=WORK, check=False)
    found = results()
    total: Counter[str] = sum(found.values(), Counter())
    if not total:
        print("mutmut made no mutant", file=sys.stderr)
        return done.returncode or 2
    for module, counts in sorted(found.items(), key=lambda entry: entry[1]["survived"] + entry[1]["not reached"]):
        print(f"{module}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    caught = total["killed"] + total["timed out"]
    share = caught / max(1, caught + total["survived"] + total["not reached"])
    print(f"noticed: {share:.1%} of {sum(total.values())} mutants; the bar is {BAR:.0%}")
    output = ROOT / "bench-results" / "mutants.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"noticed": share, "mutants": dict(total), "modules": found}, indent=1) + "\n")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
