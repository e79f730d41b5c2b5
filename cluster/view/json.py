"""A ClusterStatus as the JSON document of docs/status-json.md. Pure.

Every field is always there, 64-bit numbers are numbers, and names are those of control.proto. A field may be added;
none changes its meaning or goes away without a new `format`.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from megatoken.v1 import control_pb2

FORMAT = 1


def status_document(status: control_pb2.ClusterStatus) -> dict[str, Any]:
    """The document, ready for json.dumps."""
    document = json_format.MessageToDict(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"format": FORMAT, **_with_numbers(status, document)}


def _with_numbers(message: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Protobuf's JSON writes 64-bit integers as text; ours are far below 2**53, so they are numbers here."""
    for descriptor in message.DESCRIPTOR.fields:
        value = document.get(descriptor.name)
        if descriptor.cpp_type in (descriptor.CPPTYPE_INT64, descriptor.CPPTYPE_UINT64):
            if isinstance(value, list):
                document[descriptor.name] = [int(entry) for entry in value]
            elif value is not None:
                document[descriptor.name] = int(value)
        elif descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            inner = getattr(message, descriptor.name)
            if isinstance(value, list):
                for part, entry in zip(inner, value, strict=True):
                    _with_numbers(part, entry)
            elif isinstance(value, dict):
                _with_numbers(inner, value)
            else:  # an optional part that is not there
                document[descriptor.name] = None
    return document
