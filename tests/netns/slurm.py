"""Slurm on the hosts of a test network: Debian's munged and slurmctld, and a slurmd on each host. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from deploy.netns.hosts import Host, Network

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "scancel")
MISSING = ", ".join(name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None)
START_S = 30.0

CONFIG = """\
ClusterName=lab
SlurmctldHost={head}({address})
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CGROUPS = """\
mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/freezer
mount -t cgroup -o freezer freezer /sys/fs/cgroup/freezer
exec slurmd -D -N "$1" -f "$2"
"""


class SlurmHosts:
    """A context: Slurm serves inside. `environment` is that of whoever submits, on a host or on this machine."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.directory = network.directory / "slurm"  # seen from every host, which /tmp is not
        self.config = self.directory / "slurm.conf"
        self.work = self.directory / "work"
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM", "RAY_", "MEGATOKEN_"))
            },
            "SLURM_CONF": str(self.config),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "HOME": str(self.directory / "home"),
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """What runs on a host ends with the host; munged is this machine's."""
        for process in self._started:
            process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)

    def _start(self) -> None:
        for name in ("", "state", "work", "home", *(f"spool-{host.name}" for host in self.network.hosts)):
            (self.directory / name).mkdir(mode=0o755)
        head = self.network.hosts[0]
        nodes = "\n".join(
            f"NodeName={host.name} NodeAddr={host.address} CPUs=2 State=UNKNOWN" for host in self.network.hosts
        )
        self.config.write_text(
            CONFIG.format(head=head.name, address=head.address, directory=self.directory, nodes=nodes)
        )
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._start_munged()
        self._spawn(head, ["slurmctld", "-D", "-f", str(self.config)])
        for host in self.network.hosts:
            self._spawn(host, ["bash", "-c", CGROUPS, "slurmd", host.name, str(self.config)])
        self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(self.network.hosts)))

    def _start_munged(self) -> None:
        """One for all hosts: its socket is a file, and all see this machine's processes and clock."""
        directory = self.directory
        key, socket = directory / "munge.key", directory / "munge.socket"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=self.environment, check=True, timeout=20)
        files = [f"--{name}-file={directory}/munged.{name}" for name in ("log", "pid", "seed")]
        command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}", *files]
        self._started.append(
            subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        self._wait(socket.exists)

    def _spawn(self, host: Host, argv: list[str]) -> None:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._started.append(host.popen(argv, self.environment, **quiet))

    def run(self, *words: str) -> str:
        """A command of Slurm on this machine; what it printed, also when it failed."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=self.work
        )
        return (done.stdout + done.stderr).strip()

    def jobs(self) -> str:
        return self.run("squeue", "-h", "-o", "%i %T")

    def _wait(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not met():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm did not start: {self.run('sinfo', '-l')}; its logs: {self._logs()}")
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in Path(self.directory).glob("*.log"))
