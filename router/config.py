"""RouterConfig: everything a router process is told, read once from one JSON file at the entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from megatoken.tls import ClientTls, ServerTls
from megatoken.tokens.ranges import MAX_CHOICES
from megatoken.tokens.wire import MAX_REQUEST_BYTES
from megatoken.tracing import TracingConfig


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdmissionConfig(_Part):
    """How much the router takes on before it refuses."""

    max_requests: int = Field(default=65_536, ge=1, description="requests running and queued at once")
    max_queued_requests: int = Field(default=16_384, ge=0, description="requests waiting for a replica")
    max_queued_tokens: int = Field(default=64_000_000, ge=0, description="prompt + expected tokens of waiting requests")
    max_live_bytes: int = Field(
        default=1 << 30, ge=1024, description="encoded requests running and queued, every choice by itself"
    )
    max_queue_s: float = Field(
        default=60.0, gt=0, description="longest wait for a replica; refused when more is expected"
    )
    replica_slack: float = Field(default=1.125, ge=1, description="requests sent to a replica over its max_running")
    replica_requests: int = Field(
        default=256, ge=1, description="requests a replica gets when it does not state max_running"
    )


class ResumeConfig(_Part):
    """What happens to requests whose replica is lost."""

    enabled: bool = Field(default=True, description="go on on another replica; a request may opt out")
    max_resumes: int = Field(default=4, ge=0, description="how often one request may move")
    hang_s: float = Field(
        default=60.0,
        gt=0,
        description="a replica with requests and no engine step for this long counts as lost",
    )
    retry_budget_ratio: float = Field(default=1.0, ge=0, description="moves per live or started request, in 10 s")
    retry_budget_floor: int = Field(default=256, ge=0, description="retries in 10 s that are always allowed")
    wait_s: float = Field(default=30.0, ge=0, description="longest wait of a lost request for another replica")


class BreakerConfig(_Part):
    """When a replica is left out although the controller calls it ready."""

    failures: int = Field(default=5, ge=1, description="failures in a row that open the circuit")
    open_s: float = Field(default=2.0, gt=0, description="first pause; doubles up to max_open_s")
    max_open_s: float = Field(default=30.0, gt=0)
    probe_timeout_s: float = Field(default=10.0, gt=0, description="longest wait for the one token that closes it")
    eject_ratio: float = Field(
        default=0.25, gt=0, lt=1, description="ejected when slower than this share of its kind's median"
    )
    max_ejected: float = Field(
        default=0.3, ge=0, le=1, description="share of a model's replicas that may be ejected at once"
    )


class LimitsConfig(_Part):
    """What one caller may ask of the process."""

    max_message_bytes: int = Field(default=16 << 20, ge=1024, description="a larger one ends its session or call")
    max_request_bytes: int = Field(
        default=MAX_REQUEST_BYTES, ge=1024, le=32 << 20, description="one request; a larger one is refused alone"
    )
    max_prompt_tokens: int = Field(default=1_000_000, ge=1)
    max_streams_per_session: int = Field(default=32_768, ge=1)
    max_connections_streams: int = Field(default=4096, ge=1, description="concurrent gRPC calls a connection may have")
    max_header_bytes: int = Field(default=16 << 10, ge=1024)
    max_n: int = Field(default=MAX_CHOICES, ge=1, le=MAX_CHOICES)
    max_timeout_ms: int = Field(default=24 * 3_600_000, ge=1, description="a longer timeout_ms is refused")
    max_delay_ms: int = Field(default=3_600_000, ge=1, description="a longer max_delay_ms is refused")
    client_stall_s: float = Field(
        default=60.0, gt=0, description="a client that reads nothing for this long is cut off"
    )


class DeliveryConfig(_Part):
    flush_ms: float = Field(default=4.0, ge=0, description="least time between two frames to one session under load")


class LeaseConfig(_Part):
    ttl_s: float = Field(default=600.0, gt=0, description="an unreleased lease ends by itself after this")
    max_leases: int = Field(default=100_000, ge=1)


class RouterConfig(_Part):
    """One router process."""

    router: str = Field(min_length=1, description="unique id of this router")
    host: str = Field(default="127.0.0.1", description="address to bind")
    port: int = Field(default=0, ge=0, le=65535, description="0: any free port")
    reuse_port: bool = Field(default=False, description="share the port with other routers of this node (SO_REUSEPORT)")
    own_port: int | None = Field(
        default=None, ge=0, le=65535, description="serve here too, where no other router does; 0: any free port"
    )
    advertise_host: str | None = Field(default=None, description="address that others reach it by; default: host")
    metrics_host: str = Field(default="127.0.0.1")
    metrics_port: int | None = Field(default=0, description="Prometheus; 0: any free port, null: none")
    controllers: list[str] = Field(default_factory=list, description="host:port of Membership services, tried in turn")
    static_snapshot: dict[str, Any] | None = Field(
        default=None, description="a membership Snapshot as protobuf JSON, instead of controllers"
    )
    node: str = ""
    site: str = ""
    counters_dir: Path | None = Field(default=None, description="where the counter file goes; null: nowhere")
    policy: str = Field(default="least_tokens", description="for models whose snapshot names none")
    admission: AdmissionConfig = AdmissionConfig()
    resume: ResumeConfig = ResumeConfig()
    breaker: BreakerConfig = BreakerConfig()
    limits: LimitsConfig = LimitsConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    leases: LeaseConfig = LeaseConfig()
    tls: ServerTls | None = Field(default=None, description="unset: plain text")
    worker_tls: ClientTls | None = Field(default=None, description="towards workers, controllers, the agent")
    api_keys_file: Path | None = Field(default=None, description="JSON; see docs/router.md. Null: no key is asked for")
    credentials_file: Path | None = Field(
        default=None, description="mode 600, from the control plane: what it shows and accepts; unset: no gate"
    )
    unguarded: bool = Field(default=False, description="without credentials_file: let everybody in who reaches host")
    throughput_agent: str | None = Field(default=None, description="host:port of the node's throughput agent")
    drain_s: float = Field(default=30.0, ge=0, description="how long running requests may still take after SIGTERM")
    tracing: TracingConfig | None = Field(default=None, description="unset: no spans")
    request_log: bool = Field(
        default=False, description="one JSON line a finished request on standard error, without prompts"
    )
    log_level: str = Field(default="INFO")
