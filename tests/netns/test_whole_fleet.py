"""One fleet with everything on, as a user launches it, while its parts die one after the other: `make fleet`.

Three hosts; mutual TLS, API keys, agents, a router and an edge on each; real vLLM: SmolLM2 with two stages, and the
tiny Llama with two stages of two, whose weights are on one host at first. `megatoken fetch` and `up` over ssh; the
official openai client streams through the edges all the time, greedy and in float32, so that every answer is known.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.hosts import Host, Network
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.view.top.text import compact
from tests.netns.fleet import NEXT, WEIGHTS, Fleet, tagged
from tests.netns.fleet_clients import TOKENS, Clients, answers_of_transformers
from tests.netns.sshd import MISSING
from tests.support.prometheus import MISSING as NO_PROMETHEUS
from tests.support.prometheus import Server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.fleet,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

TOLD_S = 5.0  # from Ray's knowing to `status` saying it
DETECTED_S = 15.0  # Ray's own health checks
HANG_S = 10.0
CHECKED_S = 60.0  # a device: a load, and an all-reduce
GONE_S = 15.0  # what a dead replica leaves on any host
SERVED_S = 120.0  # a replacement's engine
RETURNED_S = 150.0  # a node that comes back, and what stood there
PHASES = ["place", "start", "import", "verify", "engine", "weights", "compile", "warm up"]
KINDS = ["edge", "router", "worker"]
LAST_TOKENS = 8  # on their way in a worker that is killed: it has a stream or two


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with Network.create(3) as network:
        made = Fleet(network, tmp_path_factory.mktemp("fleet"))
        with made.collector:
            try:
                made.up()
                yield made
            finally:
                made.down()


@pytest.fixture(scope="module")
def clients(fleet: Fleet) -> Iterator[Clients]:
    """They ask from the first test to the last."""
    with Clients(fleet) as started:
        yield started


def lose(fleet: Fleet, replica: str, act: Callable[[], None], told_s: float = TOLD_S) -> str:
    """Does harm to a replica; why `status` says that it failed, once no process of it is left anywhere."""
    act()
    rows = fleet.wait(lambda status: replica in fleet.failed(status), told_s).replicas
    deadline = time.monotonic() + GONE_S
    while left := [
        (host.name, part, tagged(fleet, host, replica, part))
        for host in fleet.network.hosts
        for part in ("worker", "engine", "rank")
        if tagged(fleet, host, replica, part)
    ]:
        assert time.monotonic() < deadline, f"of {replica} still run: {left}"
        time.sleep(0.2)
    return next(row.reason for row in rows if row.replica == replica)


def test_every_part_is_there_and_both_models_answer(fleet: Fleet, clients: Clients) -> None:
    status = fleet.status()
    kinds = [row.kind for row in status.processes]
    assert sorted(set(kinds)) == ["agent", "edge", "router"]
    assert all(kinds.count(kind) == 3 for kind in ("agent", "edge", "router"))
    (tiny,) = fleet.ready("tiny", 1)
    assert len(tiny.ranks) == 4
    assert len(fleet.hosts_of(tiny)) == 2
    assert clients.answers("tiny") == answers_of_transformers()
    clients.answered(2)


def test_a_request_that_asks_for_it_is_traced_from_the_edge_to_the_ranks_worker(fleet: Fleet, clients: Clients) -> None:
    at_edge, at_router, at_worker = clients.trace("tiny")
    assert [one.service.removeprefix("megatoken-") for one in (at_edge, at_router, at_worker)] == KINDS
    assert (at_router.parent, at_worker.parent) == (at_edge.span, at_router.span)
    (tiny,) = fleet.ready("tiny", 1)
    assert at_worker.attributes["megatoken.replica"] == tiny.replica
    assert at_worker.attributes["gen_ai.usage.output_tokens"] == TOKENS["tiny"]
    assert len(fleet.collector.spans()) == 3, "no other request is traced"


def test_rays_token_is_for_its_owner_and_on_no_command_line_and_the_fleet_is_up_once(fleet: Fleet) -> None:
    (token,) = {path.read_text() for host in fleet.network.hosts for path in fleet.token_files(host)}
    for host in fleet.network.hosts:
        (path,) = fleet.token_files(host)
        assert path.stat().st_mode & 0o777 == 0o600
        assert token not in " ".join(host.processes().values())
    with pytest.raises(CommandError, match="it is up already"):
        fleet.megatoken("up", "-f", str(fleet.directory / "spec.yaml"))


def test_replicas_scale_up_and_one_spans_two_hosts(fleet: Fleet, clients: Clients) -> None:
    fleet.scale("smol", 2)
    replicas = fleet.ready("smol", 2, SERVED_S)
    assert 2 in {len(fleet.hosts_of(replica)) for replica in replicas}
    clients.answered(2)


def test_a_killed_rank_is_named_and_its_replica_replaced(fleet: Fleet, clients: Clients) -> None:
    (replica,) = fleet.ready("tiny", 1)
    host = fleet.hosts_of(replica)[-1]
    rank = tagged(fleet, host, replica.replica, "rank")[-1]
    reason = lose(fleet, replica.replica, lambda: os.kill(rank, signal.SIGKILL))
    assert "rank 3" in reason
    assert host.address in reason
    fleet.ready("tiny", 1, SERVED_S)
    clients.answered(1)


def test_a_frozen_rank_is_named_with_its_node_and_replaced(fleet: Fleet, clients: Clients) -> None:
    replica = next(row for row in fleet.ready("smol", 2) if len(fleet.hosts_of(row)) == 2)
    host = fleet.hosts_of(replica)[-1]
    rank = tagged(fleet, host, replica.replica, "rank")[-1]
    reason = lose(fleet, replica.replica, lambda: os.kill(rank, signal.SIGSTOP), 2 * HANG_S + TOLD_S)
    assert "is stopped" in reason or "lost" in reason  # whichever sees it first: our probe, or Ray's own check
    assert "rank 1" in reason
    assert host.address in reason
    fleet.ready("smol", 2, SERVED_S)
    assert not Path(f"/proc/{rank}").exists()
    clients.answered(1)


def test_a_killed_engine_core_and_a_killed_worker_are_replaced(fleet: Fleet, clients: Clients) -> None:
    """One after the other: the second while the first is being replaced, so that for a while no replica serves."""
    for replica, part in zip(fleet.ready("smol", 2), ("engine", "worker"), strict=True):
        victim = tagged(fleet, fleet.hosts_of(replica)[0], replica.replica, part)[0]
        fleet.killed |= {replica.replica} if part == "worker" else set()
        assert lose(fleet, replica.replica, functools.partial(os.kill, victim, signal.SIGKILL))
    fleet.ready("smol", 2, SERVED_S)
    clients.answered(1)


def test_a_cordoned_device_is_left_and_returns_once_a_check_with_another_host_passes(
    fleet: Fleet, clients: Clients
) -> None:
    """Every device is in use, so the replica there goes without a successor; then one is enough."""
    replica = fleet.ready("smol", 2)[0]
    host, rank = fleet.hosts_of(replica)[0], replica.ranks[0]
    device = f"{host.address}:{rank.rpartition(' ')[2]}"
    assert replica.replica in fleet.megatoken("cordon", device, "--reason", "its fan is loud")
    fleet.scale("smol", 1)
    (kept,) = fleet.ready("smol", 1, SERVED_S)
    assert kept.replica != replica.replica
    (out,) = [text for row in fleet.status().nodes for text in row.devices_out]
    assert "cordoned: its fan is loud" in out
    fleet.megatoken("cordon", device, "--undo")
    fleet.wait(lambda status: not any(row.devices_out for row in status.nodes), CHECKED_S)
    assert f"{device}: back in service" in fleet.events()
    clients.answered(1)


@pytest.mark.parametrize("program", ["router", "router.edge"])
def test_a_killed_router_or_edge_is_started_again(fleet: Fleet, clients: Clients, program: str) -> None:
    host = fleet.network.hosts[1]
    kind = program.rpartition(".")[2]
    (victim,) = fleet.pids(host, f"-m megatoken.{program} ")
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + SERVED_S
    while not (now := [pid for pid in fleet.pids(host, f"-m megatoken.{program} ") if pid != victim]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    fleet.wait(lambda status: all(row.state == "READY" for row in status.processes if row.kind == kind), SERVED_S)
    assert len(now) == 1
    clients.answered(1)


def test_a_killed_controller_returns_and_nothing_else_moves(fleet: Fleet, clients: Clients) -> None:
    before = {row.replica for row in fleet.status().replicas if row.state == "READY"}
    (controller,) = fleet.pids(fleet.head, "ray::ControllerActor")
    os.kill(controller, signal.SIGKILL)
    clients.answered(1)
    after = fleet.wait(lambda status: any(row.state == "READY" for row in status.replicas), 60.0)
    assert {row.replica for row in after.replicas if row.state == "READY"} == before


def exchanged(fleet: Fleet, models: Iterable[str], act: Callable[[], None]) -> None:
    """Waits until the only replica of each of these models has been exchanged for another."""
    before = {row.replica for model in models for row in fleet.ready(model, 1)}
    act()
    fleet.wait(
        lambda status: not before & {row.replica for row in status.replicas if row.state == "READY"}, 2 * SERVED_S
    )
    for model in models:
        (replica,) = fleet.ready(model, 1, 2 * SERVED_S)
        assert [entry.phase for entry in replica.start_phases] == PHASES


def test_a_rolling_update_exchanges_both_models_also_where_a_second_replica_has_no_room(
    fleet: Fleet, clients: Clients
) -> None:
    processes = {row.name for row in fleet.status().processes}
    for model in TOKENS:
        fleet.change(model, max_running=6)
    exchanged(fleet, TOKENS, fleet.apply)
    assert {row.name for row in fleet.status().processes} == processes, "no router or edge is exchanged for a model"
    clients.answered(1)


@pytest.mark.skipif(not os.environ.get("MEGATOKEN_WHOLE_FLEET"), reason="takes three minutes more; `make fleet` has it")
def test_an_update_to_weights_that_are_damaged_on_one_host_goes_back_to_the_old_ones(
    fleet: Fleet, clients: Clients
) -> None:
    """There is no room for a second replica: the old one went first. The new weights had met a full disk, too."""
    host = fleet.network.hosts[2]
    fleet.change("tiny", source=NEXT, update={"attempts": 1})
    host.path(NEXT).mkdir()
    host.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", NEXT])
    with pytest.raises(CommandError, match=rf"node {host.address}: {NEXT} needs .* and 1.0 MiB is free there"):
        fleet.fetch()
    host.run(["umount", NEXT])
    fleet.fetch()
    with host.path(f"{NEXT}/model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"!")
    exchanged(fleet, ["tiny"], fleet.apply)
    said = fleet.events()
    assert f"{NEXT}/model.safetensors" in said
    assert f" on {host.name}" in said
    assert "rolled back" in said
    assert fleet.source("tiny") == WEIGHTS
    fleet.change("tiny", source=WEIGHTS)
    clients.answered(1)


def away(fleet: Fleet, host: Host, act: Callable[[], None]) -> set[str]:
    """Takes a node away; the replicas that stood on it, all of them said to have failed."""
    stood = {row.replica for row in fleet.status().replicas if row.state == "READY" and host in fleet.hosts_of(row)}
    fleet.killed |= stood
    act()
    fleet.wait(lambda status: stood <= fleet.failed(status), DETECTED_S + TOLD_S)
    return stood


def test_a_node_whose_ray_was_killed_is_used_again(fleet: Fleet, clients: Clients) -> None:
    stood = away(fleet, fleet.network.hosts[2], lambda: fleet.crash_ray(fleet.network.hosts[2]))
    assert stood
    fleet.ready("smol", 1, RETURNED_S)
    fleet.ready("tiny", 1, RETURNED_S)
    clients.answered(1)


def test_a_node_that_was_cut_off_is_used_again(fleet: Fleet, clients: Clients) -> None:
    host = fleet.network.hosts[2]
    stood = away(fleet, host, lambda: host.link(up=False))
    blocked = fleet.wait(lambda status: bool(fleet.blocked(status, "tiny")), DETECTED_S)
    assert "node" in fleet.blocked(blocked, "tiny")
    host.link(up=True)
    assert stood
    fleet.ready("smol", 1, RETURNED_S)
    fleet.ready("tiny", 1, RETURNED_S)
    clients.answered(1)


def test_no_request_was_lost_or_answered_otherwise(fleet: Fleet, clients: Clients) -> None:
    report = clients.stop()
    assert report.wrong == []
    assert report.lost == []
    assert min(report.answers.values()) > 5, report.answers
    assert not report.refused["smol"], f"{report.refused['smol']}\n{fleet.events()}"
    # Only while the cable was out, and in the planner's words.
    told = Counter(report.refused["tiny"])
    others = [text for text in told if "model: 'tiny' has no replica: " not in text or "node" not in text]
    assert not others, f"{told}\n{fleet.events()}"


@dataclass(frozen=True)
class Counts:
    """Tokens so far, as Prometheus has them, of the processes that live."""

    delivered: int  # the routers' ledgers
    generated: int  # the workers' own: sent
    made: int  # by engines for requests
    dropped: int  # of them: nobody waited for their request any more
    probes: int  # made for probes instead
    vllm: int  # what the engine cores handed over

    @classmethod
    def at_rest(cls, prometheus: Server, everybody: int) -> Counts:
        """Once they stand still; a process whose scrape was late is missing from a sum."""
        worker = [f"megatoken_worker_{name}_tokens" for name in ("generated", "made", "dropped", "probe")]
        names = ["megatoken_router_delivered_tokens", *worker, "vllm:generation_tokens"]
        deadline, last, since_s, seen = time.monotonic() + 60, None, 0.0, []
        while True:
            found = [prometheus.query(f"sum({{__name__='{name}_total'}})") for name in names]
            whole = all(found) and len(prometheus.up()) == everybody
            now = cls(*(int(float(series[0]["value"][1])) for series in found)) if whole else None
            seen.append(now)
            if now is None or last is None or (now.delivered, now.made) != (last.delivered, last.made):
                last, since_s = now, time.monotonic()
            still = time.monotonic() - since_s > 4.0  # the scrape's second and the counters' own, twice
            if now is not None and still and now.vllm == now.made + now.probes:  # else in the middle of a probe
                return now
            assert time.monotonic() < deadline, f"they do not stand still: {seen[-40:]}"
            time.sleep(0.3)


@pytest.mark.skipif(bool(NO_PROMETHEUS), reason=NO_PROMETHEUS)
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed (Debian: apt-get install tmux)")
def test_at_rest_clients_routers_workers_and_vllm_count_the_same(
    fleet: Fleet, clients: Clients, tmp_path: Path
) -> None:
    clients.stop()
    tls = {"ca_file": fleet.authority.ca_file, "cert_file": fleet.cert_file, "key_file": fleet.key_file}
    named = {name: str(path) for name, path in tls.items()}
    prometheus = Server(tmp_path / "prometheus", fleet.status().metrics_address, named)
    try:
        ready = sum(row.state == "READY" for row in fleet.status().replicas)
        everybody = len(fleet.status().processes) + ready + 1  # the controller itself
        fleet.wait(lambda _: len(prometheus.up()) == everybody, 60)
        before = Counts.at_rest(prometheus, everybody)
        received = clients.ask_each()
        after = Counts.at_rest(prometheus, everybody)
        by_replica = {
            series["metric"]["replica"]: int(float(series["value"][1]))
            for series in prometheus.query("megatoken_worker_generated_tokens_total")
        }
    finally:
        prometheus.stop()
    assert after.delivered - before.delivered == received
    assert after.generated - before.generated == received
    assert after.made - before.made == received
    assert after.vllm == after.made + after.probes
    assert after.made == after.generated + after.dropped

    status = fleet.status()
    assert {row.replica: row.generated_tokens for row in status.replicas if row.state == "READY"} == by_replica
    fleet.top(*(compact(float(tokens)) for tokens in by_replica.values()))
    rows = {(row.kind, row.name): row.workers for row in status.throughput.rows}
    assert {name: rows["replica", name].generated_tokens for name in by_replica} == by_replica
    files = fleet.incarnations()
    counted = sum(totals.generated_tokens for totals in files.values())
    on_nodes = sum(totals.generated_tokens for (kind, _), totals in rows.items() if kind == "node")
    assert status.throughput.complete
    assert rows["cluster", "cluster"].generated_tokens == on_nodes == counted


def test_the_report_tells_what_the_hour_cost(fleet: Fleet, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    text = fleet.megatoken("report", "--since", "1h", "--price", "cpu=0.1", "--html", str(page))
    print(text)
    assert "ready after" in text
    assert "failed: " in text
    for model in TOKENS:
        (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{model} ") and " cpu " in line]
        assert int(row[1].replace(",", "")) > 0, "generated tokens"
        assert float(row[-1].replace(",", "")) > 0.0, "cost of a million"
    assert page.read_text().count("<polyline") == 2 * len(TOKENS)


def test_what_an_engine_made_was_delivered_or_dropped_but_for_the_killed_ones_last_frames(fleet: Fleet) -> None:
    files = fleet.incarnations()
    missing = {
        replica: totals.made_tokens - totals.generated_tokens - totals.dropped_tokens
        for replica, totals in files.items()
    }
    assert fleet.killed < set(missing)
    assert {replica for replica, tokens in missing.items() if tokens} <= fleet.killed, missing
    assert all(0 <= tokens <= LAST_TOKENS for tokens in missing.values()), missing


def test_a_node_without_power_blocks_what_needs_it_and_the_rest_goes_on(fleet: Fleet) -> None:
    """Nobody but an operator brings it back: nothing of ours starts with the machine in a launch over ssh."""
    dark = fleet.network.hosts[2]
    with Clients(fleet, ["smol"]) as clients:
        assert away(fleet, dark, dark.power_off)
        blocked = fleet.wait(lambda status: bool(fleet.blocked(status, "tiny")), DETECTED_S)
        assert "node" in fleet.blocked(blocked, "tiny")
        fleet.ready("smol", 1, SERVED_S)
        clients.answered(1)
        report = clients.stop()
    assert (report.wrong, report.lost) == ([], [])
