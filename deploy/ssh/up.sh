#!/usr/bin/env bash
# Brings the cluster mi355x up over ssh: checks every host, starts Ray's head, the other hosts, then the controller.
# When a host fails, everything is taken down again. Host keys are checked; add new ones to known_hosts beforehand.
# Written by `megatoken render ssh`; render again instead of editing.
# shellcheck disable=SC2016  # what is quoted is for the other machine, or a value as it is
set -euo pipefail
cd "$(dirname "$0")"
token=ray_token
if [ ! -s "$token" ]; then
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
fi

check_0() { # gpu-01: check
    ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-01 '/opt/megatoken/bin/python -c '"'"'import megatoken.cluster.launchers.node'"'"'' </dev/null
}
check_1() { # gpu-02: check
    ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-02 '/opt/megatoken/bin/python -c '"'"'import megatoken.cluster.launchers.node'"'"'' </dev/null
}
check_2() { # gpu-03: check
    ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-03 '/opt/megatoken/bin/python -c '"'"'import megatoken.cluster.launchers.node'"'"'' </dev/null
}
start_0() { # gpu-01: start Ray
    { cat "$token"; echo; printf '%s\n' NCCL_IB_HCA=mlx5 HSA_NO_SCRATCH_RECLAIM=1; } | ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-01 'umask 077 && mkdir -p "$HOME/".megatoken/mi355x && IFS= read -r token && printf %s "$token" >"$HOME/".megatoken/mi355x/ray_token && { while IFS= read -r line; do export "$line" || exit 1; done; } && env RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_enable_metrics_collection=0 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3 RAY_grpc_client_keepalive_time_ms=2000 RAY_grpc_client_keepalive_timeout_ms=3000 RAY_gcs_rpc_server_reconnect_timeout_s=5 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/".megatoken/mi355x/ray_token /opt/megatoken/bin/python -m megatoken.cluster.launchers.node start --directory "$HOME/".megatoken/mi355x --address 10.0.0.1 --timeout-s 120 -- /opt/megatoken/bin/ray start '"'"'--node-ip-address={address}'"'"' --head --port=6379 --num-cpus=0 --disable-usage-stats --object-store-memory=83886080 --include-dashboard=false --num-gpus=8 --labels=device_kind=mi355x,device_memory_gib=288,rack=r1,site=paris --block'
}
start_1() { # gpu-02: start Ray
    { cat "$token"; echo; printf '%s\n' NCCL_IB_HCA=mlx5 HSA_NO_SCRATCH_RECLAIM=1; } | ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-02 'umask 077 && mkdir -p "$HOME/".megatoken/mi355x && IFS= read -r token && printf %s "$token" >"$HOME/".megatoken/mi355x/ray_token && { while IFS= read -r line; do export "$line" || exit 1; done; } && env RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_enable_metrics_collection=0 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3 RAY_grpc_client_keepalive_time_ms=2000 RAY_grpc_client_keepalive_timeout_ms=3000 RAY_gcs_rpc_server_reconnect_timeout_s=5 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/".megatoken/mi355x/ray_token /opt/megatoken/bin/python -m megatoken.cluster.launchers.node start --directory "$HOME/".megatoken/mi355x --address 10.0.0.2 --timeout-s 120 -- /opt/megatoken/bin/ray start '"'"'--node-ip-address={address}'"'"' --address=10.0.0.1:6379 --num-cpus=0 --disable-usage-stats --object-store-memory=83886080 --num-gpus=8 --labels=device_kind=mi355x,device_memory_gib=288,rack=r1,site=paris --block'
}
start_2() { # gpu-03: start Ray
    { cat "$token"; echo; printf '%s\n' NCCL_IB_HCA=mlx5 HSA_NO_SCRATCH_RECLAIM=1; } | ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-03 'umask 077 && mkdir -p "$HOME/".megatoken/mi355x && IFS= read -r token && printf %s "$token" >"$HOME/".megatoken/mi355x/ray_token && { while IFS= read -r line; do export "$line" || exit 1; done; } && env RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_enable_metrics_collection=0 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3 RAY_grpc_client_keepalive_time_ms=2000 RAY_grpc_client_keepalive_timeout_ms=3000 RAY_gcs_rpc_server_reconnect_timeout_s=5 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/".megatoken/mi355x/ray_token /opt/megatoken/bin/python -m megatoken.cluster.launchers.node start --directory "$HOME/".megatoken/mi355x --address 10.0.0.3 --timeout-s 120 -- /opt/megatoken/bin/ray start '"'"'--node-ip-address={address}'"'"' --address=10.0.0.1:6379 --num-cpus=0 --disable-usage-stats --object-store-memory=83886080 --num-gpus=8 --labels=device_kind=mi355x,device_memory_gib=288,rack=r2,site=paris --block'
}
controller() { # gpu-01: bring the controller up
    ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-01 'cat >"$HOME/".megatoken/mi355x/spec.yaml && env RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/".megatoken/mi355x/ray_token /opt/megatoken/bin/megatoken up --detach --no-wait -f "$HOME/".megatoken/mi355x/spec.yaml' <spec.yaml
}

fail() {
    echo "up.sh: $1; taking down what was started" >&2
    ./down.sh || true
    exit 1
}

# each WHAT FUNCTION...: runs all at once, and tells which failed.
each() {
    local what=$1 failed=() jobs=() index
    shift
    for step in "$@"; do
        "$step" &
        jobs+=($!)
    done
    index=0
    for step in "$@"; do
        wait "${jobs[$index]}" || failed+=("$step")
        index=$((index + 1))
    done
    if [ "${#failed[@]}" -gt 0 ]; then
        echo "up.sh: could not $what: ${failed[*]}" >&2
        return 1
    fi
}

each "reach" check_0 check_1 check_2 || exit 1
each "start the head" start_0 || fail "no head"
each "start Ray" start_1 start_2 || fail "not every host started"
controller || fail "no controller"
echo "up.sh: mi355x is up; Ray is at 10.0.0.1:6379"
