"""Brings Ray up on ssh hosts, and down again: runs ssh_steps' commands, many hosts at once, each with a deadline.

Callers look at every host (`check` or `ask`) before they start anything. When a host fails after that, all that was
started is taken down, and the error names the host and what to do. Called by `megatoken up` and `megatoken down` where
the spec has launch.ssh.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatoken.cluster.launchers.node.command import spec_on
from megatoken.cluster.launchers.spec import LaunchSpec, SshLaunch
from megatoken.cluster.launchers.ssh.steps import SshPlan, SshStep, fetch_step, ssh_plan
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

CHECK_S = 60.0  # on top of the connection: a cold file system imports Python slowly
STOP_S = 90.0
CONTROLLER_S = 180.0
SHOWN_HOSTS = 4
Report = Callable[[str], None]


class LaunchError(RuntimeError):
    """A host could not be used. One sentence: which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host printed, between two readings of this machine's wall clock."""

    printed: str
    asked_s: float
    answered_s: float


class SshCluster:
    """The hosts of one spec. Methods block; one at a time."""

    def __init__(
        self, spec: ClusterSpec, launch: LaunchSpec, token: str, report: Report, *, doctor: bool = True
    ) -> None:
        if launch.ssh is None:
            raise ValueError("launch.ssh is missing: it lists the hosts")
        self._spec = spec
        self._ssh: SshLaunch = launch.ssh
        self._plan: SshPlan = ssh_plan(spec, launch, doctor=doctor)
        self._token = token
        self._report = report

    def check(self) -> None:
        """Whether every host can be reached and has Megatoken. Raises LaunchError."""
        self._report(f"checking {len(self._plan.checks)} hosts")
        self._all(self._plan.checks, self._ssh.connect_timeout_s + CHECK_S)

    def ask(self, steps: Sequence[SshStep]) -> list[Answer]:
        """Runs a step on each host, as `check` does, and returns what they printed. Raises LaunchError."""
        self._report(f"examining {len(steps)} hosts")
        limit_s = self._ssh.connect_timeout_s + CHECK_S

        def asked(step: SshStep) -> tuple[str, Answer]:
            began_s = time.time()
            problem, printed = self._output(step, limit_s)
            return problem, Answer(printed, began_s, time.time())

        with ThreadPoolExecutor(min(self._ssh.parallel, len(steps))) as pool:
            found = list(pool.map(asked, steps))
        if problems := [problem for problem, _ in found if problem]:
            raise LaunchError(_joined(problems))
        return [answer for _, answer in found]

    def up(self, *, controller: bool = True) -> str:
        """Ray on every host and the controller on the head; returns Ray's address. Raises LaunchError."""
        start_s = self._ssh.connect_timeout_s + self._ssh.start_timeout_s + 10
        try:
            self._report(f"starting Ray's head on {self._plan.head.host}")
            self._all([self._plan.head], start_s)
            if self._plan.others:
                self._report(f"starting Ray on {len(self._plan.others)} more hosts")
                self._all(self._plan.others, start_s)
            if controller:
                self._report("starting the controller")
                self._all([self._plan.controller], CONTROLLER_S)
        except BaseException:  # Ctrl-C too: what was started must not stay
            self._report("taking down what was started")
            self.down(controller=controller, quiet=True)
            raise
        return self._plan.ray_address

    def fetch(self, origin: str) -> int:
        """Runs `megatoken fetch` on the head, whose words go to this terminal; its exit status."""
        step = fetch_step(self._spec, self._ssh, origin)
        return subprocess.run(step.argv, input=self._given(step), text=True, check=False).returncode

    def operator_token(self) -> str:
        """What the head's controller made for operators. Raises LaunchError."""
        problem, token = self._output(self._plan.token, self._ssh.connect_timeout_s + CHECK_S)
        if problem:
            raise LaunchError(problem)
        return token.strip()

    def down(self, *, controller: bool = True, quiet: bool = False) -> None:
        """The controller, then Ray on every host. Goes through all hosts; raises LaunchError unless `quiet`."""
        failures = self._failures([self._plan.controller_stop], STOP_S) if controller else []
        failures += self._failures(self._plan.stops, self._ssh.connect_timeout_s + STOP_S)
        if failures and not quiet:
            raise LaunchError(_joined(failures))

    def _all(self, steps: Sequence[SshStep], limit_s: float) -> None:
        failures = self._failures(steps, limit_s)
        if failures:
            raise LaunchError(_joined(failures))

    def _failures(self, steps: Sequence[SshStep], limit_s: float) -> list[str]:
        with ThreadPoolExecutor(min(self._ssh.parallel, len(steps))) as pool:
            return [found for found in pool.map(lambda step: self._run(step, limit_s), steps) if found]

    def _run(self, step: SshStep, limit_s: float) -> str:
        """What went wrong; empty: nothing."""
        return self._output(step, limit_s)[0]

    def _output(self, step: SshStep, limit_s: float) -> tuple[str, str]:
        """(what went wrong, what it printed); the first is empty when nothing did."""
        try:
            done = subprocess.run(
                step.argv, input=self._given(step), capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"host {step.host}: could not {step.what} within {limit_s:.0f} s", ""
        except FileNotFoundError:
            return "the program ssh is not installed on this machine", ""
        return explain(step, done.returncode, done.stderr) if done.returncode else "", done.stdout

    def _given(self, step: SshStep) -> str:
        """What a step reads."""
        if step.stdin == "token":
            return "".join(f"{line}\n" for line in (self._token, *(f"{name}={value}" for name, value in step.env)))
        return dump_spec(spec_on(self._spec, self._plan.ray_address)) if step.stdin == "spec" else ""


def explain(step: SshStep, status: int, stderr: str) -> str:
    """One sentence for a failed step: ssh's own failures (status 255) are told apart from the remote command's."""
    text = " ".join(stderr.split())
    if status == 255:
        for sign, why in _SSH_SIGNS:
            if sign in text:
                return f"host {step.host}: {why} ({text[-200:]})"
        return f"host {step.host}: ssh failed: {text[-300:] or 'it said nothing'}"
    if status == 127 or "No module named" in text or "No such file" in text:
        return f"host {step.host}: Megatoken is not installed under launch.ssh.prefix there ({text[-200:]})"
    return f"host {step.host}: could not {step.what}: {text[-600:] or f'exit status {status}'}"


_SSH_SIGNS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is not the known one; check the machine first"),
    ("Host key verification failed", "its host key is not known; verify it, then add it to known_hosts"),
    ("Permission denied", "login was refused; check launch.ssh.user and identity_file"),
    ("Could not resolve hostname", "the name does not resolve"),
    ("Connection refused", "nothing listens on its ssh port"),
    ("timed out", "it is unreachable: no answer in time"),
    ("No route to host", "it is unreachable: no route"),
    ("Network is unreachable", "it is unreachable: no network"),
)  # fmt: skip


def _joined(failures: Sequence[str]) -> str:
    shown = "; ".join(failures[:SHOWN_HOSTS])
    more = len(failures) - SHOWN_HOSTS
    return f"{shown}; and {more} more hosts" if more > 0 else shown


def read_or_make_token(path: Path) -> str:
    """The cluster's token, from a file that only its owner may read; made on the first call."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        with os.fdopen(descriptor) as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise LaunchError(f"{path}: others may read this token; chmod 600 it, or remove it to get a new one")
            return file.read().strip()
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = secrets.token_hex(32)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        return token
