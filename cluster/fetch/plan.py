"""Which files of a model's directory go from where to where. Pure.

One node's word decides where nodes differ, and that node is named by a person: nothing is overwritten otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from megatoken.cluster.planning.check import source_directory
from megatoken.cluster.spec.model import ModelSpec
from megatoken.cluster.view.human import gib
from megatoken.worker.engines.weights import SNAPSHOTS
from megatoken.worker.models import PREFIX

HUB_FOLDER = "models--"  # and ORG--NAME: where the hub's cache has a model
REVISION = "@"  # between that and a branch, tag or commit
SHOWN = 12  # hex digits of a hash in a message


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file by what is in it; `sha256` in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Holding:
    """What one node has of a model's directory."""

    node: str
    title: str
    receives: bool
    """Whether it has devices, and so needs the weights."""
    files: Mapping[str, FileContent] = field(default_factory=dict)
    """By path below the directory."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes of files that began to arrive, by the path of the part."""
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """One file to the nodes that lack it."""

    name: str
    content: FileContent
    sources: tuple[str, ...]
    targets: Mapping[str, int]
    """Bytes that each has already, by node."""

    @property
    def missing(self) -> int:
        """Bytes to be written, over all targets."""
        return sum(self.content.size - had for had in self.targets.values())


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What leaves every node that receives with the same files."""

    files: Mapping[str, FileContent]
    transfers: Sequence[Transfer]


def fetched_source(model: ModelSpec) -> str:
    """What is fetched for a model: DIRECTORY or [CACHE/]models--ORG--NAME@REVISION; empty: nothing.

    CACHE is there where the engine has another than its node: by download_dir, HF_HUB_CACHE or HF_HOME.
    """
    if model.engine != "vllm" or model.source.startswith(PREFIX):
        return ""
    if source_directory(model.source) is not None:
        return model.source
    home = model.env.get("HF_HOME")
    cache = model.engine_args.get("download_dir") or model.env.get("HF_HUB_CACHE") or (f"{home}/hub" if home else "")
    place = f"{HUB_FOLDER}{model.source.replace('/', '--')}{REVISION}{model.engine_args.get('revision') or 'main'}"
    return f"{cache}/{place}" if cache else place


class FetchError(Exception):
    """Why a model's files cannot be made equal; a line for each problem."""


def part_name(name: str, content: FileContent) -> str:
    """Where a file waits, below the directory, until all of it has come: hidden, and of this content alone."""
    path = PurePosixPath(name)
    return str(path.with_name(f".{path.name}.{content.sha256[:16]}.part"))


def plan(directory: str, holdings: Sequence[Holding], origin: str = "") -> FetchPlan:
    """Small files first. Raises FetchError.

    `origin`: id of the node whose files are right; without one, the files of all nodes together, which must not differ.
    """
    right = [holding for holding in holdings if not origin or holding.node == origin]
    files = _agreed(directory, right)
    if not files:
        where = f"node {right[0].title} has no file there" if origin and right else "no node has a file there"
        raise FetchError(f"{directory}: {where}; put the weights on one node first, then fetch")
    transfers = []
    for name, content in sorted(files.items(), key=lambda entry: (entry[1].size, entry[0])):
        sources = tuple(holding.node for holding in holdings if holding.files.get(name) == content)
        lacking = [holding for holding in holdings if holding.receives and holding.node not in sources]
        had = {one.node: min(one.parts.get(part_name(name, content), 0), content.size) for one in lacking}
        if lacking:
            transfers.append(Transfer(name, content, sources, had))
    _check_space(directory, holdings, transfers)
    return FetchPlan(files, transfers)


def further_files(holdings: Sequence[Holding], origin: str) -> dict[str, list[str]]:
    """Files that nodes have and the origin has not, by node: nobody removes them, and they make its weights differ."""
    files = next((holding.files for holding in holdings if holding.node == origin), {})
    found = {one.title: sorted(set(one.files) - set(files)) for one in holdings if one.receives and files}
    # A commit that is served no more does no harm.
    kept = {title: [name for name in names if not name.startswith(SNAPSHOTS)] for title, names in found.items()}
    return {title: names for title, names in kept.items() if names}


def _agreed(directory: str, holdings: Sequence[Holding]) -> dict[str, FileContent]:
    """Every file that one of the nodes has. Raises FetchError where two have different ones of a name."""
    agreed: dict[str, tuple[FileContent, str]] = {}
    problems = []
    for holding in holdings:
        for name, content in holding.files.items():
            known, whose = agreed.setdefault(name, (content, holding.title))
            if known != content:
                problems.append(
                    f"{directory}/{name}: node {whose} has SHA-256 {known.sha256[:SHOWN]}, node {holding.title} "
                    f"{content.sha256[:SHOWN]}; say whose files are right, e.g. --from {whose}"
                )
    if problems:
        raise FetchError("\n".join(problems))
    return {name: content for name, (content, _) in agreed.items()}


def _check_space(directory: str, holdings: Sequence[Holding], transfers: Sequence[Transfer]) -> None:
    problems = []
    for holding in holdings:
        need = sum(one.content.size - one.targets[holding.node] for one in transfers if holding.node in one.targets)
        if need > holding.free_bytes:
            problems.append(
                f"node {holding.title}: {directory} needs {gib(need)} more, and {gib(holding.free_bytes)} is free there"
            )
    if problems:
        raise FetchError("\n".join(problems))
