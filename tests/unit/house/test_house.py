"""What keeps the tree readable: small folders, and docstrings that name files which are there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("cluster", "router", "worker", "proto/megatoken")
GENERATED = ROOT / "proto" / "megatoken" / "v1"
MOST_MODULES = 15


def sources(*folders: str) -> Iterator[Path]:
    """Python files below these folders, without links and generated code."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.resolve() == path and GENERATED not in path.parents:
                yield path


def test_no_folder_has_more_modules_than_one_sees_at_a_glance() -> None:
    counts: dict[Path, int] = {}
    for path in sources(*PACKAGES):
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert len(counts) > 30
    large = {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MOST_MODULES}
    assert not large


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and the second would be left out with an error."""
    names = [path.name for path in sources("tests") if path.name.startswith("test_")]
    assert len(names) > 100
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_every_package_says_what_it_is_for() -> None:
    silent = [
        str(folder.relative_to(ROOT))
        for folder in {path.parent for path in sources("cluster", "router", "worker")}
        if not (folder / "__init__.py").is_file() or not (folder / "__init__.py").read_text().startswith('"""')
    ]
    assert not silent


def told(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each comment and docstring."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(io.BytesIO(file.read()).readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.startswith('"""')):
                yield token.start[0], token.string


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "deploy"])
def test_a_docstring_names_files_that_are_there(folder: str) -> None:
    missing = []
    for path in sources(folder):
        for line, text in told(path):
            for name in re.findall(r"[\w/]*\w+\.py\b", text):
                if not (path.parent / name).exists() and not ("/" in name and (ROOT / name).exists()):
                    missing.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not missing


CHARGES = {"in_flight", "leased", "prompt_outstanding", "decode_outstanding", "charged_prompt", "charged_decode"}


def test_one_module_writes_what_replicas_are_charged() -> None:
    writers = set()
    for path in sources("router"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets if isinstance(node, ast.Assign | ast.AugAssign) else ():
                for each in ast.walk(target):
                    if isinstance(each, ast.Attribute) and each.attr in CHARGES:
                        writers.add(str(path.relative_to(ROOT)))
    assert writers == {"router/core/accounts.py"}


def test_a_public_class_name_means_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for path in sources(*PACKAGES):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert len(where) > 300
    assert not {name: places for name, places in where.items() if len(places) > 1}


def test_each_invariant_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "invariants.md").read_text()
    promises = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(promises) >= 19
    for promise in promises:
        tests = re.findall(r"`(test_\w+)` \(\[([\w/.]+)\]", promise)
        assert tests, promise
        for name, path in tests:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{name} in {path}"


def test_unit_tests_lie_as_what_they_test_does() -> None:
    folders = [path.parent for part in ("cluster", "router", "worker") for path in sources(f"tests/unit/{part}")]
    assert len(set(folders)) > 20
    stray = {str(folder) for folder in folders if not (ROOT / folder.relative_to(ROOT / "tests" / "unit")).is_dir()}
    assert not stray
