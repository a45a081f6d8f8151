"""Cache methods, one module or package each: the file name is the method's name."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsecache.errors import UsageError
from sparsecache.options import Option, constructor_options

if TYPE_CHECKING:
    from sparsecache.methods.base import Method

_WAY_OUT = "longbench_pred.py --list_methods shows every method's options."


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
    with refusals(name):
        return load_method(name)(**options)


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turns a method's ValueError about its options into a UsageError with a way out."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"Method {name} refuses its options: {error} {_WAY_OUT}") from error


def parse_options(name: str, options: dict[str, str]) -> dict[str, Any]:
    """All options of a method: those given on the command line, converted by their annotations, and defaults.

    Raises UsageError for an unknown option or a value that is not of the option's type, with the method's own
    list or what is allowed.
    """
    known = method_options(load_method(name))
    values = {key: option.default for key, option in known.items()}
    for key, text in options.items():
        if key not in known:
            all_of_them = ", ".join(map(str, known.values())) or "none"
            raise UsageError(f"Method {name} has no option {key!r}. Its options: {all_of_them}. {_WAY_OUT}")
        try:
            values[key] = known[key].convert(text)
        except ValueError as error:
            raise UsageError(f"Method {name}: {error} {_WAY_OUT}") from error
    return values


def method_options(kind: "type[Method]") -> dict[str, Option]:
    """A method's options: the arguments of its constructor."""
    return constructor_options(kind)


def describe_methods() -> Iterator[str]:
    """Every method: the first line of its file, and its options with default, meaning and what is allowed."""
    for name in method_names():
        options = method_options(load_method(name)).values()
        width = max((len(str(option)) for option in options), default=0)
        yield f"{name}: {method_meaning(name)}"
        yield from (f"  -o {option!s:{width}}  {option.meaning} [{option.allowed}]" for option in options)


def method_meaning(name: str) -> str:
    """The first line of the method's file."""
    return (inspect.getdoc(importlib.import_module(f"{__name__}.{name}")) or "").partition("\n")[0]
