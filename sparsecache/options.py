"""Options of methods: read from a constructor's signature, converted from text, and shown."""

import hashlib
import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sparsecache.errors import UsageError, short
from sparsecache.files import read_file

_WORDS: dict[Any, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
LARGEST = 2**31 - 1
"""The largest size or count that an option may be."""


@dataclass(frozen=True)
class Names:
    """Marks an option whose text names a file or a method, as in `Annotated[str, Names(...)]`.

    words: what the text must be, for messages. identity: returns what a run records instead of the text. It differs for
    another content, and is the same for equal content at another path.
    """

    words: str
    identity: Callable[[str], str]


def _file_identity(path: str) -> str:
    """Returns a hash of a file, or a fixed text for one that cannot be read: a method that uses it refuses it."""
    try:
        return f"sha256:{digest(read_file(path))}"
    except UsageError:
        return "a file that is not read"


def digest(*parts: bytes) -> str:
    """Returns 16 hexadecimal digits that differ for different parts."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


FilePath = Annotated[str, Names("the path of a file", _file_identity)]
"""The type of an option that names a file."""


@dataclass(frozen=True)
class Option:
    """One option: its type, default and meaning.

    kind: float, int, bool, str, or a Literal of texts or whole numbers; optional: whether `none` may be given too;
    names: for text that names a file or a method.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    meaning: str
    names: Names | None = None

    @property
    def allowed(self) -> str:
        """Returns the allowed values, in words."""
        choices = ", ".join(map(show, get_args(self.kind)))
        words = self.names.words if self.names else _WORDS.get(self.kind) or f"one of {choices}"
        return words + (" or none" if self.optional else "")

    def __str__(self) -> str:
        return f"{self.name}={show(self.default)}"

    def convert(self, text: str) -> Any:
        """Returns the value of `text`. Raises ValueError, in full sentences, for one that is not allowed."""
        if self.optional and text.lower() == "none":
            return None
        try:
            value = self._read(text)
        except (KeyError, ValueError):
            raise ValueError(
                f"{self.name}={short(text)!r} is not {self.allowed}.{self._percent(text)}{self._hint}"
            ) from None
        if type(value) in (int, float) and LARGEST < abs(value) < math.inf:
            raise ValueError(f"{self.name}={short(text)!r} is out of range: at most {LARGEST}.{self._hint}")
        return value

    def identity(self, value: Any) -> Any:
        """Returns what a run records of `value`: itself, or the identity of what it names."""
        return value if value is None or self.names is None else self.names.identity(value)

    @property
    def _hint(self) -> str:
        return f" {self.name}: {self.meaning} (default {show(self.default)})." if self.meaning else ""

    def _percent(self, text: str) -> str:
        """Returns what to write instead of a number of percent."""
        with suppress(ValueError):
            if self.kind is float and text.endswith("%"):
                return f" {short(text)} is {float(text[:-1]) / 100:g}."
        return ""

    def _read(self, text: str) -> Any:
        if self.kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(self.kind) is Literal:
            return {show(choice): choice for choice in get_args(self.kind)}[text]
        if self.names and not text:
            raise ValueError
        value = self.kind(text)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError
        return value


def show(value: Any) -> str:
    """Returns a value as it is typed on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def constructor_options(kind: type) -> dict[str, Option]:
    """Returns the arguments of a constructor, annotated `Annotated[type, "one-line meaning"]`, as options.

    The type is one of those of Option, FilePath, or one of these `| None`. Raises TypeError, naming the class, for an
    argument without an annotation or a default, or of another type.
    """
    parameters = inspect.signature(kind, eval_str=True).parameters
    return {
        name: _option(kind, parameter)
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _option(owner: type, parameter: inspect.Parameter) -> Option:
    if parameter.annotation is parameter.empty or parameter.default is parameter.empty:
        raise TypeError(f"{owner.__name__}.__init__: option {parameter.name} needs an annotation and a default.")
    annotation, marks = _without_marks(parameter.annotation)
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    values = [_without_marks(kind) for kind in kinds if kind is not NoneType]
    kind = values[0][0] if len(values) == 1 else None
    if kind not in _WORDS and get_origin(kind) is not Literal:
        raise TypeError(
            f"{owner.__name__}.__init__: option {parameter.name} is of type {annotation}, which -o cannot give. Types: "
            f"float, int, bool, str, FilePath, Literal of texts or whole numbers, and each of these | None."
        )
    marks = [*values[0][1], *marks]
    meaning = next((mark for mark in marks if isinstance(mark, str)), "")
    names = next((mark for mark in marks if isinstance(mark, Names)), None)
    return Option(parameter.name, kind, NoneType in kinds, parameter.default, meaning, names)


def _without_marks(annotation: Any) -> tuple[Any, list[Any]]:
    """Returns the type of `Annotated[type, marks]`, and the marks."""
    kind, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    return kind, marks
