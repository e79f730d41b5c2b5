"""`megatoken fetch` over three hosts, each with a disk of its own: whole, cut off, differing, and on a full disk."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deploy.netns.hosts import Host
from deploy.netns.ray_nodes import RayNodes

FETCH = [str(Path(sys.executable).with_name("megatoken")), "fetch"]
MODEL, SMALL = "/tmp/models/m", "/tmp/small"
LARGE_BYTES = 256 << 20  # several times what an object store here holds
SPEC = "models: [{{name: m, engine: vllm, source: {source}, env: {{HF_HOME: /tmp/hf}}}}]\n"
ID, CACHE = "acme/m", "/tmp/hf/hub/models--acme--m"


def digests(host: Host, directory: str = MODEL) -> dict[str, str]:
    root = host.path(directory)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_weights_of_one_host_come_to_all_whatever_happens_on_the_way(
    make_ray_nodes: Callable[[int, int], RayNodes],
) -> None:
    nodes = make_ray_nodes(3, 1)
    head, second, third = nodes.network.hosts
    for name, source in (("spec", MODEL), ("small", SMALL), ("hub", ID)):
        head.path(f"/tmp/{name}.yaml").write_text(SPEC.format(source=source))

    def fetch(*options: str, spec: str = "spec", status: int = 0) -> str:
        command = [*FETCH, "-f", f"/tmp/{spec}.yaml", "--address", nodes.address, *options]
        done = head.run(command, nodes.environment(head), timeout_s=150, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert f"{MODEL}: no node has a file there" in fetch(status=1)

    root = second.path(MODEL)
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "merges.txt").write_text("a b\n")
    (root / "config.json").write_text("{}\n")
    piece = os.urandom(1 << 20)
    with (root / "model.safetensors").open("wb") as file:
        for number in range(LARGE_BYTES >> 20):
            file.write(piece[number:] + piece[:number])
    right = digests(second)

    command = [*FETCH, "-f", "/tmp/spec.yaml", "--address", nodes.address]
    first = head.popen(command, nodes.environment(head), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while sum(path.stat().st_size for path in third.path(MODEL).rglob(".model*.part")) < LARGE_BYTES // 3:
        assert time.monotonic() < deadline, "nothing arrives"
        assert first.poll() is None, "it had ended before it was to be cut off"
        time.sleep(0.02)
    (driver,) = [pid for pid, words in head.processes().items() if f"{FETCH[0]} fetch" in words]
    os.kill(driver, signal.SIGKILL)
    first.wait(20)
    assert not third.path(MODEL).joinpath("model.safetensors").exists(), "no engine sees half a file"

    said = fetch()
    assert f"{MODEL}: 3 files, " in said
    copied = float(said.partition("on 3 nodes; ")[2].split(" MiB copied")[0])
    assert copied < 0.8 * 2 * (LARGE_BYTES >> 20), "what had come was taken again"
    assert digests(head) == digests(third) == right
    assert "nothing to copy" in fetch()

    third.path(f"{MODEL}/config.json").write_text('{"another": 1}\n')
    assert f"{MODEL}/config.json: node" in fetch(status=1)
    assert digests(head)["config.json"] == right["config.json"]
    fetch("--from", second.address)
    assert digests(third) == right
    assert "--from: 'nobody' is not allowed; a node of the cluster: " in fetch("--from", "nobody", status=1)

    head.path(SMALL).mkdir()
    head.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", SMALL])
    second.path(SMALL).mkdir()
    (second.path(SMALL) / "model.safetensors").write_bytes(piece * 64)
    refused = fetch(spec="small", status=1)
    assert f"node {head.address}: {SMALL} needs 64.0 MiB more, and 16.0 MiB is free there" in refused
    assert not third.path(SMALL).exists(), "nothing was begun"

    snapshot = second.path(f"{CACHE}/snapshots/c0ffee")
    snapshot.mkdir(parents=True)
    second.path(f"{CACHE}/blobs").mkdir()
    second.path(f"{CACHE}/blobs/1").write_bytes(piece)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    second.path(f"{CACHE}/refs").mkdir()
    second.path(f"{CACHE}/refs/main").write_text("c0ffee")
    assert f"{CACHE}@main: 2 files, 1.0 MiB, on 3 nodes" in fetch(spec="hub")
    assert set(digests(third, CACHE)) == {"refs/main", "snapshots/c0ffee/model.safetensors"}
