from megatoken.v1 import throughput_pb2 as _throughput_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ApplyRequest(_message.Message):
    __slots__ = ("spec_yaml", "dry_run")
    SPEC_YAML_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    spec_yaml: str
    dry_run: bool
    def __init__(self, spec_yaml: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("generation", "changes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    changes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., changes: _Optional[_Iterable[str]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("model", "replicas", "dry_run")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    model: str
    replicas: int
    dry_run: bool
    def __init__(self, model: _Optional[str] = ..., replicas: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("generation", "changes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    changes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., changes: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainTargetRequest(_message.Message):
    __slots__ = ("replica", "node", "timeout_s", "undo")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    replica: str
    node: str
    timeout_s: float
    undo: bool
    def __init__(self, replica: _Optional[str] = ..., node: _Optional[str] = ..., timeout_s: _Optional[float] = ..., undo: bool = ...) -> None: ...

class DrainTargetResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class CordonRequest(_message.Message):
    __slots__ = ("node", "device", "reason", "undo")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    node: str
    device: int
    reason: str
    undo: bool
    def __init__(self, node: _Optional[str] = ..., device: _Optional[int] = ..., reason: _Optional[str] = ..., undo: bool = ...) -> None: ...

class CordonResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("points", "events")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[HistoryPoint]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, points: _Optional[_Iterable[_Union[HistoryPoint, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class HistoryPoint(_message.Message):
    __slots__ = ("unix_s", "seconds", "model", "counted", "tokens_per_s", "capacity_tokens_per_s", "lost", "ready", "wanted", "device_seconds", "resumed", "refused")
    class DeviceSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    seconds: float
    model: str
    counted: _throughput_pb2.Totals
    tokens_per_s: float
    capacity_tokens_per_s: float
    lost: _containers.RepeatedCompositeFieldContainer[LostRate]
    ready: int
    wanted: int
    device_seconds: _containers.ScalarMap[str, float]
    resumed: int
    refused: int
    def __init__(self, unix_s: _Optional[float] = ..., seconds: _Optional[float] = ..., model: _Optional[str] = ..., counted: _Optional[_Union[_throughput_pb2.Totals, _Mapping]] = ..., tokens_per_s: _Optional[float] = ..., capacity_tokens_per_s: _Optional[float] = ..., lost: _Optional[_Iterable[_Union[LostRate, _Mapping]]] = ..., ready: _Optional[int] = ..., wanted: _Optional[int] = ..., device_seconds: _Optional[_Mapping[str, float]] = ..., resumed: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("cluster", "generation", "membership_epoch", "membership_version", "unix_s", "controller", "ray_address", "nodes", "models", "replicas", "processes", "throughput", "metrics_address", "efficiency")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_VERSION_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    RAY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EFFICIENCY_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    generation: int
    membership_epoch: int
    membership_version: int
    unix_s: float
    controller: str
    ray_address: str
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    processes: _containers.RepeatedCompositeFieldContainer[ProcessStatus]
    throughput: _throughput_pb2.ThroughputSample
    metrics_address: str
    efficiency: _containers.RepeatedCompositeFieldContainer[ModelEfficiency]
    def __init__(self, cluster: _Optional[str] = ..., generation: _Optional[int] = ..., membership_epoch: _Optional[int] = ..., membership_version: _Optional[int] = ..., unix_s: _Optional[float] = ..., controller: _Optional[str] = ..., ray_address: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., processes: _Optional[_Iterable[_Union[ProcessStatus, _Mapping]]] = ..., throughput: _Optional[_Union[_throughput_pb2.ThroughputSample, _Mapping]] = ..., metrics_address: _Optional[str] = ..., efficiency: _Optional[_Iterable[_Union[ModelEfficiency, _Mapping]]] = ...) -> None: ...

class ModelEfficiency(_message.Message):
    __slots__ = ("model", "capacity_tokens_per_s", "tokens_per_s", "lost", "held_back_by", "best")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_BY_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    capacity_tokens_per_s: float
    tokens_per_s: float
    lost: _containers.RepeatedCompositeFieldContainer[LostRate]
    held_back_by: str
    best: _containers.RepeatedCompositeFieldContainer[BestRate]
    def __init__(self, model: _Optional[str] = ..., capacity_tokens_per_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., lost: _Optional[_Iterable[_Union[LostRate, _Mapping]]] = ..., held_back_by: _Optional[str] = ..., best: _Optional[_Iterable[_Union[BestRate, _Mapping]]] = ...) -> None: ...

class LostRate(_message.Message):
    __slots__ = ("cause", "tokens_per_s")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    cause: str
    tokens_per_s: float
    def __init__(self, cause: _Optional[str] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class BestRate(_message.Message):
    __slots__ = ("revision", "device_kind", "tokens_per_s", "running", "replica", "unix_s")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    revision: str
    device_kind: str
    tokens_per_s: float
    running: int
    replica: str
    unix_s: float
    def __init__(self, revision: _Optional[str] = ..., device_kind: _Optional[str] = ..., tokens_per_s: _Optional[float] = ..., running: _Optional[int] = ..., replica: _Optional[str] = ..., unix_s: _Optional[float] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node", "address", "site", "state", "device_kind", "devices", "devices_used", "devices_out", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_USED_FIELD_NUMBER: _ClassVar[int]
    DEVICES_OUT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    site: str
    state: str
    device_kind: str
    devices: int
    devices_used: int
    devices_out: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ..., site: _Optional[str] = ..., state: _Optional[str] = ..., device_kind: _Optional[str] = ..., devices: _Optional[int] = ..., devices_used: _Optional[int] = ..., devices_out: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "wanted", "ready", "blocked", "rollout", "running", "waiting", "generated_tokens_per_s", "source", "engine", "autoscaling", "blocked_kind")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALING_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_KIND_FIELD_NUMBER: _ClassVar[int]
    model: str
    wanted: int
    ready: int
    blocked: str
    rollout: str
    running: int
    waiting: int
    generated_tokens_per_s: float
    source: str
    engine: str
    autoscaling: Autoscaling
    blocked_kind: str
    def __init__(self, model: _Optional[str] = ..., wanted: _Optional[int] = ..., ready: _Optional[int] = ..., blocked: _Optional[str] = ..., rollout: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., generated_tokens_per_s: _Optional[float] = ..., source: _Optional[str] = ..., engine: _Optional[str] = ..., autoscaling: _Optional[_Union[Autoscaling, _Mapping]] = ..., blocked_kind: _Optional[str] = ...) -> None: ...

class Autoscaling(_message.Message):
    __slots__ = ("min_replicas", "max_replicas", "target", "why", "need", "load", "requests_per_s", "waiting", "ttft_p99_s", "itl_p99_s", "utilisation", "start_s")
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TTFT_P99_S_FIELD_NUMBER: _ClassVar[int]
    ITL_P99_S_FIELD_NUMBER: _ClassVar[int]
    UTILISATION_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    min_replicas: int
    max_replicas: int
    target: int
    why: str
    need: float
    load: float
    requests_per_s: float
    waiting: int
    ttft_p99_s: float
    itl_p99_s: float
    utilisation: float
    start_s: float
    def __init__(self, min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., target: _Optional[int] = ..., why: _Optional[str] = ..., need: _Optional[float] = ..., load: _Optional[float] = ..., requests_per_s: _Optional[float] = ..., waiting: _Optional[int] = ..., ttft_p99_s: _Optional[float] = ..., itl_p99_s: _Optional[float] = ..., utilisation: _Optional[float] = ..., start_s: _Optional[float] = ...) -> None: ...

class StartPhase(_message.Message):
    __slots__ = ("phase", "seconds")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    phase: str
    seconds: float
    def __init__(self, phase: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica", "model", "state", "reason", "engine", "address", "ranks", "age_s", "running", "waiting", "kv_usage", "generated_tokens_per_s", "generated_tokens", "incarnation", "spec_generation", "metrics_address", "node", "start_phase", "start_phases")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SPEC_GENERATION_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    START_PHASE_FIELD_NUMBER: _ClassVar[int]
    START_PHASES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    model: str
    state: str
    reason: str
    engine: str
    address: str
    ranks: _containers.RepeatedScalarFieldContainer[str]
    age_s: float
    running: int
    waiting: int
    kv_usage: float
    generated_tokens_per_s: float
    generated_tokens: int
    incarnation: int
    spec_generation: int
    metrics_address: str
    node: str
    start_phase: str
    start_phases: _containers.RepeatedCompositeFieldContainer[StartPhase]
    def __init__(self, replica: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., engine: _Optional[str] = ..., address: _Optional[str] = ..., ranks: _Optional[_Iterable[str]] = ..., age_s: _Optional[float] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., generated_tokens_per_s: _Optional[float] = ..., generated_tokens: _Optional[int] = ..., incarnation: _Optional[int] = ..., spec_generation: _Optional[int] = ..., metrics_address: _Optional[str] = ..., node: _Optional[str] = ..., start_phase: _Optional[str] = ..., start_phases: _Optional[_Iterable[_Union[StartPhase, _Mapping]]] = ...) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("name", "kind", "node", "state", "reason", "address", "metrics_address", "own_address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OWN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    node: str
    state: str
    reason: str
    address: str
    metrics_address: str
    own_address: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., node: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., own_address: _Optional[str] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("after_sequence", "follow")
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    after_sequence: int
    follow: bool
    def __init__(self, after_sequence: _Optional[int] = ..., follow: bool = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequence", "unix_s", "kind", "subject", "message", "cause", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    unix_s: float
    kind: str
    subject: str
    message: str
    cause: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, sequence: _Optional[int] = ..., unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ..., message: _Optional[str] = ..., cause: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetLogsRequest(_message.Message):
    __slots__ = ("name", "lines", "follow")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    name: str
    lines: int
    follow: bool
    def __init__(self, name: _Optional[str] = ..., lines: _Optional[int] = ..., follow: bool = ...) -> None: ...

class LogChunk(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("drain_timeout_s",)
    DRAIN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    drain_timeout_s: float
    def __init__(self, drain_timeout_s: _Optional[float] = ...) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RotateTokensRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RotateTokensResponse(_message.Message):
    __slots__ = ("operator_token",)
    OPERATOR_TOKEN_FIELD_NUMBER: _ClassVar[int]
    operator_token: str
    def __init__(self, operator_token: _Optional[str] = ...) -> None: ...
