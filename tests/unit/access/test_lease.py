"""Signed leases: good for one request at one replica until their end, and for nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatoken.access.lease import LeaseTerms, lease_id, sign, verify
from megatoken.errors import AuthError, ForbiddenError, MegatokenError

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
TERMS = LeaseTerms("an-id_0", "m-0", 7, "request-1", "m", 100, 50, 1000)
HERE = {"replica": "m-0", "incarnation": 7, "request_id": "request-1", "now_s": 999.0}


def altered(text: str, position: int, value: object) -> str:
    """The lease with one of its terms changed and the signature kept."""
    name, signature, content = text.split(".", 2)
    terms = json.loads(content)
    terms[position] = value
    return f"{name}.{signature}.{json.dumps(terms, separators=(',', ':'))}"


def test_a_lease_comes_back_as_it_was_signed() -> None:
    text = sign(TERMS, KEY)
    assert verify(text, [KEY], **HERE) == TERMS
    assert verify(text, [OTHER_KEY, KEY], **HERE) == TERMS  # in a rotation of the secrets
    assert lease_id(text) == TERMS.lease_id
    assert lease_id("plain") == "plain"
    named = replace(TERMS, request_id="ünï.\n\x00" + "x" * 200)
    assert verify(sign(named, KEY), [KEY], **{**HERE, "request_id": named.request_id}) == named


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"replica": "m-1"}, ForbiddenError, "lease: it is for replica 'm-0', and this is 'm-1'"),
        ({"incarnation": 8}, ForbiddenError, "another incarnation of replica 'm-0'"),
        ({"request_id": "request-2"}, ForbiddenError, "it is for request 'request-1', and this is 'request-2'"),
        ({"request_id": ""}, ForbiddenError, "send Assign's request_id"),
        ({"now_s": 1000.0}, ForbiddenError, "it ended 0.0 s ago"),
        ({"now_s": 1012.5}, ForbiddenError, "it ended 12.5 s ago"),
    ],
)
def test_a_lease_is_for_one_request_at_one_replica_until_its_end(
    change: dict[str, object], error: type[MegatokenError], why: str
) -> None:
    with pytest.raises(error, match=why):
        verify(sign(TERMS, KEY), [KEY], **{**HERE, **change})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a request straight to replica m-0 needs one"),
        ("plain", "not one that a router signed"),
        ("..", "not one that a router signed"),
        ("a.b.c.d", "not one that a router signed"),
        ("é.é.é", "not one that a router signed"),
        ("a.b." + "[" * 4000, "not one that a router signed"),
        ("a.b." + "1" * 100_000, "not one that a router signed"),
        ("a.b.[]", "not one that a router signed"),
        ("a.é." + sign(TERMS, KEY).split(".", 2)[2], "its signature is wrong"),
        (sign(TERMS, OTHER_KEY), "its signature is wrong"),
        (sign(TERMS, KEY) + " ", "its signature is wrong"),
        (sign(TERMS, KEY)[:-1], "not one that a router signed"),
        (sign(TERMS, KEY).replace("an-id_0", "an-id_1"), "its signature is wrong"),
        (altered(sign(TERMS, KEY), 1, 8), "its signature is wrong"),
        (altered(sign(TERMS, KEY), 4, 100_000), "its signature is wrong"),
        (altered(sign(TERMS, KEY), 5, 100_000), "its signature is wrong"),
        (altered(sign(TERMS, KEY), 6, 1 << 40), "its signature is wrong"),
        (altered(sign(TERMS, KEY), 6, 1e300), "not one that a router signed"),
        (altered(sign(TERMS, KEY), 2, ["request-1"]), "not one that a router signed"),
    ],
)
def test_what_no_router_signed_is_no_lease(text: str, why: str) -> None:
    with pytest.raises(AuthError, match=why):
        verify(text, [KEY], **HERE)


def test_a_worker_without_keys_takes_no_lease() -> None:
    with pytest.raises(AuthError, match="signature"):
        verify(sign(TERMS, KEY), [], **HERE)
