"""megatoken.log: one JSON object a line, with ids, without prompts and secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from megatoken.log import LEFT_OUT, MAX_TEXT, log_event, request_id, setup_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    text = io.StringIO()
    setup_logging("worker", "chat-0", stream=text)
    yield text
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_who_and_what(stream: io.StringIO) -> None:
    log_event(logging.getLogger("megatoken.worker.server"), "replica.ready", "serving", replica="chat-0", port=5)
    (line,) = lines(stream)
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "megatoken.worker.server",
        "event": "replica.ready",
        "process": "worker",
        "id": "chat-0",
        "message": "serving",
        "replica": "chat-0",
        "port": 5,
    }


def test_a_request_id_is_on_every_line_of_its_request(stream: io.StringIO) -> None:
    logger = logging.getLogger("router.relay")
    token = request_id.set("r-17")
    logger.warning("slow %s", "replica")
    request_id.reset(token)
    logger.warning("other")
    first, second = lines(stream)
    assert (first["request_id"], first["message"], first["event"]) == ("r-17", "slow replica", "log")
    assert "request_id" not in second


def test_prompts_and_secrets_are_left_out_at_any_depth(stream: io.StringIO) -> None:
    log_event(logging.getLogger("x"), "e", prompt=[1, 2], nested={"API_KEY": "k", "kept": 1}, generated_tokens=3)
    (line,) = lines(stream)
    assert (line["prompt"], line["nested"], line["generated_tokens"]) == (LEFT_OUT, {"API_KEY": LEFT_OUT, "kept": 1}, 3)


def test_an_exception_and_long_or_odd_values_stay_one_line(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logging.getLogger("x").exception("failed")
    log_event(logging.getLogger("x"), "e", reason="a" * 10_000, odd=object(), level_="kept", ts="mine")
    first, second = lines(stream)
    assert "RuntimeError: two\nlines" in first["error"]
    assert len(second["reason"]) == MAX_TEXT
    assert second["ts_"] == "mine"  # a field cannot take the place of the line's own


def test_levels_filter_and_a_wrong_one_is_named(stream: io.StringIO) -> None:
    logging.getLogger("x").debug("no")
    assert stream.getvalue() == ""
    with pytest.raises(ValueError, match="'loud' is not one of debug, info"):
        setup_logging("worker", level="loud")
