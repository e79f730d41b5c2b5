"""Takes a worker's load report: who else uses the replica, how fast it is, and whether its engine makes steps."""

from __future__ import annotations

from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.v1 import tokens_pb2

_REMEMBERED = 64  # steps over which their time is smoothed
_QUEUE_SHARE = 0.125  # of its batch: with more than this waiting in the engine, a replica gets no more


def take_load(state: RouterState, replica: Endpoint, load: tokens_pb2.Load, now: float) -> None:
    """Updates the replica from its report and measures its capacity from the difference to the last one."""
    has = load.running + load.waiting
    replica.others = max(0, has - replica.in_flight - replica.leased)
    if load.steps != replica.engine_steps:
        if replica.engine_steps >= 0:
            replica.alive_s = now
        replica.engine_steps = load.steps
    before, was_running = replica.load_totals, replica.running
    replica.running, replica.engine_waiting, replica.kv_usage = load.running, load.waiting, load.kv_usage
    if load.waiting > max(4, _QUEUE_SHARE * replica.capacity.batch):
        # The engine cannot run what it has (its cache is full): what it runs now is its limit until it says better.
        replica.limit = max(1, load.running + max(2, load.running // 8))
    else:
        replica.limit = max(1, round(replica.capacity.batch * state.config.admission.replica_slack))
    totals = (load.prompt_tokens, load.generated_tokens, load.busy_us, load.steps)
    if before is None:
        replica.load_totals = totals
    else:
        prompt, generated, busy_us, steps = (new - old for new, old in zip(totals, before, strict=True))
        if busy_us >= 50_000 or generated < 0:
            replica.load_totals = totals
            if busy_us > 0 and steps > 0:
                _time_steps(replica, busy_us / 1e6, steps)
            running = max(1.0, (was_running + load.running) / 2)
            if generated > 0 and prompt >= 0:
                replica.capacity.observe(busy_us / 1e6, generated, prompt, running)
                kinds = replica.pool.rates_by_kind
                kinds[replica.member.device_kind] = (replica.capacity.rates, replica.capacity.batch)
    state.fleet.refresh(replica, now)


def _time_steps(replica: Endpoint, busy_s: float, steps: int) -> None:
    """Smooths the time of its steps as a geometric mean, which a few long ones hardly move.

    A long prefill makes some steps that take many times as long as others; a replica that is slow is slow in each.
    """
    step_s = busy_s / steps
    replica.steps += steps
    share = max(steps / replica.steps, 1 - (1 - 1 / _REMEMBERED) ** steps)
    replica.step_s = step_s if not replica.step_s else replica.step_s * (step_s / replica.step_s) ** share
