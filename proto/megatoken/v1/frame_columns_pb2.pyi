from megatoken.v1 import tokens_pb2 as _tokens_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("stream", "count", "token", "detail", "finish", "load", "usage")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    stream: bytes
    count: bytes
    token: bytes
    detail: _containers.RepeatedCompositeFieldContainer[_tokens_pb2.Detail]
    finish: _containers.RepeatedCompositeFieldContainer[_tokens_pb2.Finish]
    load: _tokens_pb2.Load
    usage: _containers.RepeatedCompositeFieldContainer[_tokens_pb2.LeaseUsage]
    def __init__(self, stream: _Optional[bytes] = ..., count: _Optional[bytes] = ..., token: _Optional[bytes] = ..., detail: _Optional[_Iterable[_Union[_tokens_pb2.Detail, _Mapping]]] = ..., finish: _Optional[_Iterable[_Union[_tokens_pb2.Finish, _Mapping]]] = ..., load: _Optional[_Union[_tokens_pb2.Load, _Mapping]] = ..., usage: _Optional[_Iterable[_Union[_tokens_pb2.LeaseUsage, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("tokens", "choice", "detail", "finish")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    tokens: bytes
    choice: int
    detail: _tokens_pb2.Detail
    finish: _tokens_pb2.Finish
    def __init__(self, tokens: _Optional[bytes] = ..., choice: _Optional[int] = ..., detail: _Optional[_Union[_tokens_pb2.Detail, _Mapping]] = ..., finish: _Optional[_Union[_tokens_pb2.Finish, _Mapping]] = ...) -> None: ...

class ClientFrame(_message.Message):
    __slots__ = ("start", "cancel")
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    start: _containers.RepeatedCompositeFieldContainer[Start]
    cancel: bytes
    def __init__(self, start: _Optional[_Iterable[_Union[Start, _Mapping]]] = ..., cancel: _Optional[bytes] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("stream", "request")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    stream: int
    request: GenerateRequest
    def __init__(self, stream: _Optional[int] = ..., request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt", "sampling", "lora", "priority", "affinity", "delivery", "max_delay_ms", "resume", "cache_salt", "timeout_ms", "resumed_tokens", "lease", "site", "traceparent", "tell_cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    MAX_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TELL_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt: bytes
    sampling: _tokens_pb2.SamplingParams
    lora: str
    priority: int
    affinity: str
    delivery: _tokens_pb2.Delivery
    max_delay_ms: int
    resume: _tokens_pb2.Resume
    cache_salt: str
    timeout_ms: int
    resumed_tokens: int
    lease: str
    site: str
    traceparent: str
    tell_cached_tokens: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[bytes] = ..., sampling: _Optional[_Union[_tokens_pb2.SamplingParams, _Mapping]] = ..., lora: _Optional[str] = ..., priority: _Optional[int] = ..., affinity: _Optional[str] = ..., delivery: _Optional[_Union[_tokens_pb2.Delivery, str]] = ..., max_delay_ms: _Optional[int] = ..., resume: _Optional[_Union[_tokens_pb2.Resume, str]] = ..., cache_salt: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., resumed_tokens: _Optional[int] = ..., lease: _Optional[str] = ..., site: _Optional[str] = ..., traceparent: _Optional[str] = ..., tell_cached_tokens: bool = ...) -> None: ...
