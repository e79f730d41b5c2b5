"""EdgeConfig, and the `vllm serve` arguments it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatoken.errors import RequestError
from megatoken.router.edge.config import EdgeConfig, EdgeModel
from megatoken.router.edge.vllm.serve_args import local_source, one_argument, serve_arguments


def config(**changed: Any) -> EdgeConfig:
    return EdgeConfig(**{"edge": "e", "router": "127.0.0.1:1", "models": [{"name": "m", "source": "/m"}], **changed})


def test_the_default_is_loopback_and_plain() -> None:
    made = config()
    assert made.host == "127.0.0.1"
    assert made.tls is None
    assert made.api_keys_file is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"models": []}, "models"),
        ({"router": "nowhere"}, "router"),
        ({"port": 70000}, "port"),
        ({"surprise": 1}, "surprise"),
        ({"models": [{"name": "m", "source": "/m"}, {"name": "n", "source": "/n", "served_names": ["m"]}]}, "'m'"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        config(**changed)


def test_names_hold_the_routers_first_and_once() -> None:
    assert EdgeModel(name="m", source="/m", served_names=("a", "m")).names == ("m", "a")


def test_arguments() -> None:
    model = EdgeModel(
        name="m",
        source="/models/m",
        served_names=("alias",),
        dtype="bfloat16",
        max_model_len=128,
        tool_parser="hermes",
        reasoning_parser="qwen3",
        extra_args={"response_role": "bot", "enable_x": True, "enable_y": False, "kw": {"a": 1}, "many": [1, 2]},
    )
    assert serve_arguments(model) == [
        *("--model", "/models/m", "--served-model-name", "m", "alias", "--dtype", "bfloat16"),
        "--disable-log-stats",
        "--enable-prompt-tokens-details",
        *("--max-model-len", "128", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--reasoning-parser", "qwen3", "--response-role", "bot", "--enable-x", "--no-enable-y"),
        *("--kw", '{"a": 1}', "--many", "1", "2"),
    ]


@pytest.mark.parametrize("name", ["port", "--api-key", "tensor-parallel-size"])
def test_what_the_edge_settles_itself_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="leave it out"):
        one_argument(name, 1)


def test_a_built_in_model_must_be_made_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATOKEN_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match="prepare some-model"):
        local_source("builtin:some-model")
    made = tmp_path / "models" / "some-model"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    assert local_source("builtin:some-model") == str(made)
    assert local_source("org/model") == "org/model"
