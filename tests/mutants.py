"""How many small changes of the decisions the unit tests notice: mutmut over the pure packages.

    python -m tests.mutants                 what changed since BASE (origin/main)
    python -m tests.mutants --all           every pure module
    python -m tests.mutants --all --go-on   the same, from where the last run was cut off
    python -m tests.mutants router/core/accounts.py --tests tests/unit/router/core ...

A mutant is a decision that is made otherwise: a comparison, a sign, an operator, a number, a condition or a branch.
What mutmut does beside that (arguments left out or None, texts in capitals) the type checker refuses or a reader sees.

Works on a copy in build/mutants, in the layout that is installed, since mutmut finds modules by their paths. Prints
what went unnoticed, as differences, and writes bench-results/mutants.json. Mutants that change nothing that anybody
could see are listed with the reason in equivalent_mutants.txt, and do not count. Exits with 1 below BAR.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.support.paths import REPOSITORY as ROOT

BAR: Final = 0.9
EQUIVALENT: Final = ROOT / "tests" / "equivalent_mutants.txt"
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
DRIVER: Final = """
from mutmut.mutation import mutators
from mutmut.__main__ import cli

kept = {kept}
mutators.mutation_operators[:] = [(kind, one) for kind, one in mutators.mutation_operators if one.__name__ in kept]
cli()
"""
OPERATORS: Final = (  # of mutmut.mutation.mutators
    "operator_number", "operator_name", "operator_augmented_assignment", "operator_remove_unary_ops",
    "operator_keywords", "operator_swap_op", "operator_match", "operator_if_exp",
)  # fmt: skip
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


def prepare(work: Path, modules: list[str], tests: Sequence[str]) -> None:
    """The copy that mutmut works on."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "proto" / "megatoken", work / "src" / "megatoken", ignore=unwanted)  # follows the links
    for name in ("tests", "deploy", "docs"):
        shutil.copytree(ROOT / name, work / name, ignore=unwanted)
    for unfit in UNFIT:
        path = work / unfit
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = CONFIG.format(
        modules=json.dumps([installed_path(module) for module in modules]), tests=json.dumps(list(tests))
    )
    (work / "pyproject.toml").write_text(config)
    (work / "driver.py").write_text(DRIVER.format(kept=OPERATORS))


def results(work: Path) -> dict[str, dict[str, str]]:
    """By module: what became of each mutant, by its name."""
    by_module = {}
    for path in sorted((work / "mutants").rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        if codes:
            module = str(path.relative_to(work / "mutants")).removesuffix(".meta")
            by_module[module] = {mutant: NAMES.get(code, "killed") for mutant, code in codes.items()}
    return by_module


def differences(source: str, mutants: Iterable[str]) -> Iterator[str]:
    """What each mutant changes: "function: lines as they are => as the mutant has them"."""
    lines = source.splitlines()
    functions = {
        node.name: [line.strip() for line in lines[node.lineno : node.end_lineno]]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for mutant in mutants:
        name = mutant.rpartition(".")[2]
        original = re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)
        changed = list(difflib.ndiff(functions[original], functions[name]))
        before = " ".join(line[2:] for line in changed if line.startswith("- "))
        after = " ".join(line[2:] for line in changed if line.startswith("+ "))
        yield f"{original.removeprefix('x_').removesuffix('__mutmut_orig')}: {before} => {after}"


NAMES: Final = {  # mutmut.stats.status_by_exit_code
    0: "survived", 5: "not reached", 33: "not reached", None: "not run", 34: "skipped",
    24: "timed out", -24: "timed out", 36: "timed out", 152: "timed out", 255: "timed out",
}  # fmt: skip


def equivalents() -> dict[str, set[str]]:
    """By module: the differences that are listed. The file has a module, below it a difference, below that a reason."""
    found: dict[str, set[str]] = {}
    module = ""
    for line in EQUIVALENT.read_text().splitlines():
        depth = len(line) - len(line.lstrip())
        if line.startswith("#") or not line.strip():
            continue
        if depth == 0:
            module = installed_path(line.strip())
        elif depth == 4:
            found.setdefault(module, set()).add(line.strip())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutants")
    parser.add_argument("modules", nargs="*", help="paths in the tree; default: what changed since --base")
    parser.add_argument("--all", action="store_true", help="every pure module")
    parser.add_argument("--base", default=os.environ.get("BASE", "origin/main"))
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what may notice; default: all that is fit")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants", help="the folder of the copy")
    parser.add_argument("--go-on", action="store_true", help="with the copy of a run that was cut off")
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    modules = pure_modules() if arguments.all else arguments.modules or changed_modules(arguments.base)
    if not modules:
        print("no pure module changed")
        return 0
    work = arguments.work.resolve()
    if not arguments.go_on:
        prepare(work, modules, arguments.tests)
    print(f"{len(modules)} modules", flush=True)
    command = [sys.executable, "driver.py", "run", "--max-children", str(arguments.at_once)]
    done = subprocess.run(command, cwd=work, check=False)
    found = results(work)
    total = Counter(state for states in found.values() for state in states.values())
    if not total:
        print("mutmut made no mutant", file=sys.stderr)
        return done.returncode or 2
    listed = equivalents()
    for module, states in found.items():
        unnoticed = [mutant for mutant, state in states.items() if state in ("survived", "not reached")]
        lines = dict(zip(unnoticed, differences((work / "mutants" / module).read_text(), unnoticed), strict=True))
        for mutant, line in list(lines.items()):
            if line in listed.get(module, ()):
                states[mutant] = "equivalent"
                del lines[mutant]
        counts = Counter(states.values())
        print(f"{module}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
        for line in lines.values():
            print(f"    {line}")
    total = Counter(state for states in found.values() for state in states.values())
    caught = total["killed"] + total["timed out"]
    share = caught / max(1, caught + total["survived"] + total["not reached"])
    print(f"noticed: {share:.1%} of {sum(total.values())} mutants; the bar is {BAR:.0%}")
    output = ROOT / "bench-results" / "mutants.json"
    output.parent.mkdir(exist_ok=True)
    by_module = {module: Counter(states.values()) for module, states in found.items()}
    output.write_text(json.dumps({"noticed": share, "mutants": total, "modules": by_module}, indent=1) + "\n")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
