"""The committed protobuf code is what the .proto files generate."""

import os
import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).parents[3] / "proto"


def test_generated_code_is_current(tmp_path: Path) -> None:
    subprocess.run(
        [PROTO / "regenerate"],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)},
        check=True,
        timeout=60,
    )
    generated = sorted((tmp_path / "megatoken/v1").glob("*_pb2*"))
    assert generated
    for file in generated:
        committed = PROTO / "megatoken/v1" / file.name
        assert committed.read_text() == file.read_text(), f"{file.name} is stale: run proto/regenerate"


def test_columns_name_the_same_fields_as_the_contract() -> None:
    """frame_columns.proto may differ from tokens.proto in nothing but packed columns declared as bytes."""
    from megatoken.v1 import frame_columns_pb2, tokens_pb2

    for name, columns in frame_columns_pb2.DESCRIPTOR.message_types_by_name.items():
        contract = tokens_pb2.DESCRIPTOR.message_types_by_name[name]
        assert {f.number: f.name for f in columns.fields} == {f.number: f.name for f in contract.fields}
        for field in columns.fields:
            twin = contract.fields_by_name[field.name]
            if field.type == field.TYPE_BYTES:
                assert twin.type == twin.TYPE_FIXED32, f"{name}.{field.name}"
                assert twin.is_repeated, f"{name}.{field.name}"
            else:
                assert field.type == twin.type, f"{name}.{field.name}"
