"""The door: who calls, and may they. Without a keys file everyone may, as one anonymous tenant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatoken.v1.frame_columns_pb2 import GenerateRequest

ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a call comes from, as its metadata shows."""

    tenant: str = ANONYMOUS


class Door:
    def identify(self, metadata: object) -> Caller:
        """Raises AuthError."""
        return Caller()

    def admit(self, caller: Caller, request: GenerateRequest, now: float) -> str:
        """The tenant that the request counts for. Raises AuthError or OverloadError."""
        return caller.tenant
