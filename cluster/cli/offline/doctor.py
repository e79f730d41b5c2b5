"""`megatoken doctor [-f spec.yaml] [--address HOST:PORT]`: checks every node before a launch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from megatoken.cluster.cli.common import read_text
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.doctor.facts import Examination, Finding, Needs, NodeFacts, Severity
from megatoken.cluster.doctor.judge import judge, stops
from megatoken.cluster.doctor.probe import node_facts
from megatoken.cluster.inventory.model_memory import weight_total
from megatoken.cluster.planning.check import shape_of, source_directory
from megatoken.cluster.spec.cluster import ClusterSpec, default_spec
from megatoken.cluster.spec.load import load_spec
from megatoken.worker.models import PREFIX

MARKS = {Severity.STOP: "STOP", Severity.WARN: "warn", Severity.GOOD: "ok"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", help="the spec to be launched; none: the embedded default")
    parser.add_argument("--address", help="HOST:PORT of a running Ray; none: the spec's ray.address or RAY_ADDRESS")
    parser.add_argument("--no-all-reduce", action="store_true", help="skip the measurement between pairs of nodes")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """0: nothing would stop a launch; 1: something would."""
    spec = load_spec(read_text(arguments.file)) if arguments.file else default_spec()
    address = arguments.address or _ray_address(spec)
    ports = tuple(port for port in spec.ports.values() if port)
    if address == "local":
        facts = node_facts("local", "127.0.0.1", sources=_sources(spec), ports=ports)
        seen = Examination((facts,), note="no Ray cluster named: looking at this machine only")
    else:
        seen = _examine(address, spec, ports, reductions=not arguments.no_all_reduce)
    findings = judge(seen.nodes, seen.links, seen.pairs, _needs(spec, seen.nodes))
    if arguments.json:
        shown = {"stops": stops(findings), "findings": [dataclasses.asdict(finding) for finding in findings]}
        shown |= {"nodes": [dataclasses.asdict(node) for node in seen.nodes]}
        shown |= {"pairs": [dataclasses.asdict(pair) for pair in seen.pairs]}
        print(json.dumps(shown, indent=1))
    else:
        if seen.note:
            print(seen.note, file=sys.stderr)
        print(findings_text(findings))
    return 1 if stops(findings) else 0


def findings_text(findings: tuple[Finding, ...]) -> str:
    """One or two lines a finding, then the verdict."""
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.severity]:4}  {finding.check:13}  {finding.subject}: {finding.what}")
        if finding.do:
            lines.append(f"{'':21}-> {finding.do}")
    worst = sum(finding.severity is Severity.STOP for finding in findings)
    warned = sum(finding.severity is Severity.WARN for finding in findings)
    verdict = f"{worst} would stop a launch" if worst else "nothing would stop a launch"
    lines.append(f"{verdict}; {warned} warning{'' if warned == 1 else 's'}")
    return "\n".join(lines)


def _examine(address: str, spec: ClusterSpec, ports: tuple[int, ...], *, reductions: bool) -> Examination:
    from megatoken.cluster.doctor.nodes import examine_cluster  # Ray takes a second to import

    def report(line: str) -> None:
        print(f"doctor: {line}", file=sys.stderr)

    try:
        return examine_cluster(address, sources=_sources(spec), head_ports=ports, reductions=reductions, report=report)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CommandError(
            f"the Ray cluster at {address} cannot be used: {first}; check the address, that Ray runs there, and that "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token"
        ) from None


def _ray_address(spec: ClusterSpec) -> str:
    if spec.ray.address == "auto" or (spec.ray.address == "local" and os.environ.get("RAY_ADDRESS")):
        return os.environ.get("RAY_ADDRESS") or "auto"
    return spec.ray.address


def _sources(spec: ClusterSpec) -> list[str]:
    """Model directories that every node must have."""
    paths = [model.source for model in spec.models if model.engine == "vllm" and not model.source.startswith(PREFIX)]
    return [path for path in paths if source_directory(path) is not None]


def _needs(spec: ClusterSpec, nodes: tuple[NodeFacts, ...]) -> Needs:
    """What is downloaded or converted on a node: models that are not a directory."""
    largest = 0
    for model in spec.models:
        shape = shape_of(model)
        if shape is not None and model.source not in _sources(spec):
            largest = max(largest, weight_total(shape))
    uses_vllm = any(model.engine == "vllm" for model in spec.models)
    return Needs(weight_bytes=largest, uses_vllm=uses_vllm, multinode=len(nodes) > 1)
