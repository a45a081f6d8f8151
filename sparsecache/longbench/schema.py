"""Checks JSON values against annotated classes and converts them to typed objects.

A schema is a dataclass (built from a JSON object; missing keys take the defaults) or a TypedDict (the object itself is
checked and returned; missing keys stay missing). Unknown keys are ignored. Supported annotations: str, bool, int,
float, Any, list[...], dict[str, ...], other schemas, Annotated[number, Range(low, high)], `X | None`, and unions of
texts and numbers.
"""

import dataclasses
import typing
from dataclasses import MISSING, dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from sparsecache.errors import short

T = TypeVar("T")


class SchemaError(ValueError):
    """A value violates its schema. The message names the field, the value and what is allowed.

    allowed: the last of these, if the message states it; else empty.
    """

    def __init__(self, message: str, allowed: str = ""):
        super().__init__(message)
        self.allowed = allowed


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float


Count = Annotated[int, Range(0, 2**53)]
Number = Annotated[float, Range(-1e15, 1e15)]
Amount = Annotated[float, Range(0, 1e15)]


def parse(schema: type[T], value: Any, path: str = "") -> T:
    """Convert a JSON value to an object of `schema`.

    Raises SchemaError, with the path of the field below `path`.
    """
    parsed: T = _parse(schema, value, path)
    return parsed


def _parse(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if get_origin(kind) is Annotated:
        base, *limits = get_args(kind)
        return _bounded(_parse(base, value, path), limits, path)
    if get_origin(kind) in (Union, UnionType):
        return _parse_union(kind, value, path)
    if kind in _SIMPLE:
        types, words = _SIMPLE[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise _error(path, value, words)
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise _error(path, value, "a list")
        (item,) = get_args(kind)
        return [_parse(item, part, f"{path}[{at}]") for at, part in enumerate(value)]
    if get_origin(kind) is dict or kind is dict:
        if not isinstance(value, dict):
            raise _error(path, value, "an object")
        item = get_args(kind)[1]
        return {key: _parse(item, part, _below(path, key)) for key, part in value.items()}
    return _parse_object(kind, value, path)


_SIMPLE: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    NoneType: (NoneType, "null"),
}


def _bounded(value: Any, limits: list[Any], path: str) -> Any:
    for limit in limits:
        if not limit.low <= value <= limit.high:
            raise _error(path, value, f"a number from {limit.low:g} to {limit.high:g}")
    return value


def _parse_union(kind: Any, value: Any, path: str) -> Any:
    kinds = get_args(kind)
    if NoneType in kinds and value is None:
        return None
    errors: list[SchemaError] = []
    for one in kinds:
        if one is not NoneType:
            try:
                return _parse(one, value, path)
            except SchemaError as error:
                errors.append(error)
    raise errors[0] if len(errors) == 1 else _error(path, value, " or ".join(error.allowed for error in errors))


def _parse_object(schema: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _error(path, value, "an object")
    hints = _hints(schema)
    parsed = {key: _parse(hints[key], value[key], _below(path, key)) for key in hints if key in value}
    if typing.is_typeddict(schema):
        return value
    missing = [
        field.name
        for field in dataclasses.fields(schema)
        if field.default is MISSING and field.default_factory is MISSING and field.name not in parsed
    ]
    if missing:
        raise SchemaError(f"lacks {_below(path, missing[0])}")
    return schema(**parsed)


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def _below(path: str, key: str) -> str:
    return f"{path}.{short(key)}" if path else short(key)


def _error(path: str, value: Any, allowed: str) -> SchemaError:
    name = path or "the value"
    return SchemaError(f"{name} is {_json(value)}; it must be {allowed}", allowed)


def _json(value: Any) -> str:
    """Return a value in JSON notation, shortened."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, str) and len(value) <= 40 else short(value, 40)
