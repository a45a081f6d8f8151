"""Cache methods, one module or package each: the file name is the method's name."""

import importlib
import inspect
import math
import pkgutil
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from sparsecache.errors import UsageError

if TYPE_CHECKING:
    from sparsecache.methods.base import Method


def method_names() -> list[str]:
    """Every method there is, without importing any (nor torch)."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if module.name != "base" and not module.name.startswith("_")
    )


def check_method_name(name: str) -> None:
    """Raises UsageError, listing the methods, if there is none of that name. Imports nothing."""
    if name not in method_names():
        raise UsageError(f"There is no method {name!r}. Methods: {', '.join(method_names())}.")


def load_method(name: str) -> "type[Method]":
    """The method class that `methods/<name>` defines.

    Raises UsageError for an unknown name and TypeError for a module that does not define exactly one
    subclass of Method. A broken file shows its own traceback.
    """
    check_method_name(name)
    from sparsecache.methods.base import Method

    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one subclass of Method; it defines {len(found)}.")
    method: type[Method] = found[0]
    return method


def make_method(name: str, options: dict[str, Any]) -> "Method":
    """An instance of the method; `options` as parse_options returns them.

    The constructor itself refuses values out of range (ValueError, passed on as UsageError).
    """
    try:
        return load_method(name)(**options)
    except ValueError as error:
        raise UsageError(f"Method {name} refuses its options: {error}") from error


def parse_options(name: str, options: dict[str, str]) -> dict[str, Any]:
    """All options of a method: those given on the command line, converted by their annotations, and defaults.

    Raises UsageError for an unknown option or a value that is not of the option's type, with the method's own
    list.
    """
    parameters = method_options(load_method(name))
    arguments = {key: parameter.default for key, parameter in parameters.items()}
    for key, text in options.items():
        if key not in parameters:
            known = ", ".join(f"{option}={parameter.default}" for option, parameter in parameters.items())
            raise UsageError(f"Method {name} has no option {key!r}. Its options: {known or 'none'}.")
        arguments[key] = _convert(name, key, text, parameters[key].annotation)
    return arguments


def method_options(kind: "type[Method]") -> dict[str, inspect.Parameter]:
    """A method's options: the arguments of its constructor, with their defaults."""
    parameters = inspect.signature(kind.__init__, eval_str=True).parameters
    options = {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for name, parameter in options.items():
        if parameter.annotation is parameter.empty or parameter.default is parameter.empty:
            raise TypeError(f"{kind.__name__}.__init__: option {name} needs an annotation and a default.")
    return options


def _convert(method: str, key: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)  # of `int | None`: both
    if NoneType in kinds and text.lower() == "none":
        return None
    (kind,) = (each for each in kinds if each is not NoneType)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"Method {method}: {key}={text!r} is neither true nor false.")
    try:
        value = kind(text)
    except ValueError as error:
        raise UsageError(f"Method {method}: {key}={text!r} is not of type {kind.__name__}.") from error
    if isinstance(value, float) and math.isnan(value):
        raise UsageError(f"Method {method}: {key}={text!r} is not a number.")
    return value
