"""The configuration of one worker process: one JSON file, read once at start.

The control plane writes it; nothing else in the worker reads files or the environment for settings.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatoken.tls import ServerTls
from megatoken.tracing import TracingConfig


class FaultConfig(BaseModel):
    """A fault that the simulated engine makes by itself, once: `after_s`, `after_tokens` or `on_token`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["die", "hang", "slow"] = Field(description="die: the engine is gone; hang: no step; slow: long steps")
    after_s: float | None = Field(default=None, ge=0, description="seconds from ready")
    after_tokens: int | None = Field(default=None, ge=0, description="generated tokens of this worker")
    on_token: int | None = Field(default=None, ge=0, description="a prompt with this token joins the batch: a poison")
    factor: float = Field(default=10.0, gt=1, le=1000, description="slow: how many times longer a step takes")

    @model_validator(mode="after")
    def _one_trigger(self) -> FaultConfig:
        if sum(trigger is not None for trigger in (self.after_s, self.after_tokens, self.on_token)) != 1:
            raise ValueError("give exactly one of after_s, after_tokens and on_token")
        return self


class SimulatedConfig(BaseModel):
    """How the simulated engine behaves. For tests and scale work; it runs no model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_tokens_per_s: float = Field(default=4000.0, gt=0, description="generated tokens/s with a full batch")
    prefill_tokens_per_s: float = Field(default=100_000.0, gt=0, description="prompt tokens/s")
    max_running: int = Field(default=256, ge=1, le=65_536, description="requests in a batch")
    step_s: float | None = Field(
        default=None, gt=0, le=10, description="seconds of a decode step; unset: max_running / decode_tokens_per_s"
    )
    max_model_len: int = Field(
        131_072, ge=2, description="tokens of prompt and answer; WorkerConfig.max_model_len wins"
    )
    vocab_size: int = Field(default=49_152, ge=16, description="token ids are below this")
    block_size: int = Field(default=16, ge=1, description="tokens of a KV block")
    kv_cache_tokens: int = Field(default=4_000_000, ge=16, description="tokens that fit the KV cache")
    prefill_chunk_tokens: int = Field(default=8192, ge=16, description="prompt tokens a step takes at most")
    eos_token_id: int = Field(default=2, ge=0, description="token that ends a request; see eos_every")
    eos_every: int = Field(default=0, ge=0, description="about one token in this many is end-of-sequence; 0: never")
    start_s: float = Field(default=0.0, ge=0, le=600, description="seconds that starting takes")
    seed: int = Field(default=0, ge=0, description="another seed is another 'model': other tokens for the same prompt")
    faults: tuple[FaultConfig, ...] = Field(default=(), description="faults to make")


class WorkerConfig(BaseModel):
    """What one worker serves, where, and with which engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: str = Field(min_length=1, max_length=128, description="id of the replica, unique in the cluster's life")
    process_tag: str = Field(default="", max_length=200, description="marks its processes on a node; empty: replica")
    incarnation: int = Field(
        default_factory=time.time_ns, ge=1, description="unique to this process; counters belong to it"
    )
    model: str = Field(min_length=1, max_length=256, description="name that requests ask for")
    engine: Literal["vllm", "simulated"] = Field(default="vllm", description="what generates tokens")
    source: str = Field(default="", description="builtin:NAME, a directory, or a Hugging Face id; simulated needs none")
    weights: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of each file that the source must have; empty: any"
    )
    weights_of: str = Field(default="", description="with weights: whose they are, for the error")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=0, ge=0, le=65_535, description="port to listen on; 0: any free one")
    advertise_host: str | None = Field(default=None, description="host that others reach this worker by; unset: host")
    metrics_port: int | None = Field(
        default=0, ge=0, le=65_535, description="HTTP port of /metrics; 0: any; null: none"
    )
    counters_dir: str = Field(description="directory of the node's counter files")
    node: str = Field(default="local", description="Ray node this worker runs on")
    site: str = Field(default="", description="site of the node")
    device_kind: str = Field(default="cpu", description='e.g. "cpu", "MI355X"')
    devices: tuple[str, ...] = Field(
        default=(), description='one line a rank, in rank order: "rank 0: node-a device 0"'
    )

    tensor_parallel: int = Field(default=1, ge=1, description="ranks a layer is split over")
    pipeline_parallel: int = Field(default=1, ge=1, description="stages the layers are split over")
    data_parallel: int = Field(default=1, ge=1, description="engine cores behind this worker")
    expert_parallel: bool = Field(default=False, description="split experts, not their layers, over the ranks")
    dtype: str = Field(default="auto", description="weights' type, as vLLM names it")
    max_model_len: int | None = Field(
        default=None, ge=2, description="tokens of prompt and answer; unset: the model's own"
    )
    max_running: int | None = Field(default=None, ge=1, description="requests in a batch; unset: the engine's default")
    kv_cache_gib: float | None = Field(default=None, gt=0, description="KV cache on a CPU node; unset: 1 GiB on CPU")
    cpu_threads: int | None = Field(
        default=None, ge=1, description="threads of a rank on CPU; unset: its share of the cores it may use"
    )
    cpu_ranks: int | None = Field(
        default=None, ge=1, description="ranks that share these cores, other replicas' included; unset: its own"
    )
    engine_args: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments, by its names")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the engine's processes")
    simulated: SimulatedConfig | None = Field(default=None, description="settings of the simulated engine")
    ray_address: str | None = Field(default=None, description="Ray cluster of the ranks; with placement_group_id")
    placement_group_id: str | None = Field(default=None, description="hex id; set: vLLM's Ray executor runs in it")
    rank_devices: tuple[int, ...] = Field(
        default=(), description="with placement_group_id: the planned device of each rank on its node"
    )

    max_requests: int = Field(
        default=32_768, ge=1, le=1_000_000, description="requests taken at once; more get OVERLOADED"
    )
    max_message_mib: int = Field(default=64, ge=1, le=1024, description="largest gRPC message")
    start_timeout_s: float = Field(default=900.0, gt=0, description="limit on the engine's start")
    lease_s: float | None = Field(
        default=None,
        gt=0,
        description="not renewed by the controller for this long, it serves nobody; unset: runs alone",
    )
    stop_timeout_s: float = Field(default=5.0, ge=0, description="on SIGTERM, how long running requests may go on")
    tracing: TracingConfig | None = Field(default=None, description="unset: no spans")
    tls: ServerTls | None = Field(default=None, description="unset: plain text")
    credentials_file: Path | None = Field(
        default=None, description="mode 600, from the control plane: what it shows and accepts; unset: no gate"
    )
    unguarded: bool = Field(default=False, description="without credentials_file: let everybody in who reaches host")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="of this process and its engine"
    )

    @model_validator(mode="after")
    def _fits_engine(self) -> WorkerConfig:
        if self.engine == "vllm" and not self.source:
            raise ValueError("source is needed with engine vllm: builtin:NAME, a directory, or a Hugging Face id")
        if self.engine == "simulated" and self.simulated is None:
            raise ValueError("simulated is needed with engine simulated; {} takes every default")
        if self.engine == "vllm" and self.expert_parallel and self.device_kind == "cpu":
            raise ValueError("expert_parallel is not allowed on CPU devices; vLLM 0.32's kernels there crash")
        if (self.placement_group_id is None) != (self.ray_address is None):
            raise ValueError("placement_group_id and ray_address go together")
        if self.placement_group_id is not None and len(self.rank_devices) != self.world_size:
            raise ValueError(f"rank_devices: {len(self.rank_devices)} devices for {self.world_size} ranks; one each")
        return self

    @property
    def tag(self) -> str:
        """By which its processes are found on a node."""
        return self.process_tag or self.replica

    @property
    def world_size(self) -> int:
        """Ranks of one engine core."""
        return self.tensor_parallel * self.pipeline_parallel

    def threads(self, cores: int, ranks: int | None = None) -> int:
        """Threads of one rank on a CPU whose `cores` so many ranks share; None: as many as when it was started."""
        return self.cpu_threads or max(1, cores // (ranks or self.cpu_ranks or self.world_size))
