"""An sshd on a host of a test network, with keys of the test's own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from deploy.netns.hosts import Host

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
MISSING = "" if Path(SSHD).exists() and shutil.which("ssh-keygen") else "openssh-server is not installed"
PORT = 2222
STATE_DIR = "/tmp/state"  # of `megatoken` on a host: its own, and not that of the machine's user

PACKAGES = "/tmp/packages"  # looked at first by a host's Python; a test may put another release there


def keygen(name: str, directory: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True, timeout=20)


def public(key: Path) -> str:
    return " ".join(key.with_suffix(".pub").read_text().split()[:2])


def start_sshd(host: Host, keys: Path) -> None:
    """An sshd with its own key in the host; its files lie in the host's own /tmp."""
    home = host.path("/tmp/sshd")
    home.mkdir(mode=0o700)
    shutil.copy(keys / host.name, home / "key")
    shutil.copy(keys / "client.pub", home / "authorized")
    (home / "key").chmod(0o600)
    config = (
        f"Port {PORT}\nListenAddress {host.address}\nHostKey /tmp/sshd/key\nAuthorizedKeysFile /tmp/sshd/authorized\n"
        f"SetEnv MEGATOKEN_STATE_DIR={STATE_DIR} PYTHONPATH={PACKAGES}\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    (home / "config").write_text(config)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation directory
    host.run([SSHD, "-f", "/tmp/sshd/config", "-E", "/tmp/sshd/log"])
