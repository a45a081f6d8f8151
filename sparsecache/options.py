"""Options of methods: read from a constructor's signature, converted from text, and shown."""

import inspect
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sparsecache.errors import short

_WORDS: dict[Any, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
LARGEST = 2**31 - 1
"""The largest size or count that an option may be."""


@dataclass(frozen=True)
class Option:
    """One option: its type, default and meaning.

    kind: float, int, bool, str, or a Literal of texts; optional: whether `none` may be given too.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    meaning: str

    @property
    def allowed(self) -> str:
        """Returns the allowed values, in words."""
        choices = ", ".join(map(show, get_args(self.kind)))
        return (_WORDS.get(self.kind) or f"one of {choices}") + (" or none" if self.optional else "")

    def __str__(self) -> str:
        return f"{self.name}={show(self.default)}"

    def convert(self, text: str) -> Any:
        """Returns the value of `text`. Raises ValueError, in full sentences, for one that is not allowed."""
        if self.optional and text.lower() == "none":
            return None
        try:
            value = self._read(text)
        except (KeyError, ValueError):
            raise ValueError(f"{self.name}={short(text)!r} is not {self.allowed}.{self._hint}") from None
        if type(value) in (int, float) and LARGEST < abs(value) < math.inf:
            raise ValueError(f"{self.name}={short(text)!r} is out of range: at most {LARGEST}.{self._hint}")
        return value

    @property
    def _hint(self) -> str:
        return f" {self.name}: {self.meaning} (default {show(self.default)})." if self.meaning else ""

    def _read(self, text: str) -> Any:
        if self.kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(self.kind) is Literal:
            return {show(choice): choice for choice in get_args(self.kind)}[text]
        value = self.kind(text)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError
        return value


def show(value: Any) -> str:
    """Returns a value as it is typed on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def constructor_options(kind: type) -> dict[str, Option]:
    """Returns the arguments of a constructor, annotated `Annotated[type, "one-line meaning"]`, as options.

    The type is one of those of Option, or `type | None`. Raises TypeError, naming the class, for an argument without
    an annotation or a default, or of another type.
    """
    parameters = inspect.signature(kind, eval_str=True).parameters
    return {
        name: _option(kind, parameter)
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _option(owner: type, parameter: inspect.Parameter) -> Option:
    annotation, meaning = parameter.annotation, ""
    if annotation is parameter.empty or parameter.default is parameter.empty:
        raise TypeError(f"{owner.__name__}.__init__: option {parameter.name} needs an annotation and a default.")
    if get_origin(annotation) is Annotated:
        annotation, meaning = get_args(annotation)[:2]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    values = [kind for kind in kinds if kind is not NoneType]
    if len(values) != 1 or (values[0] not in _WORDS and get_origin(values[0]) is not Literal):
        raise TypeError(
            f"{owner.__name__}.__init__: option {parameter.name} is of type {annotation}, which -o cannot give. Types: "
            f"float, int, bool, str, Literal of texts, and each of these | None."
        )
    return Option(parameter.name, values[0], NoneType in kinds, parameter.default, meaning)
