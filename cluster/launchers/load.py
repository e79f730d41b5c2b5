"""A spec's `launch` section, typed, with one clear line for each thing that is wrong in it."""

from __future__ import annotations

from typing import Any

import pydantic

from megatoken.cluster.launchers.spec import LaunchSpec
from megatoken.cluster.spec.load import SpecError


def launch_of(section: LaunchSpec | dict[str, Any] | None) -> LaunchSpec:
    """The typed section. Raises SpecError."""
    if isinstance(section, LaunchSpec):
        return section
    try:
        return LaunchSpec.model_validate(section or {})
    except pydantic.ValidationError as error:
        raise SpecError([_line(problem) for problem in error.errors(include_url=False)]) from None


def _line(problem: Any) -> str:
    where = ".".join(["launch", *map(str, problem["loc"])])
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where}: is not a field of this section"
    return f"{where}: {problem['input']!r} is not allowed; {problem['msg']}"
