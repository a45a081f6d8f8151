"""Cache methods. A method is named by its file here, by a path to a .py file, or by a module's dotted name."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from sparsecache.errors import UsageError, did_you_mean, one_line
from sparsecache.options import Names, Option, constructor_options, digest, show

if TYPE_CHECKING:
    from sparsecache.cache.base import CacheMethod

_KINDS = {
    "full": "every past token is stored and attended to",
    "selection": "every past token is stored, a step attends to some of them",
    "eviction": "some past tokens are dropped",
    "quantised": "keys and values are stored in fewer bits",
}
_HINT = "longbench_pred.py --list_methods shows every method's options."


def method_names() -> list[str]:
    """Return the names of the built-in methods, without importing any (nor torch)."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


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
        hint = did_you_mean(method, method_names(), most=3) or "."
        if Path(f"{method}.py").is_file():
            hint = f"; did you mean {f'{method}.py'!r}?"
        raise UsageError(
            f"There is no method {method!r}{hint} Give a method of longbench_pred.py --list_methods, "
            f"the path of a .py file, or the dotted name of an installed module."
        )


def method_identity(method: str) -> str:
    """Return what tells a method from others of its name: the name, for an external one with a hash of its source.

    The source is the method's file, or all files of its package, but not what they import from elsewhere.
    """
    if not is_external(method):
        return method
    return f"{short_name(method)}@{digest(*(each.read_bytes() for each in _source_files(method)))}"


def options_identity(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a run records of a method's options: their values, and of named files a hash of the content.

    options: all of them, as parse_options returns them. The method must have accepted them.
    """
    known = method_options(load_method(method))
    return {key: known[key].identity(value) for key, value in options.items()}


def _text_identity(text: str) -> str:
    """Return a method with its options, `name,key=value`, with the identities of the method and of its options."""
    name, *pairs = text.split(",")
    known = method_options(load_method(name))
    parts = [method_identity(name)]
    for key, _, value in (pair.partition("=") for pair in pairs):
        is_none = known[key].convert(value) is None
        parts.append(f"{key}={value if is_none else known[key].identity(value)}")
    return ",".join(parts)


MethodText = Annotated[str, Names("a method with its options", _text_identity)]
"""The type of an option that names another method, with its options: `name,key=value`."""


def load_method(method: str) -> "type[CacheMethod]":
    """Return the method's class.

    Raises UsageError for an unknown name, a file that cannot be imported, and a file that does not define exactly one
    subclass of CacheMethod that can be instantiated.
    """
    check_method_name(method)
    from sparsecache.cache.base import CacheMethod

    module = _import_external(method) if is_external(method) else importlib.import_module(f"{__name__}.{method}")
    classes = dict.fromkeys(value for value in vars(module).values() if inspect.isclass(value))  # each once
    found = [
        kind
        for kind in classes
        if issubclass(kind, CacheMethod) and f"{kind.__module__}.".startswith(f"{module.__name__}.")
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

    Raises UsageError for values that the constructor refuses (ValueError), and for any error of the constructor of an
    external method, which is its cause.
    """
    kind = load_method(method)
    try:
        with option_errors(method):
            return kind(**options)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if not is_external(method):
            raise
        given = ", ".join(f"{key}={show(value)}" for key, value in options.items()) or "no options"
        raise UsageError(
            f"Method {method} fails with {given}: {type(error).__name__}: {one_line(error)}. The error is in "
            f"{_own_line(error, method)}. Correct that file."
        ) from error


@contextmanager
def option_errors(method: str) -> Iterator[None]:
    """Turn a method's ValueError about its options into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"Method {method} refuses its options: {_with_hint(str(error))}") from error


def parse_options(method: str, options: dict[str, str]) -> dict[str, Any]:
    """Return all options of a method: those given as text, converted by their annotations, presets and defaults.

    Raises UsageError for an unknown option or a value that is not of the option's type, with what is allowed.
    """
    kind = load_method(method)
    known = method_options(kind)
    given = {}
    for key, text in options.items():
        if key not in known and key in kind.absent_options:
            raise UsageError(f"Method {method} has no option {key!r}: {_with_hint(kind.absent_options[key])}")
        if key not in known:
            hint = did_you_mean(key, known) or "."
            listed = ", ".join(map(str, known.values())) or "none"
            raise UsageError(f"Method {method} has no option {key!r}{hint} Its options: {listed}.")
        try:
            given[key] = known[key].convert(text)
        except ValueError as error:
            raise UsageError(f"Method {method}: {_with_hint(str(error))}") from error
    defaults = {key: option.default for key, option in known.items()}
    preset = str(given.get("preset", defaults.get("preset")))
    return {**defaults, **getattr(kind, "presets", {}).get(preset, {}), **given}


def method_options(kind: "type[CacheMethod]") -> dict[str, Option]:
    """Return a method's options: the arguments of its constructor.

    Raises UsageError for an argument that cannot be an option.
    """
    try:
        return constructor_options(kind)
    except (TypeError, NameError, SyntaxError) as error:  # the latter two from annotations in quotes
        raise UsageError(f"The options of {kind.__name__} cannot be read ({one_line(error)}).") from error


def describe_methods() -> Iterator[str]:
    """Yield lines on every built-in method by kind: its first line, then each option's default, meaning and values.

    The last line names the methods that can keep keys and values in host memory.
    """
    methods = {name: load_method(name) for name in method_names()}
    for kind, meaning in _KINDS.items():
        yield f"{kind}: {meaning}"
        for name in (name for name, method in methods.items() if method.kind == kind):
            options = method_options(methods[name]).values()
            width = max((len(str(option)) for option in options), default=0)
            yield f"  {name}: {method_meaning(name)}"
            yield from (f"    -o {option!s:{width}}  {option.meaning} [{option.allowed}]" for option in options)
    offloaded = [name for name, method in methods.items() if "offload" in method_options(method)]
    yield f"offload: keys and values are stored in host memory, by -o offload=true of {', '.join(offloaded)}"


def method_meaning(name: str) -> str:
    """Return the first line of a built-in method's file."""
    return (inspect.getdoc(importlib.import_module(f"{__name__}.{name}")) or "").partition("\n")[0]


def _external_file(method: str) -> Path:
    """Return the source file of an external method. Raises UsageError if there is none."""
    if method.endswith(".py") or "/" in method:
        path = Path(method)
        if not (path.is_file() and path.suffix == ".py"):
            raise UsageError(
                f"Method {method}: there is no such .py file. Give the path of a method's file from the current folder."
            )
        return path.resolve()
    try:
        found = importlib.util.find_spec(method)  # imports the packages that the module lies in
    except (Exception, SystemExit):
        found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise UsageError(
            f"Method {method}: no module of this name is installed. Give an installed module, the path of a .py "
            f"file, or a method of longbench_pred.py --list_methods."
        )
    return Path(found.origin)


def _source_files(method: str) -> list[Path]:
    """Return the file of an external method, or all files of its package."""
    file = _external_file(method)
    return sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


def _import_external(method: str) -> ModuleType:
    path = _external_file(method)
    by_path = method.endswith(".py") or "/" in method
    try:
        return _import_file(path) if by_path else importlib.import_module(method)
    except (Exception, SystemExit) as error:
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {where[-1].lineno}" if where else ""
        raise UsageError(
            f"Method {method} cannot be imported ({type(error).__name__}: {one_line(error)}{line}). Correct the file."
        ) from error


def _own_line(error: BaseException, method: str) -> str:
    """Return where in a method's source an error was raised: file and line; the file alone if no line is known."""
    files = {str(file) for file in _source_files(method)}
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{lines[-1].filename}, line {lines[-1].lineno}" if lines else str(_external_file(method))


def _import_file(path: Path) -> ModuleType:
    """Return the module of a file as it is now.

    Its name is its own, so that a file called torch.py replaces nothing. Bytecode that Python keeps beside a file
    could be of an earlier version.
    """
    source = path.read_bytes()
    name = f"sparsecache_external_{digest(str(path).encode(), source)}_{path.stem}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)  # dataclasses look it up there
        module.__file__ = str(path)
        try:
            exec(compile(source, str(path), "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _with_hint(message: str) -> str:
    """Return a message that says where options are shown, unless it has a second sentence that says what to do."""
    return message if ". " in message or "? " in message else f"{message} {_HINT}"
