"""What a router tells of itself: models, and its view of each replica. Reads state, changes nothing."""

from __future__ import annotations

import time

from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint, Pool
from megatoken.router.fleet.limits import ceiling
from megatoken.v1 import router_pb2

_SHARES = (0.5, 0.9, 0.99)


def models(state: RouterState) -> router_pb2.ListModelsResponse:
    response = router_pb2.ListModelsResponse()
    for pool in sorted(state.fleet.pools.values(), key=lambda pool: pool.model):
        if not (pool.known or pool.replicas):
            continue
        response.models.add(
            model=pool.model,
            max_model_len=pool.max_model_len,
            vocab_size=pool.vocab_size,
            ready_replicas=sum(r.connected and not r.draining for r in pool.replicas),
        )
    return response


def replica_state(replica: Endpoint, now: float) -> str:
    if replica.draining:
        return "draining"
    if not replica.connected:
        return "unreachable"
    if now < replica.ejected_until_s:
        return "ejected"
    return str(replica.circuit.state)


def router_status(state: RouterState) -> router_pb2.RouterStatus:
    now = time.monotonic()
    ledger = state.ledger
    queued = sum(pool.queue.length for pool in state.fleet.pools.values())
    share, why = ceiling(state.fleet)
    status = router_pb2.RouterStatus(
        router=state.config.router,
        membership_epoch=state.fleet.epoch,
        membership_version=state.fleet.version,
        running=state.live - queued,
        queued=queued,
        requests_started=ledger["requests_started"],
        requests_finished=ledger["requests_finished"],
        requests_failed=ledger["requests_failed"],
        requests_refused=ledger.refused,
        resumes=ledger.resumes,
        prompt_tokens=ledger["prompt_tokens"],
        generated_tokens=ledger["generated_tokens"],
        ttft_ms=state.latencies.first_token.percentiles_ms(_SHARES, now),
        itl_ms=state.latencies.between_tokens.percentiles_ms(_SHARES, now),
        ceiling=share,
        held_back_by=why,
        draining=state.draining,
    )
    status.models.extend(_model(pool) for pool in state.fleet.pools.values() if pool.known or pool.replicas)
    for replica in state.fleet.live():
        status.replicas.add(
            replica=replica.name,
            model=replica.member.model,
            state=replica_state(replica, now),
            in_flight=replica.in_flight,
            outstanding_tokens=replica.outstanding_tokens,
            decode_tokens_per_s=replica.capacity.decode_tokens_per_s,
            prefill_tokens_per_s=replica.capacity.prefill_tokens_per_s,
            running=replica.running,
            waiting=replica.engine_waiting,
            kv_usage=replica.kv_usage,
            generated_tokens=replica.generated_tokens,
            rtt_ms=replica.rtt_s * 1e3,
        )
    return status


def _model(pool: Pool) -> router_pb2.RouterModel:
    measures = pool.measures
    return router_pb2.RouterModel(
        model=pool.model,
        arrived_requests=measures.arrived,
        arrived_work_s=measures.arrived_work_s,
        measured=bool(pool.rates_by_kind),
        queued=pool.queue.length,
        queued_work_s=pool.queue.length * measures.arrived_work_s / max(1, measures.arrived),
        running=sum(replica.in_flight for replica in pool.replicas),
        first_token=measures.first_token_s.counts.tolist(),
        between_tokens=measures.between_tokens_s.counts.tolist(),
    )
