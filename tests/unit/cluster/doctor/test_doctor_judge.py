"""Each check of the doctor as a table: facts in, findings out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.cluster.doctor.facts import Finding, LinkFacts, Needs, NodeFacts, PairFacts, Severity
from megatoken.cluster.doctor.judge import GIB, MIB, judge, stops

VERSIONS = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "vllm": "0.32.0",
    "torch": "2.13.0",
    "megatoken": "0.1.0",
    "driver": "6.1",
}
MANY = Needs(multinode=True)


def healthy(number: int) -> NodeFacts:
    return NodeFacts(
        node=f"id{number}",
        address=f"10.0.0.{number}",
        hostname=f"h{number}",
        hostname_addresses=(f"10.0.0.{number}",),
        interface="eth0",
        versions=VERSIONS,
        accelerators=8,
        expected_gpus=8,
        shm_bytes=64 * GIB,
        shm_free_bytes=60 * GIB,
        cache_directory="/cache",
        cache_free_bytes=500 * GIB,
        open_files=1_048_576,
    )


NODES = (healthy(1), healthy(2), healthy(3))
LINKS = tuple(LinkFacts(f"id{a}", f"id{b}", 0.001) for a in (1, 2, 3) for b in (1, 2, 3) if a != b)
PAIRS = tuple(PairFacts(f"id{a}", f"id{b}", "gloo", 1e-4, 1e9) for a, b in ((1, 2), (1, 3), (2, 3)))


def bad(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is not Severity.GOOD]


def test_a_healthy_cluster_has_one_good_finding_a_check() -> None:
    findings = judge(NODES, LINKS, PAIRS, MANY)
    assert not bad(findings)
    assert not stops(findings)
    checks = [finding.check for finding in findings]
    assert sorted(checks) == sorted(set(checks))
    assert set(checks) == {
        "versions", "devices", "clock", "address", "ports", "all-reduce", "disk", "shared memory", "limits",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "severity", "check", "said"),
    [
        ({"versions": VERSIONS | {"ray": "2.59.0"}}, "stop", "versions", "ray differs from 2.60.0, which 2 of 3"),
        ({"versions": VERSIONS | {"driver": "6.0"}}, "warn", "versions", "driver differs from 6.1"),
        ({"versions": {k: v for k, v in VERSIONS.items() if k != "vllm"}}, "stop", "versions", "vllm is not installed"),
        ({"accelerators": 7}, "stop", "devices", "Ray counts 8 GPUs, but the driver shows 7"),
        ({"expected_gpus": 7}, "warn", "devices", "the driver shows 8 GPUs, but Ray uses 7"),
        ({"clock_offset_s": 3.0, "clock_error_s": 0.01}, "warn", "clock", "3.0 s ahead of the others"),
        ({"clock_offset_s": -900.0, "clock_error_s": 0.01}, "stop", "clock", "900.0 s behind the others"),
        ({"hostname_addresses": ("127.0.1.1",)}, "warn", "address", "resolves to 127.0.1.1 instead of 10.0.0.3"),
        ({"hostname_addresses": ()}, "warn", "address", "resolves to nothing"),
        ({"interface": ""}, "stop", "address", "no interface of it carries its cluster address"),
        ({"address": "127.0.0.1"}, "stop", "address", "which no other node can reach"),
        ({"busy_ports": (8000,)}, "stop", "ports", "port 8000 is in use"),
        ({"missing_sources": ("/models/x",)}, "stop", "weights", "no model at /models/x"),
        ({"shm_bytes": 64 * MIB, "shm_free_bytes": 63 * MIB}, "stop", "shared memory", "63 MiB free of 64 MiB"),
        ({"shm_free_bytes": 512 * MIB}, "warn", "shared memory", "512 MiB free"),
        ({"open_files": 1024}, "stop", "limits", "may open 1024 files"),
        ({"open_files": 20_000}, "warn", "limits", "may open 20000 files"),
        ({"rdma": True, "locked_memory": 64 * 1024}, "warn", "limits", "may lock only 0 MiB"),
        ({"error": "no answer in time"}, "stop", "reach", "could not be examined: no answer in time"),
    ],
)
def test_one_ill_node_is_one_finding_that_names_it_and_what_to_do(
    change: dict[str, object], severity: str, check: str, said: str
) -> None:
    ill = replace(NODES[2], **change)  # type: ignore[arg-type]
    (finding,) = bad(judge((*NODES[:2], ill), LINKS, PAIRS, MANY))
    assert (finding.severity, finding.check) == (severity, check)
    assert said in finding.what
    assert "h3" in finding.subject
    assert finding.do.endswith(".")
    assert stops((finding,)) == (severity == "stop")


def test_little_shared_memory_stops_only_where_ranks_talk_over_it() -> None:
    small = replace(NODES[2], shm_bytes=64 * MIB, shm_free_bytes=63 * MIB)
    for several, severity in ((True, "stop"), (False, "warn")):
        (finding,) = bad(judge((*NODES[:2], small), LINKS, PAIRS, replace(MANY, several_ranks=several)))
        assert finding.severity == severity


def test_a_skew_within_the_measurements_error_is_not_held_against_a_node() -> None:
    slow_answer = replace(NODES[2], clock_offset_s=2.0, clock_error_s=1.9)
    assert not bad(judge((*NODES[:2], slow_answer), LINKS, PAIRS, MANY))


def test_a_disk_without_room_for_the_weights_stops() -> None:
    full = replace(NODES[2], cache_free_bytes=10 * GIB)
    needs = Needs(weight_bytes=140 * GIB, multinode=True)
    (finding,) = bad(judge((*NODES[:2], full), LINKS, PAIRS, needs))
    assert finding.what == "/cache has 10.0 GiB free; the weights need 140.0 GiB"


def test_a_node_that_others_cannot_reach_is_named_once_with_its_sources() -> None:
    links = tuple(replace(link, error="10.0.0.2:40000: timed out") if link.target == "id2" else link for link in LINKS)
    (finding,) = bad(judge(NODES, links, PAIRS, MANY))
    assert finding.subject == "h2 (10.0.0.2)"
    assert finding.what == "h1 (10.0.0.1), h3 (10.0.0.3) cannot open a connection to it: 10.0.0.2:40000: timed out"


def test_one_direction_alone_is_enough_to_stop() -> None:
    links = (replace(LINKS[0], error="refused"), *LINKS[1:])
    assert stops(judge(NODES, links, PAIRS, MANY))


@pytest.mark.parametrize(
    ("pair", "severity", "said"),
    [
        (replace(PAIRS[0], error="Connection reset by peer"), "stop", "gloo failed: Connection reset by peer"),
        (replace(PAIRS[0], bandwidth_bytes_per_s=2e8), "warn", "gloo 0.20 GB/s"),
        (replace(PAIRS[0], latency_s=0.2), "warn", "200000 us"),
    ],
)
def test_a_failed_or_slow_pair_is_named(pair: PairFacts, severity: str, said: str) -> None:
    (finding,) = bad(judge(NODES, LINKS, (pair, *PAIRS[1:]), MANY))
    assert finding.severity == severity
    assert finding.subject == "h1 (10.0.0.1) - h2 (10.0.0.2)"
    assert said in finding.what


def test_a_single_machine_may_use_loopback_and_any_name() -> None:
    alone = replace(NODES[0], address="127.0.0.1", hostname_addresses=(), interface="lo")
    assert not bad(judge((alone,), (), (), Needs()))


def test_vllm_may_be_missing_where_nothing_uses_it() -> None:
    without = [replace(node, versions={k: v for k, v in VERSIONS.items() if k != "vllm"}) for node in NODES]
    assert not bad(judge(without, LINKS, PAIRS, Needs(uses_vllm=False, multinode=True)))
    assert stops(judge(without, LINKS, PAIRS, MANY))


def test_the_worst_comes_first() -> None:
    ill = replace(NODES[2], open_files=20_000, interface="")
    severities = [finding.severity for finding in judge((*NODES[:2], ill), LINKS, PAIRS, MANY)]
    assert severities == sorted(severities, key=list(Severity).index)
