"""The configuration of one throughput agent: one JSON file, read once at start."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatoken.tls import ClientTls, ServerTls

GLOO_FORM_S: Final = 2.0
NCCL_FORM_S: Final = 30.0


class AgentConfig(BaseModel):
    """Whose counters an agent sums, with whom, and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    agent: str = Field(
        default_factory=lambda: f"agent-{uuid.uuid4().hex[:12]}",
        min_length=1,
        max_length=128,
        description="id of this process: a restarted agent takes a new one",
    )
    node: str = Field(min_length=1, max_length=256, description="node whose counters it reads")
    site: str = Field("", max_length=128, description="site of the node; empty: none declared")
    host: str = Field("127.0.0.1", description="address to listen on, for gRPC, the rendezvous store and metrics")
    port: int = Field(0, ge=0, le=65_535, description="port of the Throughput service; 0: any free one")
    store_port: int = Field(0, ge=0, le=65_535, description="port of the rendezvous store; 0: any free one")
    advertise_host: str | None = Field(None, description="host that others reach this agent by; unset: host")
    metrics_port: int | None = Field(0, ge=0, le=65_535, description="HTTP port of /metrics; 0: any; null: none")
    controllers: tuple[str, ...] = Field(min_length=1, max_length=16, description="host:port of the controllers")
    counters_dir: str = Field(min_length=1, description="directory of the node's counter files")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="auto: nccl where a CUDA or ROCm device is (RCCL on ROCm), else gloo"
    )
    device: int = Field(0, ge=0, le=1023, description="index of the device that nccl reduces on")
    interface: str | None = Field(None, max_length=64, description="network interface of the collective; unset: host's")
    tick_s: float = Field(1.0, ge=0.05, le=60, description="seconds between two sums")
    deadline_s: float = Field(1.0, ge=0.1, le=60, description="seconds a sum may take before it counts as incomplete")
    form_deadline_s: float | None = Field(
        None, ge=0.1, le=120, description="seconds that forming a group may take; unset: 2, with nccl 30"
    )
    attend_s: float = Field(0.5, ge=0.02, le=10, description="seconds between two signs of life to the controller")
    standalone_rates: dict[str, float] = Field(
        default_factory=dict,
        description="generated tokens/s of one replica alone, by 'MODEL@DEVICE_KIND', 'MODEL' or 'DEVICE_KIND'",
    )
    tls: ServerTls | None = Field(None, description="of the Throughput service; unset: plain text")
    controller_tls: ClientTls | None = Field(None, description="towards the controllers; unset: plain text")
    credentials_file: Path | None = Field(
        default=None, description="mode 600, from the control plane: what it shows and accepts; unset: no gate"
    )
    unguarded: bool = Field(default=False, description="without credentials_file: let everybody in who reaches host")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")

    def forming_s(self, backend: str) -> float:
        """The limit on forming a group: nccl first makes a context and a communicator on the device."""
        if self.form_deadline_s is not None:
            return self.form_deadline_s
        return NCCL_FORM_S if backend.startswith("nccl") else GLOO_FORM_S

    @field_validator("controllers")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65_536:
                raise ValueError(f"{address!r} is not host:port")
        return value

    @field_validator("standalone_rates")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, rate in value.items():
            if not rate > 0:
                raise ValueError(f"{name}: a rate of {rate} tokens/s; it must be above 0")
        return value

    @property
    def reachable_host(self) -> str:
        """The host that others dial."""
        return self.advertise_host or self.host

    @property
    def counters_path(self) -> str:
        """counters_dir without a trailing slash."""
        return os.path.normpath(self.counters_dir)
