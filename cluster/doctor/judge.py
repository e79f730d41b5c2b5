"""Facts in, findings out: which of them would stop a launch, and what to do. Pure.

Bars and where they come from are beside each check. A check that finds nothing wrong says so in one GOOD finding.
"""

from __future__ import annotations

import ipaddress
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from megatoken.cluster.doctor.facts import Finding, LinkFacts, Needs, NodeFacts, PairFacts, Severity
from megatoken.cluster.view.human import gib

GIB, MIB = 1 << 30, 1 << 20
SKEW_WARN_S, SKEW_STOP_S = 0.5, 300.0  # logs no longer line up; certificates and tokens may not be valid yet
SHM_STOP_BYTES = 128 * MIB  # containers start with 64 MiB: vLLM's queues between ranks die of SIGBUS there
SHM_WARN_BYTES = GIB  # vLLM's broadcast queue alone maps 10 chunks of 24 MiB a replica
FILES_STOP, FILES_WARN = 4096, 65_536  # Ray warns below 65,536; a router alone holds a descriptor a session
SLOW_SHARE, LATE_FACTOR, LATE_FLOOR_S = 0.5, 5.0, 1e-3  # of the median of all pairs
DISK_MARGIN_BYTES = 2 * GIB
STOPPING_VERSIONS = ("megatoken", "python", "ray", "vllm", "torch")


def judge(
    nodes: Sequence[NodeFacts], links: Sequence[LinkFacts], pairs: Sequence[PairFacts], needs: Needs
) -> tuple[Finding, ...]:
    """Everything found, worst first, then by check."""
    names = {node.node: _title(node) for node in nodes}
    found = [
        Finding(Severity.STOP, "reach", _title(node), f"it could not be examined: {node.error}", "See Ray's log there.")
        for node in nodes
        if node.error
    ]
    seen = [node for node in nodes if not node.error]
    checks: list[Callable[[], list[Finding]]] = [
        lambda: versions(seen, needs),
        lambda: devices(seen),
        lambda: clocks(seen),
        lambda: addresses(seen, needs),
        lambda: ports(seen, links, names),
        lambda: reductions(pairs, names),
        lambda: disks(seen, needs),
        lambda: shared_memory(seen, needs),
        lambda: limits(seen),
    ]
    for check in checks:
        found += check()
    order = list(Severity)
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def stops(findings: Sequence[Finding]) -> bool:
    """Whether a launch would fail."""
    return any(finding.severity is Severity.STOP for finding in findings)


def versions(nodes: Sequence[NodeFacts], needs: Needs) -> list[Finding]:
    """Every node must run the same code; drivers should be equal too."""
    found = []
    names = sorted({name for node in nodes for name in node.versions} | ({"vllm"} if needs.uses_vllm else set()))
    for name in names:
        counts = Counter(node.versions.get(name, "") for node in nodes)
        if name in STOPPING_VERSIONS and counts[""] and (name != "vllm" or needs.uses_vllm):
            lacking = [_title(node) for node in nodes if not node.versions.get(name)]
            what = f"{name} is not installed"
            found.append(Finding(Severity.STOP, "versions", _list(lacking), what, "Install the same release."))
        present = {version: count for version, count in counts.items() if version}
        if len(present) > 1:
            most = max(present, key=lambda version: (present[version], version))
            others = [
                f"{_title(node)} {node.versions[name]}" for node in nodes if node.versions.get(name, most) != most
            ]
            stopping = name in STOPPING_VERSIONS
            found.append(
                Finding(
                    Severity.STOP if stopping else Severity.WARN,
                    "versions",
                    _list(others),
                    f"{name} differs from {most}, which {present[most]} of {len(nodes)} nodes have",
                    f"Install {name} {most} there." if stopping else f"Bring the {name} to {most} when you can.",
                )
            )
    if not found and nodes:
        shown = ", ".join(f"{name} {nodes[0].versions[name]}" for name in names if name in nodes[0].versions)
        found.append(_good("versions", nodes, f"equal: {shown}"))
    return found


def devices(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """The driver must know every GPU that Ray would hand out."""
    found = []
    for node in nodes:
        if node.expected_gpus > node.accelerators:
            found.append(
                Finding(
                    Severity.STOP,
                    "devices",
                    _title(node),
                    f"Ray counts {node.expected_gpus} GPUs, but the driver shows {node.accelerators}",
                    "Check the driver and the container's device access, or start Ray with fewer --num-gpus.",
                )
            )
        elif node.accelerators > node.expected_gpus:
            found.append(
                Finding(
                    Severity.WARN,
                    "devices",
                    _title(node),
                    f"the driver shows {node.accelerators} GPUs, but Ray uses {node.expected_gpus}",
                    "Start Ray with more --num-gpus, unless the others are left out on purpose.",
                )
            )
    if not found and nodes:
        found.append(_good("devices", nodes, f"{sum(node.accelerators for node in nodes)} GPUs visible"))
    return found


def clocks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Offsets are against the machine that asks, so the median node is taken as right."""
    if not nodes:
        return []
    middle = statistics.median(node.clock_offset_s for node in nodes)
    found = []
    for node in nodes:
        skew = node.clock_offset_s - middle
        if abs(skew) - node.clock_error_s > SKEW_WARN_S:
            severity = Severity.STOP if abs(skew) - node.clock_error_s > SKEW_STOP_S else Severity.WARN
            way = "ahead of" if skew > 0 else "behind"
            what = f"its clock is {abs(skew):.1f} s {way} the others (+/- {node.clock_error_s:.2f} s)"
            found.append(Finding(severity, "clock", _title(node), what, "Run a time service there (chrony or ntpd)."))
    if not found:
        widest = max(abs(node.clock_offset_s - middle) for node in nodes)
        found.append(_good("clock", nodes, f"within {widest * 1000:.0f} ms"))
    return found


def addresses(nodes: Sequence[NodeFacts], needs: Needs) -> list[Finding]:
    """Gloo binds to what the host name resolves to, unless it is told an interface: we tell it, others may not."""
    found = []
    for node in nodes:
        if not node.interface:
            found.append(
                Finding(
                    Severity.STOP,
                    "address",
                    _title(node),
                    f"no interface of it carries its cluster address {node.address}",
                    "Start Ray there with --node-ip-address of its own, or set launch.*.interface.",
                )
            )
        if _loopback(node.address) and needs.multinode:
            found.append(
                Finding(
                    Severity.STOP,
                    "address",
                    _title(node),
                    f"its cluster address is {node.address}, which no other node can reach",
                    "Start Ray there with --node-ip-address of an interface that others reach.",
                )
            )
        elif node.address not in node.hostname_addresses and needs.multinode:
            shown = ", ".join(node.hostname_addresses) or "nothing"
            found.append(
                Finding(
                    Severity.WARN,
                    "address",
                    _title(node),
                    f"its name {node.hostname} resolves to {shown} instead of {node.address}; Gloo would bind there "
                    f"if it were not told {node.interface or 'an interface'}",
                    "Put the address into DNS or /etc/hosts, or keep GLOO_SOCKET_IFNAME set as Megatoken does.",
                )
            )
    if not found and nodes:
        found.append(_good("address", nodes, "names and interfaces lead to the cluster addresses"))
    return found


def ports(nodes: Sequence[NodeFacts], links: Sequence[LinkFacts], names: dict[str, str]) -> list[Finding]:
    """Ray, gRPC and the collectives open connections both ways between any two nodes."""
    found = [
        Finding(
            Severity.STOP,
            "ports",
            _title(node),
            f"port {', '.join(map(str, node.busy_ports))} is in use, and the spec wants it there",
            "Stop what listens there, or choose another port in the spec.",
        )
        for node in nodes
        if node.busy_ports
    ]
    broken = [link for link in links if link.error]
    by_target: dict[str, list[LinkFacts]] = {}
    for link in broken:
        by_target.setdefault(link.target, []).append(link)
    for target, failed in by_target.items():
        sources = _list([names.get(link.source, link.source) for link in failed])
        found.append(
            Finding(
                Severity.STOP,
                "ports",
                names.get(target, target),
                f"{sources} cannot open a connection to it: {failed[0].error}",
                "Open the firewall between the nodes in both directions, or narrow the ports with launch.ports.",
            )
        )
    if not found and links:
        slowest = max(link.connect_s for link in links)
        found.append(_good("ports", nodes, f"{len(links)} connections opened, the slowest in {slowest * 1000:.1f} ms"))
    return found


def reductions(pairs: Sequence[PairFacts], names: dict[str, str]) -> list[Finding]:
    """An all-reduce between every pair that was measured; a pair far off the median is named."""
    found = []
    good = [pair for pair in pairs if not pair.error]
    for pair in pairs:
        if pair.error:
            found.append(
                Finding(
                    Severity.STOP,
                    "all-reduce",
                    _pair(pair, names),
                    f"{pair.backend} failed: {pair.error}",
                    "Check GLOO/NCCL_SOCKET_IFNAME and NCCL_IB_HCA on both, and the links; NCCL_DEBUG=INFO tells more.",
                )
            )
    if good:
        rate = statistics.median(pair.bandwidth_bytes_per_s for pair in good)
        wait = statistics.median(pair.latency_s for pair in good)
        for pair in good:
            slow = pair.bandwidth_bytes_per_s < SLOW_SHARE * rate
            late = pair.latency_s > max(LATE_FACTOR * wait, LATE_FLOOR_S)
            if slow or late:
                what = f"{pair.backend} {_rate(pair.bandwidth_bytes_per_s)}, {pair.latency_s * 1e6:.0f} us; "
                what += f"the median pair has {_rate(rate)}, {wait * 1e6:.0f} us"
                advice = "Check the cable, the link's speed and its interface; keep TP groups off it."
                found.append(Finding(Severity.WARN, "all-reduce", _pair(pair, names), what, advice))
        if not found:
            backends = "/".join(sorted({pair.backend for pair in good}))
            what = f"{backends} over {len(good)} pairs: median {_rate(rate)}, {wait * 1e6:.0f} us"
            found.append(Finding(Severity.GOOD, "all-reduce", f"{len(good)} pairs", what))
    return found


def disks(nodes: Sequence[NodeFacts], needs: Needs) -> list[Finding]:
    """Weights must be there, or find room."""
    found = []
    for node in nodes:
        if node.missing_sources:
            found.append(
                Finding(
                    Severity.STOP,
                    "weights",
                    _title(node),
                    f"no model at {', '.join(node.missing_sources)}",
                    "`megatoken fetch -f SPEC` copies them from a node that has them; or mount where they are.",
                )
            )
        if needs.weight_bytes and node.cache_free_bytes < needs.weight_bytes + DISK_MARGIN_BYTES:
            found.append(
                Finding(
                    Severity.STOP,
                    "disk",
                    _title(node),
                    f"{node.cache_directory} has {gib(node.cache_free_bytes)} free; the weights need "
                    f"{gib(needs.weight_bytes)}",
                    "Free space, or point HF_HOME and MEGATOKEN_CACHE at a larger disk.",
                )
            )
    if not found and nodes:
        least = min(nodes, key=lambda node: node.cache_free_bytes)
        found.append(_good("disk", nodes, f"at least {gib(least.cache_free_bytes)} free for weights"))
    return found


def shared_memory(nodes: Sequence[NodeFacts], needs: Needs) -> list[Finding]:
    """vLLM's message queues between ranks live in /dev/shm; Ray's object store does too, or else on disk."""
    found = []
    for node in nodes:
        if node.shm_free_bytes < SHM_WARN_BYTES:
            stopping = node.shm_free_bytes < SHM_STOP_BYTES and needs.several_ranks
            severity = Severity.STOP if stopping else Severity.WARN
            what = f"/dev/shm has {node.shm_free_bytes // MIB} MiB free of {node.shm_bytes // MIB} MiB"
            advice = "Start the container with a larger --shm-size (compose: shm_size; Kubernetes: a Memory emptyDir)."
            found.append(Finding(severity, "shared memory", _title(node), what, advice))
    if not found and nodes:
        least = min(node.shm_free_bytes for node in nodes)
        found.append(_good("shared memory", nodes, f"at least {gib(least)} free"))
    return found


def limits(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Open files for every process; locked memory where RDMA pins buffers."""
    found = []
    for node in nodes:
        if node.open_files < FILES_WARN:
            severity = Severity.STOP if node.open_files < FILES_STOP else Severity.WARN
            what = f"a process may open {node.open_files} files"
            found.append(Finding(severity, "limits", _title(node), what, f"Raise `ulimit -n` to {FILES_WARN}."))
        if node.rdma and node.locked_memory >= 0:
            what = f"RDMA is there, but a process may lock only {node.locked_memory // MIB} MiB"
            found.append(Finding(Severity.WARN, "limits", _title(node), what, "Set `ulimit -l unlimited`."))
    if not found and nodes:
        found.append(_good("limits", nodes, f"at least {min(node.open_files for node in nodes)} open files"))
    return found


def _good(check: str, nodes: Sequence[NodeFacts], what: str) -> Finding:
    return Finding(Severity.GOOD, check, f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}", what)


def _title(node: NodeFacts) -> str:
    return f"{node.hostname} ({node.address})" if node.hostname else node.address or node.node


def _pair(pair: PairFacts, names: dict[str, str]) -> str:
    return f"{names.get(pair.first, pair.first)} - {names.get(pair.second, pair.second)}"


def _list(words: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(words[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most} more"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
