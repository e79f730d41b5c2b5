"""Makes docs/images/top.svg from a real run: python -m tests.support.pictures [FILE]

Starts a cluster of simulated engines (which the picture says), keeps it busy, and has `megatoken top` draw itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.clusters import running
from tests.support.processes import REPOSITORY

WATCH_S = "45"
SIZE = "100x28"


def model(name: str, replicas: int, rate: float) -> dict[str, object]:
    engine = {"decode_tokens_per_s": rate, "max_running": 32}
    return {"name": name, "engine": "simulated", "replicas": replicas, "simulated": engine}


SPEC = {
    "cluster": "demo",
    "control": {"port": 0},
    "routers": {"port": 0},
    "edge": {"count": 0},
    "models": [model("chat", 3, 1500), model("code", 2, 900)],
}


def main() -> None:
    """Writes the picture."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs" / "images" / "top.svg"
    with tempfile.TemporaryDirectory() as directory, running(Path(directory), SPEC) as cluster:
        command = [sys.executable, "-m", "tests.support.traffic", cluster.address("router"), "chat", "code"]
        traffic = subprocess.Popen(command, cwd=REPOSITORY)
        try:
            print(cluster.run("top", "--svg", str(path.absolute()), "--after", WATCH_S, "--size", SIZE), end="")
        finally:
            traffic.kill()
            traffic.wait()


if __name__ == "__main__":
    main()
