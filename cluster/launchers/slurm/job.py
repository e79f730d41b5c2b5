"""A Slurm job script: `ray symmetric-run` on every node, and the cluster's controller on the first. Pure.

Every node runs the same command. symmetric-run finds out which node is the head, starts Ray on all of them, runs
`megatoken up` on the head once all have joined, and stops Ray on every node when that ends.
"""

from __future__ import annotations

import shlex

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.node.command import node_env_of, ray_options, spec_on
from megatoken.cluster.launchers.spec import LaunchSpec, SlurmLaunch
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

JOB = """\
#!/usr/bin/env bash
{directives}
# shellcheck disable=SC2016 # what stands in single quotes is expanded elsewhere, or not at all
# Brings the cluster {cluster} up on {nodes} nodes, and keeps it up until the job ends: sbatch megatoken.sbatch
# Written by `megatoken render slurm`; render again instead of editing.
set -euo pipefail
{setup}
directory="${{SLURM_SUBMIT_DIR:?submit this script with sbatch}}"
prefix={prefix}
# One token a job, in a directory of the job's owner alone.
state="${{XDG_STATE_HOME:-$HOME/.local/state}}/megatoken/slurm-$SLURM_JOB_ID"
(umask 077 && mkdir -p "$state" && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$state/ray_token")
trap 'rm -rf "$state"' EXIT
{environment}
export RAY_AUTH_TOKEN_PATH="$state/ray_token"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={wait_s}
export PATH="$prefix/bin:$PATH"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head=$(srun --nodes=1 --ntasks=1 --nodelist="$first" getent ahostsv4 "$first" | awk 'NR == 1 {{ print $1 }}')
if [ -z "$head" ] || [ "${{head#127.}}" != "$head" ]; then
    echo "the name $first resolves to '$head' on itself; it must resolve to an address that other nodes reach" >&2
    exit 1
fi
export RAY_ADDRESS="$head:{port}"

# What the head runs once all nodes have joined: the controller, until the job ends or someone takes the cluster down.
serve='
trap "megatoken down --drain 30; exit 0" TERM INT
megatoken up -f "$1" || exit 1
while megatoken status >/dev/null 2>&1; do
    sleep 10 &
    wait $!
done'

# Every node works out its own address and interface, then runs the same command.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \\
    "$prefix/bin/python" -m megatoken.cluster.launchers.node exec --head "$RAY_ADDRESS"{interface} -- \\
    "$prefix/bin/ray" symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \\
    {options} \\
    -- bash -c "$serve" serve "$directory/spec.yaml"
"""


def slurm_artefacts(spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """megatoken.sbatch and the spec beside it. Raises ValueError when the spec has no `launch.slurm`."""
    slurm = launch.slurm
    if slurm is None:
        raise ValueError("launch.slurm is missing: it says how many nodes and in which partition")
    interface = slurm.interface or spec.network.interface
    env = node_env_of(spec, slurm, None)
    job = JOB.format(
        cluster=spec.cluster,
        nodes=slurm.nodes,
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(spec, slurm)),
        setup="\n".join(slurm.setup),
        prefix=shlex.quote(slurm.prefix),
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        wait_s=slurm.wait_s,
        port=launch.ports.head,
        interface=f" --interface {shlex.quote(interface)}" if interface else "",
        options=" ".join(shlex.quote(word) for word in ray_options(spec, launch.ports, slurm, head=False)),
    )
    return [
        Artefact("megatoken.sbatch", job.replace("\n\n\n", "\n\n"), executable=True),
        Artefact("spec.yaml", dump_spec(spec_on(spec, "auto"))),
    ]


def _directives(spec: ClusterSpec, slurm: SlurmLaunch) -> list[str]:
    gpus = slurm.gpus_per_node if slurm.gpus_per_node is not None else slurm.gpus
    lines = [
        f"job-name=megatoken-{spec.cluster}",
        f"nodes={slurm.nodes}",
        "ntasks-per-node=1",
        f"time={slurm.time}",
        "output=megatoken-%j.log",
        "signal=TERM@60",
    ]
    lines.append(f"cpus-per-task={slurm.cpus_per_task}" if slurm.cpus_per_task else "exclusive")
    for name, value in (("partition", slurm.partition), ("account", slurm.account), ("constraint", slurm.constraint)):
        if value:
            lines.append(f"{name}={value}")
    if gpus:
        lines.append(f"gpus-per-node={gpus}")
    return lines
