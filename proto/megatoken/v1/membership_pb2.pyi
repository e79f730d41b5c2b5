from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_PHASE_UNSPECIFIED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_READY: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_DRAINING: _ClassVar[ReplicaPhase]
REPLICA_PHASE_UNSPECIFIED: ReplicaPhase
REPLICA_PHASE_READY: ReplicaPhase
REPLICA_PHASE_DRAINING: ReplicaPhase

class WatchRequest(_message.Message):
    __slots__ = ("watcher", "epoch", "version")
    WATCHER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    watcher: str
    epoch: int
    version: int
    def __init__(self, watcher: _Optional[str] = ..., epoch: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("epoch", "version", "replicas", "models", "throughput", "routers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUT_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaMember]
    models: _containers.RepeatedCompositeFieldContainer[ModelMember]
    throughput: ThroughputGroup
    routers: _containers.RepeatedCompositeFieldContainer[RouterMember]
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaMember, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelMember, _Mapping]]] = ..., throughput: _Optional[_Union[ThroughputGroup, _Mapping]] = ..., routers: _Optional[_Iterable[_Union[RouterMember, _Mapping]]] = ...) -> None: ...

class ReplicaMember(_message.Message):
    __slots__ = ("replica", "model", "address", "incarnation", "phase", "node", "site", "max_model_len", "vocab_size", "max_running", "block_size", "engine", "loras", "drain_deadline_unix_s", "device_kind", "devices")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    model: str
    address: str
    incarnation: int
    phase: ReplicaPhase
    node: str
    site: str
    max_model_len: int
    vocab_size: int
    max_running: int
    block_size: int
    engine: str
    loras: _containers.RepeatedScalarFieldContainer[str]
    drain_deadline_unix_s: float
    device_kind: str
    devices: int
    def __init__(self, replica: _Optional[str] = ..., model: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ..., phase: _Optional[_Union[ReplicaPhase, str]] = ..., node: _Optional[str] = ..., site: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_running: _Optional[int] = ..., block_size: _Optional[int] = ..., engine: _Optional[str] = ..., loras: _Optional[_Iterable[str]] = ..., drain_deadline_unix_s: _Optional[float] = ..., device_kind: _Optional[str] = ..., devices: _Optional[int] = ...) -> None: ...

class ModelMember(_message.Message):
    __slots__ = ("model", "policy", "replicas_wanted", "replicas_ready", "blocked", "hold_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_READY_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    policy: str
    replicas_wanted: int
    replicas_ready: int
    blocked: str
    hold_s: float
    def __init__(self, model: _Optional[str] = ..., policy: _Optional[str] = ..., replicas_wanted: _Optional[int] = ..., replicas_ready: _Optional[int] = ..., blocked: _Optional[str] = ..., hold_s: _Optional[float] = ...) -> None: ...

class RouterMember(_message.Message):
    __slots__ = ("router", "address", "node")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    router: str
    address: str
    node: str
    def __init__(self, router: _Optional[str] = ..., address: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class ThroughputGroup(_message.Message):
    __slots__ = ("epoch", "members", "published_unix_s", "backend", "hierarchical", "why")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    HIERARCHICAL_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    members: _containers.RepeatedCompositeFieldContainer[ThroughputMember]
    published_unix_s: float
    backend: str
    hierarchical: bool
    why: str
    def __init__(self, epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[ThroughputMember, _Mapping]]] = ..., published_unix_s: _Optional[float] = ..., backend: _Optional[str] = ..., hierarchical: bool = ..., why: _Optional[str] = ...) -> None: ...

class ThroughputMember(_message.Message):
    __slots__ = ("agent", "node", "site", "address", "store_address")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    node: str
    site: str
    address: str
    store_address: str
    def __init__(self, agent: _Optional[str] = ..., node: _Optional[str] = ..., site: _Optional[str] = ..., address: _Optional[str] = ..., store_address: _Optional[str] = ...) -> None: ...
