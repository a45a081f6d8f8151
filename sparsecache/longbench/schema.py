"""Checks JSON values against annotated classes, and makes typed objects of them. Knows no particular file.

A schema is a dataclass (made from an object; missing keys take the defaults) or a TypedDict (the object itself,
checked; missing keys stay missing). Further keys are ignored. Annotations: str, bool, int, float, Any, list[...],
dict[str, ...], `X | None`, other schemas, and Annotated[number, Range(low, high)].
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
    """A value that the schema does not allow: the field, the value and what is allowed, as the end of a sentence."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both allowed."""

    low: float
    high: float


Count = Annotated[int, Range(0, 2**53)]
Number = Annotated[float, Range(-1e15, 1e15)]
Amount = Annotated[float, Range(0, 1e15)]


def parse(schema: type[T], value: Any, place: str = "") -> T:
    """Returns a JSON value as an object of `schema`. Raises SchemaError, naming the field below `place`."""
    made: T = _parse(schema, value, place)
    return made


def _parse(kind: Any, value: Any, place: str) -> Any:
    if kind is Any:
        return value
    if get_origin(kind) is Annotated:
        base, *limits = get_args(kind)
        return _bounded(_parse(base, value, place), limits, place)
    if get_origin(kind) in (Union, UnionType):
        return _parse_union(kind, value, place)
    if kind in _SIMPLE:
        types, words = _SIMPLE[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise _refusal(place, value, words)
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise _refusal(place, value, "a list")
        (item,) = get_args(kind)
        return [_parse(item, part, f"{place}[{at}]") for at, part in enumerate(value)]
    if get_origin(kind) is dict or kind is dict:
        if not isinstance(value, dict):
            raise _refusal(place, value, "an object")
        item = get_args(kind)[1]
        return {key: _parse(item, part, _below(place, key)) for key, part in value.items()}
    return _parse_object(kind, value, place)


_SIMPLE: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    NoneType: (NoneType, "null"),
}


def _bounded(value: Any, limits: list[Any], place: str) -> Any:
    for limit in limits:
        if not limit.low <= value <= limit.high:
            raise _refusal(place, value, f"a number from {limit.low:g} to {limit.high:g}")
    return value


def _parse_union(kind: Any, value: Any, place: str) -> Any:
    kinds = get_args(kind)
    if NoneType in kinds and value is None:
        return None
    kinds = tuple(one for one in kinds if one is not NoneType)
    for one in kinds:
        try:
            return _parse(one, value, place)
        except SchemaError:
            if one is kinds[-1]:
                raise
    raise AssertionError(kind)


def _parse_object(schema: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _refusal(place, value, "an object")
    hints = _hints(schema)
    parsed = {key: _parse(hints[key], value[key], _below(place, key)) for key in hints if key in value}
    if typing.is_typeddict(schema):
        return value
    lacking = [
        field.name
        for field in dataclasses.fields(schema)
        if field.default is MISSING and field.default_factory is MISSING and field.name not in parsed
    ]
    if lacking:
        raise SchemaError(f"lacks {_below(place, lacking[0])}")
    return schema(**parsed)


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def _below(place: str, key: str) -> str:
    return f"{place}.{short(key)}" if place else short(key)


def _refusal(place: str, value: Any, allowed: str) -> SchemaError:
    what = place or "the value"
    return SchemaError(f"{what} is {_json(value)}; it must be {allowed}")


def _json(value: Any) -> str:
    """A value as JSON would have it, shortened."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, str) and len(value) <= 40 else short(value, 40)
