"""What a spec asks of its nodes, and what was found on them: of a running Ray, or of this machine alone."""

from __future__ import annotations

from collections.abc import Callable

from megatoken.cluster.doctor.facts import Examination, Finding, Needs, NodeFacts
from megatoken.cluster.doctor.judge import judge
from megatoken.cluster.doctor.probe import node_facts
from megatoken.cluster.inventory.model_memory import weight_total
from megatoken.cluster.planning.check import shape_of, source_directory
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.worker.models import PREFIX

Report = Callable[[str], None]


class CannotExamine(RuntimeError):
    """The Ray cluster cannot be used. One sentence: why, and what to check."""


def examine(spec: ClusterSpec, address: str, *, reductions: bool, report: Report) -> Examination:
    """Every node of the Ray at `address`; "local": this machine. `reductions`: time an all-reduce between pairs.

    Blocks for seconds, with reductions for seconds a round. Raises CannotExamine.
    """
    sources, ports = model_directories(spec), head_ports(spec)
    if address == "local":
        return Examination((node_facts("local", "127.0.0.1", sources=sources, ports=ports, before_ray=True),))
    from megatoken.cluster.doctor.nodes import examine_cluster  # Ray takes a second to import

    try:
        return examine_cluster(address, sources=sources, head_ports=ports, reductions=reductions, report=report)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CannotExamine(
            f"the Ray cluster at {address} cannot be used: {first}; check the address, that Ray runs there, and that "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token"
        ) from None


def findings_of(spec: ClusterSpec, seen: Examination) -> tuple[Finding, ...]:
    """What stands in the way of this spec, worst first."""
    return judge(seen.nodes, seen.links, seen.pairs, _needs(spec, seen.nodes))


def model_directories(spec: ClusterSpec) -> list[str]:
    """Model directories that every node must have."""
    paths = [model.source for model in spec.models if model.engine == "vllm" and not model.source.startswith(PREFIX)]
    return [path for path in paths if source_directory(path) is not None]


def head_ports(spec: ClusterSpec) -> tuple[int, ...]:
    """Ports that must be free where the controller will run."""
    return tuple(port for port in spec.ports.values() if port)


def _needs(spec: ClusterSpec, nodes: tuple[NodeFacts, ...]) -> Needs:
    """What is downloaded or converted on a node: models that are not a directory."""
    largest = 0
    for model in spec.models:
        shape = shape_of(model)
        if shape is not None and model.source not in model_directories(spec):
            largest = max(largest, weight_total(shape))
    uses_vllm = any(model.engine == "vllm" for model in spec.models)
    several_ranks = any(model.parallel.width > 1 for model in spec.models)
    return Needs(weight_bytes=largest, uses_vllm=uses_vllm, several_ranks=several_ranks, multinode=len(nodes) > 1)
