"""A lease as text: what a router allows one request at one replica, signed so that the replica knows whose it is.

`ID.SIGNATURE.TERMS`: the id, HMAC-SHA256 over id and terms in hex, and the terms as a JSON list. A router signs
with the key of that replica alone (credentials.replica_lease_key), so a worker can forge no lease for another. Pure:
router/shell/leases.py signs, worker/leases.py verifies and remembers which were used. Ends are unix seconds, since
router and worker share no other clock: one that is off by a second lets a lease end a second early or late.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _quoted
from typing import Final

from megatoken.errors import AuthError, ForbiddenError

MAX_ID_CHARACTERS: Final = 256  # of a request
MAX_LEASE_CHARACTERS: Final = 8192  # a request id and a model of 256 characters each fit, escaped


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """What one lease allows."""

    lease_id: str
    replica: str
    incarnation: int
    request_id: str
    model: str
    prompt_tokens: int
    max_tokens: int  # over all choices of the request
    until_s: int  # unix


def sign(terms: LeaseTerms, key: bytes) -> str:
    """The lease's text, under the key of its replica."""
    # By hand: json.dumps costs more than the signature.
    content = (
        f"[{_quoted(terms.replica)},{terms.incarnation},{_quoted(terms.request_id)},{_quoted(terms.model)},"
        f"{terms.prompt_tokens},{terms.max_tokens},{terms.until_s}]"
    )
    return f"{terms.lease_id}.{_signature(terms.lease_id, content, key)}.{content}"


def verify(
    text: str, keys: Iterable[bytes], *, replica: str, incarnation: int, request_id: str, now_s: float
) -> LeaseTerms:
    """The terms of a lease that is good for this request, at this replica, now (unix).

    Raises AuthError for what is no lease of ours, ForbiddenError for one that is not for this. What the request may
    ask for in tokens the caller compares with the terms.
    """
    if not text:
        raise AuthError(f"lease: a request straight to replica {replica} needs one, from a router's Assign")
    terms = _parsed(text)
    if terms.replica != replica:  # its signature is by another key, so it could not be checked anyhow
        raise ForbiddenError(f"lease: it is for replica {terms.replica!r}, and this is {replica!r}")
    name, signature, content = text.split(".", 2)
    if not any(hmac.compare_digest(_signature(name, content, key).encode(), signature.encode()) for key in keys):
        raise AuthError("lease: its signature is wrong")
    if terms.incarnation != incarnation:
        raise ForbiddenError(f"lease: it is for another incarnation of replica {replica!r}, which has been replaced")
    if terms.request_id != request_id:
        raise ForbiddenError(
            f"lease: it is for request {terms.request_id!r}, and this is {request_id!r}; send Assign's request_id"
        )
    if terms.until_s <= now_s:
        raise ForbiddenError(f"lease: it ended {now_s - terms.until_s:.1f} s ago; get another from Assign")
    return terms


def lease_id(text: str) -> str:
    """The id in a lease's text, unchecked; a lease that is not signed is its own id."""
    return text.partition(".")[0]


def _parsed(text: str) -> LeaseTerms:
    try:
        if len(text) > MAX_LEASE_CHARACTERS:
            raise ValueError("too long")
        name, _, content = text.split(".", 2)
        replica, incarnation, request_id, model, prompt_tokens, max_tokens, until_s = json.loads(content)
        numbers = (incarnation, prompt_tokens, max_tokens, until_s)
        if not all(type(word) is str for word in (replica, request_id, model)):
            raise ValueError("a name that is no text")
        if not all(type(number) is int for number in numbers):
            raise ValueError("a number that is none")
    except (ValueError, TypeError, RecursionError):
        raise AuthError("lease: not one that a router signed") from None
    return LeaseTerms(name, replica, incarnation, request_id, model, prompt_tokens, max_tokens, until_s)


def _signature(name: str, content: str, key: bytes) -> str:
    return hmac.digest(key, f"{name}.{content}".encode(), "sha256").hex()
