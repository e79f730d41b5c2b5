"""EdgeConfig: everything an edge process is told, read once from one JSON file at the entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatoken.tls import ClientTls, ServerTls
from megatoken.tokens.wire import MAX_REQUEST_BYTES
from megatoken.tracing import TracingConfig


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EdgeModel(_Part):
    """One model that the edge offers: its tokenizer, chat template and parsers. Weights are never read."""

    name: str = Field(
        min_length=1, max_length=256, description="the model's name at the router, and the first at the edge"
    )
    source: str = Field(min_length=1, description="builtin:NAME (made before), a directory, or a Hugging Face id")
    served_names: tuple[str, ...] = Field((), description="further names that requests may ask for")
    loras: tuple[str, ...] = Field((), description="adapters of the workers that may be asked for as models")
    dtype: str = Field("auto", description="as the workers have it; shown by some endpoints")
    max_model_len: int | None = Field(None, ge=2, description="as the workers have it; unset: the model's own")
    chat_template: str | None = Field(None, description="a Jinja file, or the template itself; unset: the tokenizer's")
    tool_parser: str | None = Field(None, description="vLLM's --tool-call-parser; turns automatic tool choice on")
    reasoning_parser: str | None = Field(None, description="vLLM's --reasoning-parser")
    fast_stream: bool = Field(True, description="write plain streams without vLLM's per-chunk layer; same bytes")
    trust_remote_code: bool = Field(False, description="run code that comes with the tokenizer or config")
    extra_args: dict[str, Any] = Field(
        default_factory=dict, description='further arguments of `vllm serve`, by their names: {"response_role": "bot"}'
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may ask for, the router's first."""
        return (self.name, *(name for name in self.served_names if name != self.name))


class EdgeLimits(_Part):
    """What one edge takes on."""

    max_requests: int = Field(default=16_384, ge=1, description="requests running at once; more get 429")
    max_body_bytes: int = Field(default=16 << 20, ge=1024, description="largest HTTP request body; more gets 413")
    max_request_bytes: int = Field(
        default=MAX_REQUEST_BYTES, ge=1024, le=32 << 20, description="as the router has it; a larger request gets 400"
    )
    request_timeout_s: float = Field(default=0.0, ge=0, description="deadline given to each request; 0: none")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="wait for the router before a request gets 503")
    router_return_s: float = Field(
        default=30.0, ge=0, description="how long a running request waits for a lost router to be back; 0: it fails"
    )
    drain_s: float = Field(default=30.0, ge=0, description="how long running requests may still take after SIGTERM")
    keep_alive_s: float = Field(default=75.0, gt=0, description="an idle HTTP connection is closed after this")


class EdgeConfig(_Part):
    """One edge process."""

    edge: str = Field(min_length=1, description="unique id of this edge")
    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(0, ge=0, le=65535, description="0: any free port")
    reuse_port: bool = Field(False, description="share the port with other edges of this node (SO_REUSEPORT)")
    advertise_host: str | None = Field(None, description="host that others reach it by; unset: host")
    router: str = Field(pattern=r"^.+:\d+$", description="host:port of the router")
    router_tls: ClientTls | None = Field(None, description="unset: plain text")
    router_key: str | None = Field(None, description="API key that the router asks for")
    models: tuple[EdgeModel, ...] = Field(min_length=1, description="what is offered")
    tls: ServerTls | None = Field(None, description="unset: plain HTTP")
    api_keys_file: Path | None = Field(None, description="JSON of hashed keys; unset: no key is asked for")
    site: str = Field("", description="where the edge is; passed on with requests")
    limits: EdgeLimits = EdgeLimits()
    metrics_host: str = Field("127.0.0.1", description="address of /metrics and /version, which ask for no key")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="0: any free one; unset: they are not served")
    tracing: TracingConfig | None = Field(default=None, description="unset: no spans")
    access_log: bool = Field(False, description="one line a request; never with a prompt or a key")
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        seen: set[str] = set()
        for model in self.models:
            for name in (*model.names, *model.loras):
                if name in seen:
                    raise ValueError(f"models: the name {name!r} is given twice; each may be given once")
                seen.add(name)
        return self
