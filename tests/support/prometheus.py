"""Debian's Prometheus on this machine, scraping a cluster of a test."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import REPOSITORY

CONFIGURATION = REPOSITORY / "deploy" / "prometheus"
MISSING = (
    ""
    if shutil.which("prometheus") and shutil.which("promtool")
    else "prometheus is not installed (Debian: apt-get install prometheus)"
)


class Server:
    """A Prometheus that scrapes one cluster, by the configuration that users get."""

    def __init__(self, directory: Path, discovery: str, tls: dict[str, str] | None = None) -> None:
        """`discovery`: HOST:PORT of the controller's /sd. `tls`: ca_file, cert_file and key_file for edges."""
        directory.mkdir()
        config = yaml.safe_load((CONFIGURATION / "prometheus.yaml").read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        discoveries = config["scrape_configs"][0]["http_sd_configs"]
        discoveries[0] |= {"url": f"http://{discovery}/sd", "refresh_interval": "1s"}
        if tls is not None:
            config["scrape_configs"][0]["tls_config"] = tls
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            shutil.copy(CONFIGURATION / name, directory)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={directory / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ask(self, path: str, **parameters: str) -> Any:
        """`data` of an API answer."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def up(self) -> set[str]:
        """Processes whose last scrape succeeded; none before Prometheus itself serves."""
        try:
            return {series["metric"]["process"] for series in self.query("up == 1")}
        except urllib.error.URLError:
            return set()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
