"""What a spec says about one model: where it comes from, how wide it is, where it may stand, how it is updated.

Values only, each bounded and described; cluster.py holds the whole document and cluster/planning/check.py what needs
the machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatoken.cluster.inventory.topology import CPU_KIND
from megatoken.cluster.placement.values import Separate, TpSpan
from megatoken.cluster.spec.autoscale import AutoscaleSpec
from megatoken.router.policies.names import ALLOWED, parse_policy
from megatoken.worker.config import SimulatedConfig

# Workers neither start several engine cores nor tell routers of adapters, so a spec that counts on either is refused.
NO_DATA_PARALLEL = "one replica runs one engine core; ask for more `replicas` instead"
NO_CPU_EXPERTS = "vLLM 0.32's CPU kernels crash when experts are split over ranks, where tensor splits each expert"
NO_ADAPTERS = "adapters are not served; merge each into its base model and serve that as a model of its own"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
CONTROL_FIELDS = (
    *("replicas", "autoscale", "policy", "drain_timeout_s", "start_timeout_s", "update", "standalone_tokens_per_s"),
)


CHOSEN = "VISIBLE_DEVICES"  # ends the names by which drivers are told which devices there are


class SpecPart(BaseModel):
    """A section of the spec: immutable, and a field it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def refuse_visible_devices(env: dict[str, str]) -> None:
    """Raises ValueError for an environment that would take the choice of devices from the plan."""
    for name in env:
        if name.endswith(CHOSEN):
            raise ValueError(f"env.{name} is not allowed; the plan chooses devices among those that a node's Ray has")


def require_policy(field: str, policy: str) -> None:
    """Raises ValueError for a routing policy that a spec may not name."""
    try:
        weights = parse_policy(policy)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    if "lora" in weights:  # routers know it, for workers that state adapters
        raise ValueError(f"{field}: 'lora' is not allowed; {NO_ADAPTERS}")


class ParallelSpec(SpecPart):
    """How one replica is split over devices."""

    tensor: int = Field(1, ge=1, le=1024, description="ranks a layer is split over; divides the attention heads")
    pipeline: int = Field(1, ge=1, le=1024, description="stages the layers are split over; at most the layers")
    data: int = Field(1, ge=1, le=1024, description="engine cores behind one worker: 1 so far")
    expert: int = Field(
        1, ge=1, le=1024, description="ranks the experts are split over: 1 (off) or tensor x data, as vLLM has it"
    )

    @model_validator(mode="after")
    def _one_engine_core(self) -> Self:
        if self.data > 1:
            raise ValueError(f"data: {self.data} is not allowed; {NO_DATA_PARALLEL}")
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.expert not in (1, self.tensor * self.data):
            raise ValueError(f"expert: {self.expert} is not allowed; 1, or tensor x data = {self.tensor * self.data}")
        return self

    @property
    def width(self) -> int:
        """Devices of one replica."""
        return self.tensor * self.pipeline * self.data


class PlacementSpec(SpecPart):
    """Where a model's replicas may stand. Empty means anywhere."""

    device_kinds: tuple[str, ...] = Field((), description='e.g. ["mi355x"], ["cpu"]; lower case, without the vendor')
    sites: tuple[str, ...] = Field((), description="sites that may be used")
    nodes: tuple[str, ...] = Field((), description="node ids, names or addresses that may be used")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels a node must carry, with values")
    separate: Separate = Field(Separate.NONE, description="what two replicas may not share: none, node or rack")
    anti_affinity: tuple[str, ...] = Field((), description="models whose replicas may not share a node with these")
    tensor_span: TpSpan = Field(TpSpan.LINK, description="how far a TP group may reach: link, node, or any")
    cross_site: bool = Field(False, description="whether one replica's stages may stand in different sites")


class UpdateSpec(SpecPart):
    """How running replicas are exchanged when the model's spec changes."""

    surge: int = Field(1, ge=0, le=64, description="replicas above the wanted number while updating, where they fit")
    attempts: int = Field(2, ge=1, le=20, description="failed starts of the new spec before it is rolled back")


class ModelSpec(SpecPart):
    """One model and its replicas."""

    name: str = Field(min_length=1, max_length=128, pattern=NAME_PATTERN, description="what requests ask for")
    source: str = Field("", description="builtin:NAME, a directory, or a Hugging Face id; simulated needs none")
    engine: Literal["vllm", "simulated"] = Field("vllm", description="simulated runs no model: for tests only")
    replicas: int = Field(1, ge=0, le=100_000, description="copies wanted; with autoscale: at first")
    autoscale: AutoscaleSpec | None = Field(None, description="how many replicas there should be follows the load")
    parallel: ParallelSpec = ParallelSpec()
    placement: PlacementSpec = PlacementSpec()
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"] = Field("auto", description="of weights")
    max_model_len: int | None = Field(None, ge=2, le=100_000_000, description="tokens a request; unset: the model's")
    max_running: int | None = Field(None, ge=1, le=65_536, description="requests in a batch; unset: the engine's")
    kv_cache_gib: float | None = Field(None, gt=0, le=1_000_000, description="KV cache of a replica on a CPU node")
    cpu_threads: int | None = Field(None, ge=1, le=4096, description="threads of an engine on CPU; unset: its share")
    device_memory_gib: float = Field(0.0, ge=0, le=100_000, description="need of the fullest rank; 0: estimated")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="further vLLM arguments, by its names")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the engine's processes")
    simulated: SimulatedConfig | None = Field(None, description="how a simulated engine behaves")
    policy: str | None = Field(None, description=f"routing policy: {ALLOWED}; unset: the routers'")
    served_names: tuple[str, ...] = Field((), max_length=64, description="further names at the edge")
    chat_template: Path | None = Field(None, description="Jinja file; unset: the tokenizer's own")
    tool_parser: str | None = Field(None, description="vLLM's tool-call parser for this model")
    reasoning_parser: str | None = Field(None, description="vLLM's reasoning parser for this model")
    trust_remote_code: bool = Field(False, description="run code that comes with the tokenizer or config")
    drain_timeout_s: float = Field(60.0, ge=0, le=86_400, description="what running requests get before a stop")
    start_timeout_s: float = Field(900.0, gt=0, le=86_400, description="limit on a replica's start")
    update: UpdateSpec = UpdateSpec()
    standalone_tokens_per_s: dict[str, float] = Field(
        default_factory=dict, description="measured rate of one replica alone by device kind, for scaling efficiency"
    )

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.engine == "vllm" and not self.source:
            raise ValueError("source is missing; builtin:NAME, a directory, or a Hugging Face id")
        if self.engine == "vllm" and self.simulated is not None:
            raise ValueError("simulated is given, but engine is 'vllm'; drop it or set engine: simulated")
        if self.policy is not None:
            require_policy("policy", self.policy)
        for name in self.engine_args:
            words = name.lstrip("-").replace("-", "_").lower()
            if "lora" in words:
                raise ValueError(f"engine_args.{name} is not allowed; {NO_ADAPTERS}")
            if words.startswith("data_parallel"):
                raise ValueError(f"engine_args.{name} is not allowed; {NO_DATA_PARALLEL}")
            if words == "enable_expert_parallel":
                raise ValueError(f"engine_args.{name} is not allowed; use parallel.expert")
        kinds = self.placement.device_kinds
        if self.engine == "vllm" and self.parallel.expert > 1 and (not kinds or CPU_KIND in kinds):
            raise ValueError(
                f"parallel.expert: {self.parallel.expert} needs placement.device_kinds that name accelerators; "
                f"{NO_CPU_EXPERTS}"
            )
        refuse_visible_devices(self.env)
        if self.name in self.placement.anti_affinity and self.replicas > 1:
            raise ValueError("placement.anti_affinity names the model itself; use placement.separate: node")
        return self

    @property
    def revision(self) -> str:
        """Ten hex digits that change exactly when running replicas must be exchanged."""
        settled = self.model_dump(mode="json", exclude=set(CONTROL_FIELDS))
        return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:10]
