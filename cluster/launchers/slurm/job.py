"""A Slurm job script: a supervised Ray on every node, and the cluster's controller on the first. Pure.

The script itself runs on the job's first node, which is the head. It needs no file but itself, and a home directory
that all nodes share: there it keeps the job's token, and how to reach the controller.
"""

from __future__ import annotations

import shlex

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.node.command import node_env_of, ray_options, spec_on
from megatoken.cluster.launchers.node.store import ADDRESS
from megatoken.cluster.launchers.spec import LaunchSpec, SlurmLaunch
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

DRAIN_S = 30  # what running requests get when Slurm asks for the end
TERM_S = 90  # before the job's time is over: the drain, and an end in order
STATE = '"${XDG_STATE_HOME:-$HOME/.local/state}/megatoken/slurm-$SLURM_JOB_ID"'
"""Where a job keeps its token and its cluster's record, for a shell inside the job."""

JOB = """\
#!/usr/bin/env bash
{directives}
# Brings the cluster {cluster} up on {nodes} nodes, and keeps it up until it is taken down or the job's time is over.
# `megatoken up` submits it; by hand: sbatch megatoken.sbatch, and scancel --batch --signal=TERM JOB drains and ends it.
# Written by `megatoken render slurm`; render again instead of editing.
# shellcheck disable=SC2016 # what stands in single quotes is expanded elsewhere, or not at all
set -euo pipefail
{setup}
prefix={prefix}
# One token a job, in a directory of the job's owner alone.
state={state}
(umask 077 && mkdir -p "$state" && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$state/ray_token")
trap 'rm -rf "$state"' EXIT
cat >"$state/spec.yaml" <<'MEGATOKEN_SPEC'
{spec}MEGATOKEN_SPEC
{environment}
export RAY_AUTH_TOKEN_PATH="$state/ray_token" MEGATOKEN_STATE_DIR="$state"
export PATH="$prefix/bin:$PATH"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head=$(getent ahostsv4 "$first" | awk 'NR == 1 {{ print $1 }}')
if [ -z "$head" ] || [ "${{head#127.}}" != "$head" ]; then
    echo "the name $first resolves to '$head' on itself; it must resolve to an address that other nodes reach" >&2
    exit 1
fi
export RAY_ADDRESS="$head:{port}"

# nodes FIRST COUNT OPTIONS...: in the background, a supervised Ray on COUNT of the job's nodes. A node that is lost
# ends neither the job nor the others, and is used again when it returns.
steps=()
nodes() {{
    srun --relative="$1" --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 --wait=0 \\
        bash -c 'exec "$0" -m megatoken.cluster.launchers.node run --directory "$1/node-$SLURMD_NODENAME" "${{@:2}}"' \\
        "$prefix/bin/python" "$state" --head "$RAY_ADDRESS"{interface} -- \\
        "$prefix/bin/ray" start "--node-ip-address={{address}}" "${{@:3}}" \\
        {options} &
    steps+=($!)
}}

asked=
trap 'asked=1' TERM INT
{redis}nodes 0 1 --head --port={port}{block}
unset {redis_name}
# The others start once the head's store answers.
until [ -n "$asked" ] || (exec 3<>"/dev/tcp/$head/{port}") 2>/dev/null; do
    if ! kill -0 "${{steps[0]}}" 2>/dev/null; then
        echo "Ray's head did not start on $first" >&2
        exit 1
    fi
    sleep 0.5
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    nodes 1 $((SLURM_JOB_NUM_NODES - 1)) --address="$RAY_ADDRESS" --block
fi

status=0
megatoken up --detach --no-wait --nodes "$SLURM_JOB_NUM_NODES" --timeout {wait_s}{doctor} -f "$state/spec.yaml" &
up=$!
wait "$up" || status=$?
# Up until it is taken down (its record is gone then), the head's Ray ends, or Slurm asks for the end.
while [ "$status" = 0 ] && [ -z "$asked" ] && [ -e "$state/{cluster}.json" ]; do
    if ! kill -0 "${{steps[0]}}" 2>/dev/null; then
        echo "Ray's head ended on $first" >&2
        status=1
    fi
    sleep 2 &
    wait $! || true
done
if [ -n "$asked" ]; then
    kill "$up" 2>/dev/null || true
    megatoken down --cluster {cluster} --drain {drain_s} || true
fi
kill "${{steps[@]}}" 2>/dev/null || true
wait "${{steps[@]}}" || true
exit "$status"
"""


def slurm_artefacts(spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """megatoken.sbatch. Raises ValueError when the spec has no `launch.slurm`."""
    return [Artefact("megatoken.sbatch", job_script(spec, launch), executable=True)]


def job_script(spec: ClusterSpec, launch: LaunchSpec, *, doctor: bool = True) -> str:
    """`doctor`: the nodes are examined before the controller starts. Raises ValueError without `launch.slurm`."""
    slurm = launch.slurm
    if slurm is None:
        raise ValueError("launch.slurm is missing: it says how many nodes and in which partition")
    interface = slurm.interface or spec.network.interface
    env = node_env_of(spec, slurm, None)
    return JOB.format(
        cluster=spec.cluster,
        nodes=slurm.nodes,
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(spec, slurm)),
        setup="\n".join(slurm.setup),
        prefix=shlex.quote(slurm.prefix),
        state=STATE,
        spec=dump_spec(spec_on(spec, "auto")),
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        wait_s=slurm.wait_s,
        redis=f"export {ADDRESS}={shlex.quote(launch.redis.address)}\n" if launch.redis else "",
        redis_name=ADDRESS,
        block="" if launch.redis else " --block",
        doctor="" if doctor else " --no-doctor",
        port=launch.ports.head,
        interface=f" --interface {shlex.quote(interface)}" if interface else "",
        options=" ".join(shlex.quote(word) for word in ray_options(spec, launch.ports, slurm, head=False)),
        drain_s=DRAIN_S,
    ).replace("\n\n\n", "\n\n")


def _directives(spec: ClusterSpec, slurm: SlurmLaunch) -> list[str]:
    gpus = slurm.gpus_per_node if slurm.gpus_per_node is not None else slurm.gpus
    lines = [
        f"job-name=megatoken-{spec.cluster}",
        f"nodes={slurm.nodes}",
        "ntasks-per-node=1",
        f"time={slurm.time}",
        "output=megatoken-%j.log",
        f"signal=B:TERM@{TERM_S}",
        "no-kill",
    ]
    lines.append(f"cpus-per-task={slurm.cpus_per_task}" if slurm.cpus_per_task else "exclusive")
    for name, value in (("partition", slurm.partition), ("account", slurm.account), ("constraint", slurm.constraint)):
        if value:
            lines.append(f"{name}={value}")
    if gpus:
        lines.append(f"gpus-per-node={gpus}")
    return lines
