from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AssignRequest(_message.Message):
    __slots__ = ("model", "prompt_tokens", "max_tokens", "affinity", "lora", "site", "prefix_hashes", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASHES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt_tokens: int
    max_tokens: int
    affinity: str
    lora: str
    site: str
    prefix_hashes: _containers.RepeatedScalarFieldContainer[int]
    request_id: str
    def __init__(self, model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., affinity: _Optional[str] = ..., lora: _Optional[str] = ..., site: _Optional[str] = ..., prefix_hashes: _Optional[_Iterable[int]] = ..., request_id: _Optional[str] = ...) -> None: ...

class AssignResponse(_message.Message):
    __slots__ = ("lease", "replica", "address", "incarnation", "ttl_ms", "request_id")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    lease: str
    replica: str
    address: str
    incarnation: int
    ttl_ms: int
    request_id: str
    def __init__(self, lease: _Optional[str] = ..., replica: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease", "generated_tokens", "failed")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    lease: str
    generated_tokens: int
    failed: bool
    def __init__(self, lease: _Optional[str] = ..., generated_tokens: _Optional[int] = ..., failed: bool = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeasesRequest(_message.Message):
    __slots__ = ("release", "assign")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    release: _containers.RepeatedCompositeFieldContainer[ReleaseRequest]
    assign: _containers.RepeatedCompositeFieldContainer[AssignRequest]
    def __init__(self, release: _Optional[_Iterable[_Union[ReleaseRequest, _Mapping]]] = ..., assign: _Optional[_Iterable[_Union[AssignRequest, _Mapping]]] = ...) -> None: ...

class LeasesResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[AssignOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[AssignOutcome, _Mapping]]] = ...) -> None: ...

class AssignOutcome(_message.Message):
    __slots__ = ("lease", "code", "message", "retry_after_ms")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    lease: AssignResponse
    code: int
    message: str
    retry_after_ms: int
    def __init__(self, lease: _Optional[_Union[AssignResponse, _Mapping]] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model", "max_model_len", "vocab_size", "ready_replicas")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    READY_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    model: str
    max_model_len: int
    vocab_size: int
    ready_replicas: int
    def __init__(self, model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., ready_replicas: _Optional[int] = ...) -> None: ...

class GetRouterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouterStatus(_message.Message):
    __slots__ = ("router", "membership_epoch", "membership_version", "running", "queued", "requests_started", "requests_finished", "requests_failed", "requests_refused", "resumes", "prompt_tokens", "generated_tokens", "replicas", "ttft_ms", "itl_ms", "ceiling", "held_back_by", "draining", "models")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_STARTED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    ITL_MS_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_BY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    router: str
    membership_epoch: int
    membership_version: int
    running: int
    queued: int
    requests_started: int
    requests_finished: int
    requests_failed: int
    requests_refused: int
    resumes: int
    prompt_tokens: int
    generated_tokens: int
    replicas: _containers.RepeatedCompositeFieldContainer[RouterReplica]
    ttft_ms: _containers.RepeatedScalarFieldContainer[float]
    itl_ms: _containers.RepeatedScalarFieldContainer[float]
    ceiling: float
    held_back_by: str
    draining: bool
    models: _containers.RepeatedCompositeFieldContainer[RouterModel]
    def __init__(self, router: _Optional[str] = ..., membership_epoch: _Optional[int] = ..., membership_version: _Optional[int] = ..., running: _Optional[int] = ..., queued: _Optional[int] = ..., requests_started: _Optional[int] = ..., requests_finished: _Optional[int] = ..., requests_failed: _Optional[int] = ..., requests_refused: _Optional[int] = ..., resumes: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[RouterReplica, _Mapping]]] = ..., ttft_ms: _Optional[_Iterable[float]] = ..., itl_ms: _Optional[_Iterable[float]] = ..., ceiling: _Optional[float] = ..., held_back_by: _Optional[str] = ..., draining: bool = ..., models: _Optional[_Iterable[_Union[RouterModel, _Mapping]]] = ...) -> None: ...

class RouterModel(_message.Message):
    __slots__ = ("model", "arrived_requests", "arrived_work_s", "measured", "queued", "queued_work_s", "running", "first_token", "between_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_WORK_S_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_WORK_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BETWEEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    arrived_requests: int
    arrived_work_s: float
    measured: bool
    queued: int
    queued_work_s: float
    running: int
    first_token: _containers.RepeatedScalarFieldContainer[int]
    between_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., arrived_requests: _Optional[int] = ..., arrived_work_s: _Optional[float] = ..., measured: bool = ..., queued: _Optional[int] = ..., queued_work_s: _Optional[float] = ..., running: _Optional[int] = ..., first_token: _Optional[_Iterable[int]] = ..., between_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class RouterReplica(_message.Message):
    __slots__ = ("replica", "model", "state", "in_flight", "outstanding_tokens", "decode_tokens_per_s", "prefill_tokens_per_s", "running", "waiting", "kv_usage", "generated_tokens", "rtt_ms")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RTT_MS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    model: str
    state: str
    in_flight: int
    outstanding_tokens: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    running: int
    waiting: int
    kv_usage: float
    generated_tokens: int
    rtt_ms: float
    def __init__(self, replica: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[str] = ..., in_flight: _Optional[int] = ..., outstanding_tokens: _Optional[int] = ..., decode_tokens_per_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., generated_tokens: _Optional[int] = ..., rtt_ms: _Optional[float] = ...) -> None: ...
