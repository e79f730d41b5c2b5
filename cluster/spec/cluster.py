"""The spec: the document that says what a cluster should be.

Pure values; loading text is load.py, and what needs the machine (ports, a model's config.json) is
cluster/planning/check.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from megatoken.cluster.spec.model import ModelSpec, SpecPart, require_policy
from megatoken.cluster.spec.services import (
    ANY_PORT,
    METRICS_OFFSET,
    AgentsSpec,
    ControlSpec,
    EdgeSpec,
    NetworkSpec,
    RaySpec,
    RoutersSpec,
    SecuritySpec,
)
from megatoken.tracing import TracingConfig

DEFAULT_CLUSTER = "default"
DEFAULT_MODEL = "smollm2-135m-instruct"


class ClusterSpec(SpecPart):
    """A whole cluster."""

    cluster: str = Field(
        DEFAULT_CLUSTER, pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="name: lower case, digits and dashes"
    )
    ray: RaySpec = RaySpec()
    control: ControlSpec = ControlSpec()
    models: tuple[ModelSpec, ...] = Field((), max_length=10_000, description="what is served")
    routers: RoutersSpec = RoutersSpec()
    edge: EdgeSpec = EdgeSpec()
    agents: AgentsSpec = AgentsSpec()
    security: SecuritySpec = SecuritySpec()
    network: NetworkSpec = NetworkSpec()
    tracing: TracingConfig | None = Field(None, description="OpenTelemetry spans of requests; unset: none")
    launch: dict[str, Any] | None = Field(None, description="how machines are brought up; see `megatoken render`")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="of every process")

    @field_validator("models")
    @classmethod
    def _names_once(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        names = Counter(name for model in models for name in {model.name, *model.served_names})
        for name, times in names.items():
            if times > 1:
                raise ValueError(f"the name {name!r} is given {times} times; a name belongs to one model")
        return models

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ports: dict[int, str] = {}
        for field, port in self.ports.items():
            if port in ports:
                raise ValueError(f"{field}: {port} is not allowed; {ports[port]} has that port already")
            if port != ANY_PORT:
                ports[port] = field
        require_policy("routers.policy", self.routers.policy)
        if self.edge.count and not self.routers.count:
            raise ValueError(
                f"routers.count: 0 is not allowed with edge.count {self.edge.count}; an edge needs a router"
            )
        if self.agents.deadline_s < self.agents.tick_s:
            raise ValueError(
                f"agents.deadline_s: {self.agents.deadline_s} is not allowed; at least tick_s = {self.agents.tick_s}"
            )
        known = {model.name for model in self.models}
        for model in self.models:
            for other in model.placement.anti_affinity:
                if other not in known:
                    raise ValueError(
                        f"models.{model.name}.placement.anti_affinity: {other!r} is not allowed; "
                        f"one of {', '.join(sorted(known))}"
                    )
        return self

    @property
    def ports(self) -> dict[str, int]:
        """Fixed ports by field; a service that does not run has none."""
        control = self.control
        metrics_port = control.metrics_port
        if metrics_port is None:
            metrics_port = control.port + METRICS_OFFSET if 0 < control.port <= 65_535 - METRICS_OFFSET else ANY_PORT
        ports = {"control.port": control.port, "control.metrics_port": metrics_port}
        if self.routers.count:
            ports["routers.port"] = self.routers.port
        if self.edge.count:
            ports["edge.port"] = self.edge.port
        return ports

    @property
    def width(self) -> int:
        """Devices that every wanted replica together needs."""
        return sum(model.replicas * model.parallel.width for model in self.models)

    def model(self, name: str) -> ModelSpec | None:
        """The model of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def with_replicas(self, name: str, replicas: int) -> ClusterSpec:
        """The same spec with another number of replicas of one model, checked."""
        models = tuple(
            ModelSpec.model_validate({**model.model_dump(), "replicas": replicas}) if model.name == name else model
            for model in self.models
        )
        return self.model_copy(update={"models": models})

    def with_model(self, changed: ModelSpec) -> ClusterSpec:
        """The same spec with one model in place of its namesake."""
        models = tuple(changed if model.name == changed.name else model for model in self.models)
        return self.model_copy(update={"models": models})


def default_spec() -> ClusterSpec:
    """The embedded default: one replica of the built-in model on this machine."""
    model = ModelSpec(
        name=DEFAULT_MODEL,
        source=f"builtin:{DEFAULT_MODEL}",
        dtype="bfloat16",
        max_model_len=2048,
        kv_cache_gib=1.0,
    )
    return ClusterSpec(models=(model,))
