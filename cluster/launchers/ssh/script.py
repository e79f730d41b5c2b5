"""The ssh commands of a cluster as shell scripts: what `megatoken up` would run, for people to read and run. Pure."""

from __future__ import annotations

import shlex

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.node.command import TOKEN_FILE, spec_on
from megatoken.cluster.launchers.spec import LaunchSpec
from megatoken.cluster.launchers.ssh.steps import SshPlan, SshStep, ssh_plan
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

UP = """\
#!/usr/bin/env bash
# Brings the cluster {cluster} up over ssh: checks every host, starts Ray's head, the other hosts, then the controller.
# When a host fails, everything is taken down again. Host keys are checked; add new ones to known_hosts beforehand.
# Written by `megatoken render ssh`; render again instead of editing.
# shellcheck disable=SC2016  # what is quoted is for the other machine, or a value as it is
set -euo pipefail
cd "$(dirname "$0")"
token={token}
if [ ! -s "$token" ]; then
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$token")
fi

{functions}

fail() {{
    echo "up.sh: $1; taking down what was started" >&2
    ./down.sh || true
    exit 1
}}

# each WHAT FUNCTION...: runs all at once, and tells which failed.
each() {{
    local what=$1 failed=() jobs=() index
    shift
    for step in "$@"; do
        "$step" &
        jobs+=($!)
    done
    index=0
    for step in "$@"; do
        wait "${{jobs[$index]}}" || failed+=("$step")
        index=$((index + 1))
    done
    if [ "${{#failed[@]}}" -gt 0 ]; then
        echo "up.sh: could not $what: ${{failed[*]}}" >&2
        return 1
    fi
}}

each "reach" {checks} || exit 1
each "start the head" {head} || fail "no head"
{others}
echo "up.sh: {cluster} is up; Ray is at {ray_address}"
"""

DOWN = """\
#!/usr/bin/env bash
# Takes the cluster {cluster} down: the controller, then Ray on every host. Goes on past hosts that do not answer.
# Written by `megatoken render ssh`; render again instead of editing.
set -uo pipefail
status=0
{steps}
exit "$status"
"""


def ssh_artefacts(spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """up.sh, down.sh and the spec for the head. The token is made by the first up.sh, mode 600."""
    plan = ssh_plan(spec, launch)
    return [
        Artefact("up.sh", _up(spec, plan), executable=True),
        Artefact("down.sh", _down(spec, plan), executable=True),
        Artefact("spec.yaml", dump_spec(spec_on(spec, plan.ray_address))),
    ]


def _up(spec: ClusterSpec, plan: SshPlan) -> str:
    named = {f"check_{number}": step for number, step in enumerate(plan.checks)}
    starts = {f"start_{number}": step for number, step in enumerate((plan.head, *plan.others))}
    functions = [_function(name, step) for name, step in {**named, **starts, "controller": plan.controller}.items()]
    workers = " ".join(list(starts)[1:])
    return UP.format(
        cluster=spec.cluster,
        token=TOKEN_FILE,
        functions="\n".join(functions),
        checks=" ".join(named),
        head="start_0",
        others="\n".join(
            [
                *([f'each "start Ray" {workers} || fail "not every host started"'] if workers else []),
                'controller || fail "no controller"',
            ]
        ),
        ray_address=plan.ray_address,
    )


def _function(name: str, step: SshStep) -> str:
    head = f"{name}() {{ # {step.host}: {step.what}\n    "
    if step.stdin == "token":
        lines = " ".join(shlex.quote(f"{variable}={value}") for variable, value in step.env)
        given = f"; printf '%s\\n' {lines}" if lines else ""
        return f'{head}{{ cat "$token"; echo{given}; }} | {_words(step)}\n}}'
    source = {"": "</dev/null", "spec": "<spec.yaml"}[step.stdin]
    return f"{head}{_words(step)} {source}\n}}"


def _down(spec: ClusterSpec, plan: SshPlan) -> str:
    steps = "\n".join(
        f"{_words(step)} </dev/null || {{\n    echo 'down.sh: {step.host}: could not {step.what}' >&2\n    status=1\n}}"
        for step in (plan.controller_stop, *plan.stops)
    )
    return DOWN.format(cluster=spec.cluster, steps=steps)


def _words(step: SshStep) -> str:
    """The command line as a shell reads it; a home directory in an option is the local one, and stays expandable."""
    return " ".join(word if word.startswith("~/") else shlex.quote(word) for word in step.argv)
