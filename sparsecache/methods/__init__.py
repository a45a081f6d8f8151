"""Cache methods. A method is named by its file here, by a path to a .py file, or by a module's dotted name."""

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparsecache.errors import UsageError
from sparsecache.options import Option, constructor_options

if TYPE_CHECKING:
    from sparsecache.cache.base import CacheMethod

_HINT = "longbench_pred.py --list_methods shows every method's options."


def method_names() -> list[str]:
    """Return the names of the built-in methods, without importing any (nor torch)."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def is_external(method: str) -> bool:
    """Whether a method is named by a .py file or by a module of another package."""
    return method.endswith(".py") or "." in method or "/" in method


def short_name(method: str) -> str:
    """Return the last part of a method's name: a file's stem, a module's last part."""
    return Path(method).stem if method.endswith(".py") else method.rpartition(".")[2]


def check_method_name(method: str) -> None:
    """Raise UsageError if there is no such method. Imports no method."""
    if is_external(method):
        _external_file(method)
        return
    if method not in method_names():
        near = get_close_matches(method, method_names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"There is no method {method!r}.{hint} Methods: {', '.join(method_names())}, a path to a .py file, or the "
            f"dotted name of an installed module."
        )


def method_identity(method: str) -> str:
    """Return what tells a method from others of its name: the name, for an external one with its file's SHA-256."""
    if not is_external(method):
        return method
    digest = hashlib.sha256(_external_file(method).read_bytes()).hexdigest()
    return f"{short_name(method)}@{digest[:16]}"


def load_method(method: str) -> "type[CacheMethod]":
    """Return the method's class.

    Raises UsageError for an unknown name, a file that cannot be imported, and a file that does not define exactly one
    subclass of CacheMethod that can be instantiated.
    """
    check_method_name(method)
    from sparsecache.cache.base import CacheMethod

    module = _import_external(method) if is_external(method) else importlib.import_module(f"{__name__}.{method}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, CacheMethod)
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    if len(found) != 1:
        raise UsageError(
            f"Method {method} must define exactly one subclass of CacheMethod; it defines {len(found)}"
            f"{': ' * bool(found)}{', '.join(kind.__name__ for kind in found)}."
        )
    kind: type[CacheMethod] = found[0]
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise UsageError(f"Method {method}: class {kind.__name__} must also define {missing}.")
    return kind


def make_method(method: str, options: dict[str, Any]) -> "CacheMethod":
    """Return an instance of a method; `options` as parse_options returns them.

    Raises UsageError for values that the constructor refuses (ValueError).
    """
    with option_errors(method):
        return load_method(method)(**options)


@contextmanager
def option_errors(method: str) -> Iterator[None]:
    """Turn a method's ValueError about its options into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"Method {method} refuses its options: {error} {_HINT}") from error


def parse_options(method: str, options: dict[str, str]) -> dict[str, Any]:
    """Return all options of a method: those given as text, converted by their annotations, and defaults.

    Raises UsageError for an unknown option or a value that is not of the option's type, with what is allowed.
    """
    known = method_options(load_method(method))
    values = {key: option.default for key, option in known.items()}
    for key, text in options.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(map(str, known.values())) or "none"
            raise UsageError(f"Method {method} has no option {key!r}.{hint} Its options: {listed}. {_HINT}")
        try:
            values[key] = known[key].convert(text)
        except ValueError as error:
            raise UsageError(f"Method {method}: {error} {_HINT}") from error
    return values


def method_options(kind: "type[CacheMethod]") -> dict[str, Option]:
    """Return a method's options: the arguments of its constructor."""
    return constructor_options(kind)


def describe_methods() -> Iterator[str]:
    """Yield lines on every built-in method: its first line, then its options with default, meaning and values."""
    for name in method_names():
        options = method_options(load_method(name)).values()
        width = max((len(str(option)) for option in options), default=0)
        yield f"{name}: {method_meaning(name)}"
        yield from (f"  -o {option!s:{width}}  {option.meaning} [{option.allowed}]" for option in options)


def method_meaning(name: str) -> str:
    """Return the first line of a built-in method's file."""
    return (inspect.getdoc(importlib.import_module(f"{__name__}.{name}")) or "").partition("\n")[0]


def _external_file(method: str) -> Path:
    """Return the source file of an external method. Raises UsageError if there is none."""
    if method.endswith(".py") or "/" in method:
        path = Path(method)
        if not (path.is_file() and path.suffix == ".py"):
            raise UsageError(f"--method {method}: there is no such .py file. Give the path of a method's file.")
        return path.resolve()
    try:
        found = importlib.util.find_spec(method)
    except (ImportError, ValueError, AttributeError):
        found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise UsageError(
            f"--method {method}: no module of this name is installed. Give an installed module, the path of a .py "
            f"file, or one of {', '.join(method_names())}."
        )
    return Path(found.origin)


def _import_external(method: str) -> ModuleType:
    path = _external_file(method)
    if not (method.endswith(".py") or "/" in method):
        name = method
    else:  # a name of its own, so that a file called torch.py replaces nothing
        name = f"sparsecache_external_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        if name == method:
            return importlib.import_module(method)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look it up
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {where[-1].lineno}" if where else ""
        raise UsageError(f"--method {method} cannot be imported ({type(error).__name__}: {error}{line}).") from error
    return module
