"""Text to spec, with one clear line for each thing that is wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import pydantic
import yaml

from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.errors import MegatokenError, RequestError

# Ten thousand models of three lines each are some 700,000 bytes. Libyaml's loader takes 1.5 us a byte, with the checks
# below; the one in Python, where libyaml is missing, some 25 us: half a minute for as much as is allowed.
MAX_SPEC_BYTES = 1 << 20
MAX_VALUES = 100_000  # with aliases written out: a few hundred bytes of them can stand for more than memory holds
MAX_DEPTH = 64  # lists and mappings inside each other: libyaml's composer recurses on the C stack, and would crash
MAX_SHOWN = 80


class SpecError(RequestError):
    """The spec is wrong. `problems` has one line each: field, value, what is allowed."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        self.field, self.value, self.allowed = "spec", None, ""
        MegatokenError.__init__(self, "\n".join(problems))


def load_spec(text: str) -> ClusterSpec:
    """The spec a YAML document holds. Raises SpecError."""
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_SPEC_BYTES:
        raise SpecError([f"spec: {size} bytes is not allowed; at most {MAX_SPEC_BYTES}"])
    try:
        _check_depth(text)
        document = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise SpecError([f"spec: not YAML: {' '.join(str(error).split())}"]) from None
    except UnicodeEncodeError:
        raise SpecError(["spec: not YAML: half a surrogate pair is no character"]) from None
    if not isinstance(document, dict):
        raise SpecError([f"spec: {_shown(document)} is not allowed; a mapping with `cluster`, `models` and others"])
    return parse_spec(document)


def parse_spec(document: dict[Any, Any]) -> ClusterSpec:
    """The spec that plain values hold. Raises SpecError."""
    try:
        return ClusterSpec.model_validate(document)
    except pydantic.ValidationError as error:
        raise SpecError([_line(problem, document) for problem in error.errors(include_url=False)]) from None


def dump_spec(spec: ClusterSpec) -> str:
    """The YAML that load_spec reads back to an equal spec, without what is default."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is some twenty times faster; wheels carry it


def _check_depth(text: str) -> None:
    """Raises for lists and mappings too deep inside each other, from the parser's events: those do not recurse."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                problem = f"more than {MAX_DEPTH} lists and mappings inside each other"
                mark: Any = event.start_mark  # of libyaml's kind or of Python's: it only has to say where
                raise yaml.composer.ComposerError(None, None, problem, mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _StrictLoader(_Loader):  # type: ignore[misc]
    """Refuses a key given twice, where plain YAML silently keeps the last, and aliases that stand for too much.

    What looks like a date is text: no field of a spec is one, and a name or a label may well look so.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _Loader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            number = _written_out(node, {})
            if number > MAX_VALUES:
                text = f"{number} values once its aliases are written out is not allowed; at most {MAX_VALUES}"
                raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a day that is in no calendar, a number of ten thousand digits
            text = f"{_shown(node.value)} is not allowed; {error}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values `node` is with every alias replaced by what it names; each node is looked at once."""
    number = known.get(id(node))
    if number is None:
        known[id(node)] = 0  # while it is open
        number = 1
        if isinstance(node, yaml.MappingNode):
            number += sum(_written_out(part, known) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            number += sum(_written_out(part, known) for part in node.value)
        known[id(node)] = number
    elif number == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands inside what it names", node.start_mark)
    return number


def _line(problem: Any, document: dict[Any, Any]) -> str:
    where = _field(problem["loc"], document)
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "extra_forbidden":
        return f"{where}: is not a field of this section; see docs/operations.md for those that are"
    if kind == "value_error":
        text = str(context.get("error", problem["msg"]))
        return f"{where}: {text}" if where else text
    allowed = (
        problem["msg"].removeprefix("Input should be ").removeprefix("String should ").removeprefix("Value should ")
    )
    return f"{where}: {_shown(value)} is not allowed; {allowed}"


def _field(location: tuple[Any, ...], document: Any) -> str:
    """The path to a field, with the names of list items instead of their numbers: models.chat.replicas."""
    parts: list[str] = []
    here = document
    for step in location:
        try:
            here = here[step]
        except (KeyError, IndexError, TypeError):
            here = None
        named = isinstance(step, int) and isinstance(here, dict) and isinstance(here.get("name"), str)
        parts.append(here["name"] if named and here else str(step))
    return ".".join(parts)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
