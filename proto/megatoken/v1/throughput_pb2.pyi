from megatoken.v1 import membership_pb2 as _membership_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttendanceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTENDANCE_STATE_UNSPECIFIED: _ClassVar[AttendanceState]
    ATTENDANCE_STATE_OUTSIDE: _ClassVar[AttendanceState]
    ATTENDANCE_STATE_FORMING: _ClassVar[AttendanceState]
    ATTENDANCE_STATE_TICKING: _ClassVar[AttendanceState]
    ATTENDANCE_STATE_FAILED: _ClassVar[AttendanceState]

class AttendanceRefusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTENDANCE_REFUSAL_UNSPECIFIED: _ClassVar[AttendanceRefusal]
    ATTENDANCE_REFUSAL_WIRE_VERSION: _ClassVar[AttendanceRefusal]
    ATTENDANCE_REFUSAL_REPLACED: _ClassVar[AttendanceRefusal]
    ATTENDANCE_REFUSAL_BACKEND: _ClassVar[AttendanceRefusal]
ATTENDANCE_STATE_UNSPECIFIED: AttendanceState
ATTENDANCE_STATE_OUTSIDE: AttendanceState
ATTENDANCE_STATE_FORMING: AttendanceState
ATTENDANCE_STATE_TICKING: AttendanceState
ATTENDANCE_STATE_FAILED: AttendanceState
ATTENDANCE_REFUSAL_UNSPECIFIED: AttendanceRefusal
ATTENDANCE_REFUSAL_WIRE_VERSION: AttendanceRefusal
ATTENDANCE_REFUSAL_REPLACED: AttendanceRefusal
ATTENDANCE_REFUSAL_BACKEND: AttendanceRefusal

class GetThroughputRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Totals(_message.Message):
    __slots__ = ("prompt_tokens", "generated_tokens", "cached_tokens", "requests_started", "requests_finished", "requests_failed", "busy_us", "energy_mj", "made_tokens", "dropped_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_STARTED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    ENERGY_MJ_FIELD_NUMBER: _ClassVar[int]
    MADE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    requests_started: int
    requests_finished: int
    requests_failed: int
    busy_us: int
    energy_mj: int
    made_tokens: int
    dropped_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., requests_started: _Optional[int] = ..., requests_finished: _Optional[int] = ..., requests_failed: _Optional[int] = ..., busy_us: _Optional[int] = ..., energy_mj: _Optional[int] = ..., made_tokens: _Optional[int] = ..., dropped_tokens: _Optional[int] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("seconds", "generated_tokens_per_s", "prompt_tokens_per_s", "cached_tokens_per_s")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    seconds: int
    generated_tokens_per_s: float
    prompt_tokens_per_s: float
    cached_tokens_per_s: float
    def __init__(self, seconds: _Optional[int] = ..., generated_tokens_per_s: _Optional[float] = ..., prompt_tokens_per_s: _Optional[float] = ..., cached_tokens_per_s: _Optional[float] = ...) -> None: ...

class ThroughputRow(_message.Message):
    __slots__ = ("kind", "name", "workers", "routers", "windows", "efficiency", "engine")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    EFFICIENCY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    workers: Totals
    routers: Totals
    windows: _containers.RepeatedCompositeFieldContainer[Window]
    efficiency: float
    engine: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., workers: _Optional[_Union[Totals, _Mapping]] = ..., routers: _Optional[_Union[Totals, _Mapping]] = ..., windows: _Optional[_Iterable[_Union[Window, _Mapping]]] = ..., efficiency: _Optional[float] = ..., engine: _Optional[str] = ...) -> None: ...

class ThroughputSample(_message.Message):
    __slots__ = ("epoch", "tick", "unix_s", "complete", "incomplete_reason", "ranks", "collective_s", "backend", "rows")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_REASON_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_S_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    tick: int
    unix_s: float
    complete: bool
    incomplete_reason: str
    ranks: int
    collective_s: float
    backend: str
    rows: _containers.RepeatedCompositeFieldContainer[ThroughputRow]
    def __init__(self, epoch: _Optional[int] = ..., tick: _Optional[int] = ..., unix_s: _Optional[float] = ..., complete: bool = ..., incomplete_reason: _Optional[str] = ..., ranks: _Optional[int] = ..., collective_s: _Optional[float] = ..., backend: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[ThroughputRow, _Mapping]]] = ...) -> None: ...

class Attendance(_message.Message):
    __slots__ = ("member", "epoch", "state", "problem", "suspects", "backends", "wire_version", "members")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    member: _membership_pb2.ThroughputMember
    epoch: int
    state: AttendanceState
    problem: str
    suspects: _containers.RepeatedScalarFieldContainer[str]
    backends: _containers.RepeatedScalarFieldContainer[str]
    wire_version: int
    members: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, member: _Optional[_Union[_membership_pb2.ThroughputMember, _Mapping]] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[AttendanceState, str]] = ..., problem: _Optional[str] = ..., suspects: _Optional[_Iterable[str]] = ..., backends: _Optional[_Iterable[str]] = ..., wire_version: _Optional[int] = ..., members: _Optional[_Iterable[str]] = ...) -> None: ...

class AttendanceReply(_message.Message):
    __slots__ = ("epoch", "refused", "refusal")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    refused: str
    refusal: AttendanceRefusal
    def __init__(self, epoch: _Optional[int] = ..., refused: _Optional[str] = ..., refusal: _Optional[_Union[AttendanceRefusal, str]] = ...) -> None: ...
