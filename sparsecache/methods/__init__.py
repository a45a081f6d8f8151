"""Cache methods, one module or package each: the file name is the method's name."""

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

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
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__.startswith(module.__name__)
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one subclass of Method; it defines {len(found)}.")
    method: type[Method] = found[0]
    return method


def make_method(name: str, options: dict[str, str]) -> "Method":
    """An instance of the method from command-line options, converted by its constructor's annotations.

    Raises UsageError for an unknown option or a value that is not of the option's type, with the method's own
    list; the constructor itself refuses values out of range (ValueError, passed on as UsageError).
    """
    kind = load_method(name)
    parameters = method_options(kind)
    arguments = {}
    for key, text in options.items():
        if key not in parameters:
            known = ", ".join(f"{option}={parameter.default}" for option, parameter in parameters.items())
            raise UsageError(f"Method {name} has no option {key!r}. Its options: {known or 'none'}.")
        arguments[key] = _convert(name, key, text, parameters[key].annotation)
    try:
        return kind(**arguments)
    except ValueError as error:
        raise UsageError(f"Method {name} refuses its options: {error}") from error


def method_options(kind: "type[Method]") -> dict[str, inspect.Parameter]:
    """A method's options: the arguments of its constructor, with their defaults."""
    parameters = inspect.signature(kind.__init__, eval_str=True).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "args"
    }


def _convert(method: str, key: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"Method {method}: {key}={text!r} is neither true nor false.")
    try:
        return kind(text)
    except ValueError as error:
        raise UsageError(f"Method {method}: {key}={text!r} is not of type {kind.__name__}.") from error
