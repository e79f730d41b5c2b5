#!/usr/bin/env bash
# Takes the cluster mi355x down: the controller, then Ray on every host. Goes on past hosts that do not answer.
# Written by `megatoken render ssh`; render again instead of editing.
set -uo pipefail
status=0
ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-01 'env RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/".megatoken/mi355x/ray_token /opt/megatoken/bin/megatoken down --cluster mi355x' </dev/null || {
    echo 'down.sh: gpu-01: could not take the controller down' >&2
    status=1
}
ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-01 '/opt/megatoken/bin/python -m megatoken.cluster.launchers.node stop --directory "$HOME/".megatoken/mi355x; status=$?; rm -f "$HOME/".megatoken/mi355x/ray_token; exit $status' </dev/null || {
    echo 'down.sh: gpu-01: could not stop Ray' >&2
    status=1
}
ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-02 '/opt/megatoken/bin/python -m megatoken.cluster.launchers.node stop --directory "$HOME/".megatoken/mi355x; status=$?; rm -f "$HOME/".megatoken/mi355x/ray_token; exit $status' </dev/null || {
    echo 'down.sh: gpu-02: could not stop Ray' >&2
    status=1
}
ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o LogLevel=ERROR -o IdentitiesOnly=yes -i ~/.ssh/id_ed25519 megatoken@gpu-03 '/opt/megatoken/bin/python -m megatoken.cluster.launchers.node stop --directory "$HOME/".megatoken/mi355x; status=$?; rm -f "$HOME/".megatoken/mi355x/ray_token; exit $status' </dev/null || {
    echo 'down.sh: gpu-03: could not stop Ray' >&2
    status=1
}
exit "$status"
