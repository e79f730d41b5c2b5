"""An agent that cannot start says why in one sentence and ends."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def start_badly(tmp_path: Path, **config: object) -> subprocess.CompletedProcess[str]:
    facts = {"node": "n", "controllers": ["127.0.0.1:1"], "counters_dir": str(tmp_path / "counters"), **config}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    command = [sys.executable, "-m", "megatoken.worker.throughput", "--config", str(tmp_path / "config.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_wrong_backend_for_the_device_is_one_clear_error(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a device that nccl can use")
    done = start_badly(tmp_path, backend="nccl")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "python -m megatoken.worker.throughput: backend: 'nccl' is not usable on this node (usable: auto, gloo); "
        "nccl needs a CUDA or ROCm device and a torch built for it"
    )


@pytest.mark.parametrize("field", ["port", "store_port"])
def test_a_port_in_use_is_named(tmp_path: Path, field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = start_badly(tmp_path, **{field: taken.getsockname()[1]})
    assert done.returncode == 1
    assert f"{field}: {taken_port(done.stderr)} on 127.0.0.1 cannot be used" in done.stderr


def taken_port(text: str) -> str:
    found = re.search(r"port: (\d+) on", text)
    assert found, text
    return found[1]


def test_a_config_that_does_not_fit_names_the_field(tmp_path: Path) -> None:
    done = start_badly(tmp_path, controllers=["nowhere"], tick_s=0)
    assert done.returncode == 2
    assert "controllers: Value error, 'nowhere' is not host:port" in done.stderr
    assert "tick_s: Input should be greater than or equal to 0.05" in done.stderr
