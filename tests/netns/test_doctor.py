"""The doctor on two real hosts: a healthy pair, a name that leads to loopback, a port in use, a wrong token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deploy.netns.ray_nodes import RayNodes

DOCTOR = [str(Path(sys.executable).with_name("megatoken")), "doctor"]
LISTENER = """
import socket, sys
listener = socket.create_server(("", 7701))
print("ready", flush=True)
sys.stdin.read()
"""
SPEC = "models: [{name: m, engine: simulated}]\n"


def test_the_doctor_examines_every_node_and_pair(make_ray_nodes: Callable[[int, int], RayNodes]) -> None:
    nodes = make_ray_nodes(2, 1)
    head, other = nodes.network.hosts
    head.path("/tmp/spec.yaml").write_text(SPEC)
    doctor = [*DOCTOR, "-f", "/tmp/spec.yaml", "--address", nodes.address, "--json"]

    healthy = head.run(doctor, nodes.environment(head), timeout_s=150, check=False)
    shown = json.loads(healthy.stdout)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert not shown["stops"]
    assert {node["address"] for node in shown["nodes"]} == {head.address, other.address}
    (pair,) = shown["pairs"]
    assert pair["backend"] == "gloo"
    assert pair["error"] == ""
    assert 0 < pair["latency_s"] < 1
    assert pair["bandwidth_bytes_per_s"] > 1e6
    assert not [finding for finding in shown["findings"] if finding["check"] == "address" and finding["do"]]

    hosts_file = other.directory / "hosts"
    hosts_file.write_text(hosts_file.read_text().replace(f"{other.address} {other.name}", f"127.0.1.1 {other.name}"))
    holder = head.popen([sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"ready\n"
        ill = head.run([*doctor, "--no-all-reduce"], nodes.environment(head), timeout_s=120, check=False)
    finally:
        holder.communicate(timeout=20)  # its stdin ends, and it does too
    found = json.loads(ill.stdout)["findings"]
    assert ill.returncode == 1, "a port in use stops a launch"
    assert any("port 7701 is in use" in finding["what"] for finding in found if finding["severity"] == "stop")
    (trap,) = [finding for finding in found if finding["check"] == "address" and finding["severity"] == "warn"]
    assert f"its name {other.name} resolves to 127.0.1.1 instead of {other.address}" in trap["what"]

    stranger = {**nodes.environment(head), "RAY_AUTH_TOKEN": "0" * 64}
    refused = head.run(doctor, stranger, timeout_s=120, check=False)
    assert refused.returncode == 1
    assert f"the Ray cluster at {nodes.address} cannot be used" in refused.stderr
    assert "Traceback" not in refused.stderr
