"""What a spec says about everything beside models: Ray, the controller, routers, edge, agents, network, security."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatoken.cluster.spec.model import SpecPart, refuse_visible_devices
from megatoken.router.config import (
    AdmissionConfig,
    BreakerConfig,
    DeliveryConfig,
    LeaseConfig,
    LimitsConfig,
    ResumeConfig,
)
from megatoken.router.policies.names import ALLOWED
from megatoken.tls import ClientTls, ServerTls

ANY_PORT = 0
METRICS_OFFSET = 2  # 7700 is the controller's, 7701 the routers', 7702 the controller's metrics
HOST_RULE = "loopback where Ray is local, else the node's own address"
RAY_ADDRESS_PATTERN = r"^(local|auto|ray://[^\s]+|[^\s:]+:\d{1,5})$"


class RaySpec(SpecPart):
    """The Ray cluster that everything runs on."""

    address: str = Field(
        "local", pattern=RAY_ADDRESS_PATTERN, description="local: one of our own; auto: RAY_ADDRESS; or HOST:PORT"
    )
    cpu_devices: int | None = Field(
        None, ge=0, le=4096, description="CPU slots of the local node, one rank each; unset: as the replicas need"
    )
    gpus: int | None = Field(None, ge=0, le=64, description="GPUs of the local node; unset: those that Ray finds")
    object_store_mib: int = Field(80, ge=76, le=1_048_576, description="Ray's object store; no tokens pass it")


class ControlSpec(SpecPart):
    """The controller's own server and habits."""

    host: str | None = Field(None, min_length=1, description="address it binds; unset: " + HOST_RULE)
    port: int = Field(7700, ge=0, le=65_535, description="Control, Membership and Throughput services; 0: any free one")
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="/metrics and /sd; 0: any free one; unset: port + 2, and with port 0 any"
    )
    tick_s: float = Field(1.0, gt=0, le=60, description="longest time between two looks at the cluster")
    reserve_timeout_s: float = Field(30.0, gt=0, le=3600, description="limit on Ray's grant of a placement group")
    restart_backoff_s: float = Field(1.0, gt=0, le=600, description="pause after a failed start; doubles, with a bound")
    restart_backoff_max_s: float = Field(60.0, gt=0, le=86_400, description="longest pause between failed starts")
    device_pause_s: float = Field(
        60.0, gt=0, le=86_400, description="a device is out for this long before it is checked; doubles, with a bound"
    )
    worker_lease_s: float = Field(
        30.0, ge=3, le=3600, description="a worker that is not renewed for this long serves nobody; replaced then"
    )
    hang_s: float = Field(60.0, ge=1, le=3600, description="an engine with requests and no step for this long hangs")
    probe_s: float = Field(30.0, ge=1, le=3600, description="an idle engine is asked for a token this often")
    events_kept: int = Field(2000, ge=10, le=1_000_000, description="events held for `events`; older ones go")


class RoutersSpec(SpecPart):
    """The token routers."""

    count: int = Field(1, ge=0, le=1024, description="routers on the head node, sharing its port; 0: none")
    per_node: bool = Field(False, description="`count` routers on every node instead")
    host: str | None = Field(None, min_length=1, description="address they bind; unset: " + HOST_RULE)
    port: int = Field(7701, ge=0, le=65_535, description="0: any free one; several routers then have one each")
    policy: str = Field("least_tokens", description=ALLOWED)
    admission: AdmissionConfig = AdmissionConfig()
    resume: ResumeConfig = ResumeConfig()
    breaker: BreakerConfig = BreakerConfig()
    limits: LimitsConfig = LimitsConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    leases: LeaseConfig = LeaseConfig()
    request_log: bool = Field(False, description="one JSON line a finished request, without its prompt")


class EdgeSpec(SpecPart):
    """The OpenAI-compatible HTTP doors."""

    count: int = Field(1, ge=0, le=1024, description="edges on the head node, sharing its port; 0: none")
    per_node: bool = Field(False, description="`count` edges on every node instead")
    host: str | None = Field(None, min_length=1, description="address they bind; unset: " + HOST_RULE)
    port: int = Field(8000, ge=0, le=65_535, description="0: any free one")
    max_requests: int = Field(16_384, ge=1, le=1_000_000, description="requests running at once; more get 429")
    access_log: bool = Field(False, description="one line a request; never with a prompt or a key")


class AgentsSpec(SpecPart):
    """The throughput agents, one on every node that serves."""

    enabled: bool = Field(True, description="sum tokens per second over the cluster")
    tick_s: float = Field(1.0, ge=0.05, le=60, description="time between two sums")
    deadline_s: float = Field(2.0, gt=0, le=60, description="limit on one sum before its epoch ends")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="nccl is RCCL on ROCm; auto: by device")
    device: int = Field(0, ge=0, le=1023, description="where nccl reduces; a node's label agent_device says otherwise")
    host: str | None = Field(None, min_length=1, description="address they bind; unset: " + HOST_RULE)


class TlsSpec(SpecPart):
    """Certificates. The same files must exist on every node."""

    cert_file: Path = Field(description="PEM chain that servers show")
    key_file: Path = Field(description="PEM key of cert_file")
    ca_file: Path = Field(description="PEM bundle that clients trust")
    mutual: bool = Field(False, description="clients must show a certificate of ca_file too (mTLS)")
    server_name: str | None = Field(None, description="name in the certificates, when it is not the address")

    def server(self) -> ServerTls:
        """What every server of the cluster shows."""
        client_ca = self.ca_file if self.mutual else None
        return ServerTls(cert_file=self.cert_file, key_file=self.key_file, client_ca_file=client_ca)

    def client(self) -> ClientTls:
        """How a process of the cluster, or the command line, proves itself to the others."""
        own = (self.cert_file, self.key_file) if self.mutual else (None, None)
        return ClientTls(ca_file=self.ca_file, cert_file=own[0], key_file=own[1], server_name=self.server_name)


class SecuritySpec(SpecPart):
    """Who may talk to the cluster."""

    tls: TlsSpec | None = Field(None, description="unset: plain text")
    api_keys_file: Path | None = Field(None, description="JSON of hashed keys; unset: no key is asked for")

    @property
    def server_tls(self) -> ServerTls | None:
        return None if self.tls is None else self.tls.server()

    @property
    def client_tls(self) -> ClientTls | None:
        return None if self.tls is None else self.tls.client()


class NetworkSpec(SpecPart):
    """How nodes reach each other."""

    interface: str | None = Field(None, description="for Gloo, NCCL, RCCL; unset: that of the node's address")
    env: dict[str, str] = Field(default_factory=dict, description="e.g. NCCL_IB_HCA; for every engine and agent")

    @model_validator(mode="after")
    def _leaves_devices_to_the_plan(self) -> Self:
        refuse_visible_devices(self.env)
        return self
