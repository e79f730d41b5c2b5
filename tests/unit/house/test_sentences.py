"""No decision reads a sentence: what is decided upon travels as an enum or a number, and words are made at the end."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.unit.house.test_house import PACKAGES, ROOT, sources

# What the tree calls a sentence for people.
SENTENCES = {"reason", "message", "why", "problem", "refused", "blocked", "resume_note", "details"}
READERS = {"startswith", "endswith", "find", "index", "count", "split", "partition", "rpartition", "removeprefix"}
# Text that somebody else wrote, taken apart where it comes in: (file, function).
OTHERS = {
    ("cluster/ray/backend.py", "_why_actor_died"),  # Ray names the cause in words alone
    ("worker/throughput/reduce/process_group.py", "reason_of"),  # and so does torch
}


def name_of(node: ast.expr) -> str:
    """The last name of `a.b.reason`, `reason` and `a.reason()`."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("lower", "strip", "casefold"):
            return name_of(node.func.value)
        return name_of(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_words(node: ast.expr) -> bool:
    """A literal of letters, or the name of a constant. (`Finish.reason` is an enum, with constants like STOP.)"""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and any(letter.isalpha() for letter in node.value)
    return isinstance(node, ast.Name) and node.id.isupper()


def reads(node: ast.AST) -> bool:
    """Whether an expression looks into a sentence, or compares one with words."""
    if isinstance(node, ast.Compare):
        for operator, left, right in zip(node.ops, [node.left, *node.comparators], node.comparators, strict=False):
            if isinstance(operator, ast.In | ast.NotIn) and name_of(right) in SENTENCES and is_words(left):
                return True
            if isinstance(operator, ast.Eq | ast.NotEq) and any(
                is_words(other)
                and name_of(said) in (SENTENCES if isinstance(other, ast.Constant) else SENTENCES - {"reason"})
                for said, other in ((left, right), (right, left))
            ):
                return True
        return False
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr in READERS and name_of(node.func.value) in SENTENCES:
        return bool(node.args) and is_words(node.args[0])
    patterns = ("search", "match", "fullmatch", "findall", "finditer")
    return node.func.attr in patterns and any(name_of(argument) in SENTENCES for argument in node.args)


def readings(tree: ast.AST, function: str = "") -> Iterator[tuple[str, int]]:
    """(function, line) of each expression that reads a sentence."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if reads(node):
            yield inner, node.lineno  # type: ignore[attr-defined]
        yield from readings(node, inner)


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_decision_reads_a_sentence(folder: str) -> None:
    found = []
    for path in sources(folder):
        name = str(path.relative_to(ROOT))
        for function, line in readings(ast.parse(path.read_text())):
            if (name, function) not in OTHERS:
                found.append(f"{name}:{line} in {function}")
    assert not found


@pytest.mark.parametrize(
    "decision",
    [
        'if "version" in reason: pass',
        "if finish.message == DRAINING: pass",
        'x = error.message.lower().startswith("full")',
        "found = RETRY.search(message)",
        "x = finish.message.partition(\": \")[0] == 'full' or 'full' != reason",
    ],
)
def test_such_a_decision_is_found(decision: str) -> None:
    assert list(readings(ast.parse(decision)))
