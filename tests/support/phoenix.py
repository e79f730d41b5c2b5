"""Arize Phoenix on this machine: an OpenTelemetry collector of others, which keeps traces and shows them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

COMMAND: Final = shutil.which(os.environ.get("MEGATOKEN_PHOENIX", "phoenix")) or ""
MISSING: Final = (
    "" if COMMAND else "Arize Phoenix is not installed (pipx install arize-phoenix, or MEGATOKEN_PHOENIX=PATH)"
)
START_S = 120.0


class Phoenix:
    """Serves while it is open: OTLP over gRPC on `endpoint`, its own API over HTTP."""

    def __init__(self, directory: Path) -> None:
        self._http, otlp = (_free_port() for _ in range(2))
        self.endpoint = f"http://127.0.0.1:{otlp}"
        self._log = directory / "phoenix.log"
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "PHOENIX_WORKING_DIR": str(directory / "phoenix"),
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_PORT": str(self._http),
            "PHOENIX_GRPC_PORT": str(otlp),
            "PHOENIX_TELEMETRY_ENABLED": "false",
        }

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [COMMAND, "serve"], env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._until(lambda: self._get("healthz") is not None, START_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def spans(self, count: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """What it kept, oldest first, once there are so many."""

        def kept() -> list[dict[str, Any]]:
            answer = self._get("v1/projects/default/spans")
            return json.loads(answer)["data"] if answer else []

        self._until(lambda: len(kept()) >= count, timeout_s)
        return sorted(kept(), key=lambda span: span["start_time"])

    def _until(self, met: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not met():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise AssertionError(f"Phoenix: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def _get(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/{path}", timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return None if error.code == 404 else error.read().decode()
        except OSError:
            return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
