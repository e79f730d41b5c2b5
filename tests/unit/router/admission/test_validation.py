"""What a request must be like, tried at each bound from both sides."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.errors import NotFoundError, RequestError, UnavailableError
from megatoken.router.admission.validation import check_priority, check_request, pool_of
from megatoken.router.config import AdmissionConfig, BreakerConfig, LimitsConfig
from megatoken.router.fleet.fleet import EndpointTable
from megatoken.tokens.frames import pack
from megatoken.v1.frame_columns_pb2 import GenerateRequest
from tests.support.router_core import CoreFleet

LIMITS = LimitsConfig(max_prompt_tokens=50, max_n=3, max_timeout_ms=1000, max_delay_ms=200)


def checked(prompt: list[int], context: int = 40, vocab: int = 100, **fields: Any) -> tuple[int, int]:
    pool = CoreFleet(replicas=1).pool
    pool.max_model_len, pool.vocab_size = context, vocab
    request = GenerateRequest(model="m", prompt=pack(prompt))
    for name, value in fields.items():
        setattr(request if name in ("timeout_ms", "max_delay_ms") else request.sampling, name, value)
    return check_request(request, pool, LIMITS)


@pytest.mark.parametrize(
    ("length", "context", "fields", "expected"),
    [
        (1, 40, {}, (1, 39)),
        (39, 40, {}, (39, 1)),
        (1, 0, {}, (1, 16)),
        (50, 0, {}, (50, 16)),
        (10, 40, {"max_tokens": 30}, (10, 30)),
        (10, 0, {"max_tokens": 300}, (10, 300)),
        (10, 40, {"max_tokens": 7, "min_tokens": 7}, (10, 7)),
        (10, 40, {"timeout_ms": 1000, "max_delay_ms": 200, "n": 3}, (10, 30)),
    ],
)
def test_what_is_allowed_is_counted(
    length: int, context: int, fields: dict[str, int], expected: tuple[int, int]
) -> None:
    assert checked([1] * length, context, **fields) == expected


@pytest.mark.parametrize(
    ("length", "context", "fields", "said"),
    [
        (0, 40, {}, "prompt: '' is not allowed; at least one token id"),
        (51, 0, {}, "prompt: '51 tokens' is not allowed; at most 50 tokens"),
        (40, 40, {}, "prompt: '40 tokens' is not allowed; at most 39 tokens (context of 40)"),
        (41, 40, {"max_tokens": 1}, "prompt: '41 tokens' is not allowed; at most 39 tokens (context of 40)"),
        (10, 40, {"max_tokens": 31}, "sampling.max_tokens: 31 is not allowed; at most 30 (context of 40, prompt 10)"),
        (10, 40, {"max_tokens": 7, "min_tokens": 8}, "sampling.min_tokens: 8 is not allowed; at most max_tokens, 7"),
        (10, 40, {"timeout_ms": 1001}, "timeout_ms: 1001 is not allowed; at most 1000"),
        (10, 40, {"max_delay_ms": 201}, "max_delay_ms: 201 is not allowed; at most 200"),
        (10, 40, {"n": 4}, "sampling.n: 4 is not allowed; 1 to 3"),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(
    length: int, context: int, fields: dict[str, int], said: str
) -> None:
    with pytest.raises(RequestError) as refused:
        checked([1] * length, context, **fields)
    assert str(refused.value) == said


@pytest.mark.parametrize(("prompt", "vocab"), [([1, 99], 100), ([99, 1], 100), ([4_000_000_000], 0), ([0], 1)])
def test_token_ids_below_the_vocabulary_are_let_through(prompt: list[int], vocab: int) -> None:
    assert checked(prompt, vocab=vocab)[0] == len(prompt)


@pytest.mark.parametrize(("prompt", "vocab", "shown"), [([100, 1], 100, 100), ([1, 101], 100, 101), ([1], 1, 1)])
def test_token_ids_from_the_vocabulary_on_are_refused(prompt: list[int], vocab: int, shown: int) -> None:
    said = f"^prompt: {shown} is not allowed; token ids below the vocabulary's size, {vocab}$"
    with pytest.raises(RequestError, match=said):
        checked(prompt, vocab=vocab)


def test_a_prompt_that_is_no_column_is_refused_by_its_size() -> None:
    with pytest.raises(RequestError, match=r"^prompt: '5 bytes' is not allowed; packed fixed32 token ids"):
        check_request(GenerateRequest(prompt=b"12345"), CoreFleet(replicas=1).pool, LIMITS)


@pytest.mark.parametrize(("priority", "highest", "fits"), [(0, 0, True), (5, 0, True), (-1, 0, False), (-2, -2, True)])
def test_nobody_goes_before_the_priority_that_it_may_ask_for(priority: int, highest: int, fits: bool) -> None:
    request = GenerateRequest(priority=priority)
    if fits:
        check_priority(request, highest)
        return
    with pytest.raises(RequestError) as refused:
        check_priority(request, highest)
    assert str(refused.value) == (
        f"priority: {priority} is not allowed; {highest} or more for this caller (lower runs earlier)"
    )


@pytest.mark.parametrize(("known", "replicas", "found"), [(True, 0, True), (False, 1, True), (False, 0, False)])
def test_a_model_is_found_while_it_is_in_the_snapshot_or_has_a_replica(known: bool, replicas: int, found: bool) -> None:
    fleet = CoreFleet(replicas=replicas)
    fleet.pool.known = known
    if found:
        assert pool_of(fleet.state.fleet, "m") is fleet.pool
    with pytest.raises(NotFoundError) as refused:
        pool_of(fleet.state.fleet, "m" if not found else "other")
    assert ("one of: m" if found else "none is served now") in str(refused.value)


def test_before_the_first_snapshot_no_model_is_called_unknown() -> None:
    fleet = EndpointTable(AdmissionConfig(), BreakerConfig())
    fleet.told = False
    with pytest.raises(UnavailableError, match="has not been told of any replica"):
        pool_of(fleet, "m")
    fleet.told = True
    with pytest.raises(NotFoundError):
        pool_of(fleet, "m")


def test_no_more_than_twenty_models_are_named() -> None:
    fleet = CoreFleet(replicas=0)
    for i in range(30):
        fleet.state.fleet.add_pool(f"a-{i:02}", fleet.pool.policy)
    with pytest.raises(NotFoundError) as refused:
        pool_of(fleet.state.fleet, "z")
    assert str(refused.value).endswith("one of: " + ", ".join(f"a-{i:02}" for i in range(20)))
