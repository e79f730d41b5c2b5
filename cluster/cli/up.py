"""`megatoken up [-f spec.yaml] [--detach]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable

from megatoken.cluster.cli.common import read_text
from megatoken.cluster.cli.down import take_down
from megatoken.cluster.client.control import CommandError, ControlClient, client_of
from megatoken.cluster.client.progress import Progress, wait_until_settled
from megatoken.cluster.planning.check import device_problems, model_problems, port_problems, source_directory
from megatoken.cluster.spec.cluster import ClusterSpec, default_spec
from megatoken.cluster.spec.load import SpecError, load_spec
from megatoken.cluster.start.bring_up import Up, bring_up
from megatoken.cluster.start.nodes import wait_for_nodes
from megatoken.cluster.start.over_kubernetes import up_over_kubernetes, wants_kubernetes
from megatoken.cluster.start.over_slurm import up_over_slurm, wants_slurm
from megatoken.cluster.start.over_ssh import up_over_ssh, wants_ssh
from megatoken.cluster.view.text import status_text
from megatoken.worker.models import PREFIX, prepare

START_TIMEOUT_S = 1800.0
DRAIN_S = 10.0  # what running requests get after Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", help="the spec, YAML; none: one replica of the built-in model on this machine")
    parser.add_argument("-d", "--detach", action="store_true", help="return when it is ready; `megatoken down` ends it")
    parser.add_argument("--timeout", type=float, default=START_TIMEOUT_S, metavar="SECONDS", help="limit on the start")
    parser.add_argument("--nodes", type=int, default=0, help="wait until the running Ray cluster has so many")
    parser.add_argument("--no-doctor", action="store_true", help="do not examine the machines first")
    parser.add_argument("--no-wait", action="store_true", help="return when the controller serves, replicas or not")


def run(arguments: argparse.Namespace) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what is in the background with SIGINT ignored
        signal.signal(number, lambda *_: _interrupt())
    spec, doctor = asked_spec(arguments.file), not arguments.no_doctor
    check(spec)
    if asked := ways(spec):
        return asked[0](spec, wait=not arguments.no_wait, timeout_s=arguments.timeout, doctor=doctor)
    progress = Progress()
    if arguments.nodes:
        wait_for_nodes(spec.ray.address, arguments.nodes, arguments.timeout, progress)
    prepare_models(spec, progress)
    local = spec.ray.address == "local"
    up = bring_up(spec, progress, attached=local and not arguments.detach, doctor=doctor)
    with client_of(up.record) as client:
        try:
            if not arguments.no_wait:
                wait_until_settled(client, timeout_s=arguments.timeout, progress=progress)
                print(status_text(client.status()), flush=True)
            if up.guard is None or arguments.detach:
                progress.say(f"cluster {spec.cluster} is up; `megatoken down` takes it down")
                return 0
            progress.say(f"cluster {spec.cluster} is up; Ctrl-C takes it down")
            return _own(up.guard)
        except CommandError:
            if arguments.detach or up.guard is None:
                progress.say("taking down what was started")
            _end(up, client, progress, drain_s=0.0)
            raise
        except KeyboardInterrupt:
            _end(up, client, progress, drain_s=DRAIN_S)
            return 0


def ways(spec: ClusterSpec) -> list[Callable[..., int]]:
    """How the spec asks to be launched on other machines; none: on this one, or on a Ray that runs."""
    asked = {up_over_ssh: wants_ssh, up_over_slurm: wants_slurm, up_over_kubernetes: wants_kubernetes}
    return [over for over, wanted in asked.items() if wanted(spec)]


def asked_spec(path: str | None) -> ClusterSpec:
    """The spec of the command line; RAY_ADDRESS without a spec means the default on that cluster."""
    if path is not None:
        return load_spec(read_text(path))
    spec = default_spec()
    if os.environ.get("RAY_ADDRESS"):
        return spec.model_copy(update={"ray": spec.ray.model_copy(update={"address": "auto"})})
    return spec


def check(spec: ClusterSpec) -> None:
    """Raises SpecError for what this machine shows to be wrong, before anything is started."""
    problems = model_problems(spec) + device_problems(spec)
    if len(ways(spec)) > 1:
        problems.append("launch: several of ssh, slurm and kuberay are not allowed; `megatoken up` takes one of them")
    if spec.ray.address == "local" and not ways(spec):
        problems += port_problems(spec)
    if problems:
        raise SpecError(problems)


def prepare_models(spec: ClusterSpec, progress: Progress) -> None:
    """Makes the built-in models that a local cluster will load, once for this machine."""
    for model in spec.models:
        directory = source_directory(model.source)
        if spec.ray.address == "local" and model.source.startswith(PREFIX) and directory and not directory.is_dir():
            progress.say(f"preparing {model.source} (once on this machine)")
            prepare(model.source.removeprefix(PREFIX), progress.say)


def _own(guard: subprocess.Popen[bytes]) -> int:
    status = guard.wait()
    if status:
        raise CommandError(f"the cluster ended by itself with status {status}")
    return 0


def _end(up: Up, client: ControlClient, progress: Progress, *, drain_s: float) -> None:
    """Takes the cluster down in order; a second Ctrl-C leaves the rest to the guard."""
    with contextlib.suppress(KeyboardInterrupt, CommandError):
        take_down(client, up.record, progress, drain_s=drain_s, guard=up.guard)
    if up.guard is not None and up.guard.poll() is None:
        up.guard.terminate()
        up.guard.wait(60)


def _interrupt() -> None:
    raise KeyboardInterrupt
