"""The ssh commands that bring a cluster up on a list of hosts, and down again. Pure.

run.py runs them with deadlines; script.py writes the same commands as shell scripts. Host keys are always
checked (Ray's own cluster launcher turns that off), passwords are never asked for, and the token and the environment
that the spec gives travel over stdin: a command line is there for everybody on both machines to read.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from megatoken.cluster.launchers.node.command import TOKEN_FILE, given_env, node_command
from megatoken.cluster.launchers.spec import LaunchSpec, SshHost, SshLaunch
from megatoken.cluster.spec.cluster import ClusterSpec


@dataclass(frozen=True, slots=True)
class SshStep:
    """One remote command. `argv` runs ssh; `stdin` says what it reads."""

    host: str
    what: str
    argv: tuple[str, ...]
    stdin: str = ""  # "", "token" or "spec"
    env: tuple[tuple[str, str], ...] = ()  # follows the token, a line each


@dataclass(frozen=True, slots=True)
class SshPlan:
    """Checks on all hosts, then the head, then the others, then the controller. `stops` undoes them, host by host.

    `token` prints the operator's token once the controller serves.
    """

    checks: tuple[SshStep, ...]
    head: SshStep
    others: tuple[SshStep, ...]
    controller: SshStep
    token: SshStep
    controller_stop: SshStep
    stops: tuple[SshStep, ...]
    ray_address: str


def ssh_plan(spec: ClusterSpec, launch: LaunchSpec, *, doctor: bool = True) -> SshPlan:
    """`doctor`: the controller's start examines the nodes. Raises ValueError when the spec has no `launch.ssh`."""
    ssh = launch.ssh
    if ssh is None:
        raise ValueError("launch.ssh is missing: it lists the hosts")
    head = ssh.hosts[0]
    ray_address = f"{head.node_address}:{launch.ports.head}"
    starts = [_start(spec, launch, ssh, host) for host in ssh.hosts]
    return SshPlan(
        checks=tuple(_check(ssh, host) for host in ssh.hosts),
        head=starts[0],
        others=tuple(starts[1:]),
        controller=_controller(spec, ssh, head, doctor),
        token=_token(spec, ssh, head),
        controller_stop=_controller_stop(spec, ssh, head),
        stops=tuple(_stop(spec, ssh, host) for host in ssh.hosts),
        ray_address=ray_address,
    )


def ssh_argv(ssh: SshLaunch, host: SshHost, remote: str) -> tuple[str, ...]:
    """The ssh command line; `remote` is for the login shell of the host."""
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(ssh.connect_timeout_s),
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
        "LogLevel": "ERROR",
    }
    if ssh.known_hosts_file:
        options["UserKnownHostsFile"] = ssh.known_hosts_file
    if ssh.identity_file:
        options["IdentitiesOnly"] = "yes"
    words = ["ssh", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    if ssh.identity_file:
        words += ["-i", ssh.identity_file]
    port = host.port or ssh.port
    if port:
        words += ["-p", str(port)]
    user = host.user or ssh.user
    return (*words, f"{user}@{host.host}" if user else host.host, remote)


def python_on(ssh: SshLaunch, *words: str) -> str:
    """For the login shell of a host: Megatoken's Python there, with these arguments."""
    return " ".join(_quoted(word) for word in (f"{ssh.prefix}/bin/python", *words))


def _start(spec: ClusterSpec, launch: LaunchSpec, ssh: SshLaunch, host: SshHost) -> SshStep:
    directory = _directory(ssh, spec)
    head = ssh.hosts[0]
    command = node_command(
        spec,
        launch.ports,
        host,
        ray=f"{ssh.prefix}/bin/ray",
        head_address=head.node_address,
        head=host is head,
        token_path=f"{directory}/{TOKEN_FILE}",
        redis=launch.redis,
    )
    node = [f"{_home(ssh.prefix)}/bin/python", "-m", "megatoken.cluster.launchers.node", "start"]
    options = ["--directory", directory, "--address", host.node_address, "--timeout-s", f"{ssh.start_timeout_s:g}"]
    interface = host.interface or spec.network.interface
    options += ["--interface", interface] if interface else []
    given = given_env(spec, host)
    env = " ".join(f"{name}={_quoted(value)}" for name, value in command.env.items() if name not in given)
    words = " ".join(_quoted(word) for word in [*node, *options, "--", *command.ray])
    token = _quoted(f"{directory}/{TOKEN_FILE}")
    read = f'umask 077 && mkdir -p {_quoted(directory)} && IFS= read -r token && printf %s "$token" >{token}'
    exported = 'while IFS= read -r line; do export "$line" || exit 1; done'
    remote = f"{read} && {{ {exported}; }} && env {env} {words}"
    return SshStep(host.host, "start Ray", ssh_argv(ssh, host, remote), "token", tuple(given.items()))


def _check(ssh: SshLaunch, host: SshHost) -> SshStep:
    """Whether the host answers, lets us in, and has Megatoken."""
    remote = python_on(ssh, "-c", "import megatoken.cluster.launchers.node")
    return SshStep(host.host, "check", ssh_argv(ssh, host, remote))


def _stop(spec: ClusterSpec, ssh: SshLaunch, host: SshHost) -> SshStep:
    token = _quoted(f"{_directory(ssh, spec)}/{TOKEN_FILE}")
    stop = python_on(ssh, "-m", "megatoken.cluster.launchers.node", "stop", "--directory", _directory(ssh, spec))
    remote = f"{stop}; status=$?; rm -f {token}; exit $status"
    return SshStep(host.host, "stop Ray", ssh_argv(ssh, host, remote))


def _controller(spec: ClusterSpec, ssh: SshLaunch, head: SshHost, doctor: bool) -> SshStep:
    directory = _directory(ssh, spec)
    file = _quoted(f"{directory}/spec.yaml")
    up = f"{_megatoken(ssh, directory)} up --detach --no-wait{'' if doctor else ' --no-doctor'} -f {file}"
    return SshStep(head.host, "bring the controller up", ssh_argv(ssh, head, f"cat >{file} && {up}"), "spec")


def fetch_step(spec: ClusterSpec, ssh: SshLaunch, origin: str) -> SshStep:
    """Copies weights between the hosts, while Ray runs there; `origin`: `megatoken fetch --from`."""
    directory = _directory(ssh, spec)
    file = _quoted(f"{directory}/fetch.yaml")
    words = f"fetch -f {file}{f' --from {shlex.quote(origin)}' if origin else ''}"
    remote = f"cat >{file} && {_megatoken(ssh, directory)} {words}"
    return SshStep(ssh.hosts[0].host, "fetch weights", ssh_argv(ssh, ssh.hosts[0], remote), "spec")


def _token(spec: ClusterSpec, ssh: SshLaunch, head: SshHost) -> SshStep:
    """Prints the operator's token, which the head made; it travels through ssh only."""
    remote = f"{_megatoken(ssh, _directory(ssh, spec))} token --cluster {_quoted(spec.cluster)}"
    return SshStep(head.host, "fetch the operator's token", ssh_argv(ssh, head, remote))


def _controller_stop(spec: ClusterSpec, ssh: SshLaunch, head: SshHost) -> SshStep:
    remote = f"{_megatoken(ssh, _directory(ssh, spec))} down --cluster {_quoted(spec.cluster)}"
    return SshStep(head.host, "take the controller down", ssh_argv(ssh, head, remote))


def _megatoken(ssh: SshLaunch, directory: str) -> str:
    token = _quoted(f"{directory}/{TOKEN_FILE}")
    return f"env RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} {_quoted(f'{ssh.prefix}/bin/megatoken')}"


def _directory(ssh: SshLaunch, spec: ClusterSpec) -> str:
    return _home(f"{ssh.directory}/{spec.cluster}")


def _home(path: str) -> str:
    return "$HOME" + path[1:] if path.startswith("~/") else path


def _quoted(word: str) -> str:
    """A word for the remote shell, in which only a leading $HOME of ours is expanded."""
    word = _home(word)
    for place in ("$HOME/",):
        if word.startswith(place):
            return f'"{place}"{shlex.quote(word[len(place) :])}'
    return shlex.quote(word)
