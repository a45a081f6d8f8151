"""Shared parts of the command lines: spelling and defaults of options, and errors."""

import contextlib
import errno
import io
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import FrameType
from typing import Any

import click

from sparsecache.errors import UsageError, did_you_mean, one_line
from sparsecache.files import make_folder as make_folder
from sparsecache.longbench.terminal import escape_control_chars, truncate_middle
from sparsecache.options import LARGEST


class FlexibleCommand(click.Command):
    """A command whose long options accept dashes and underscores.

    groups: headings of --help, each with the names of its options; the others are under "Other options".
    """

    def __init__(self, *arguments: Any, groups: Mapping[str, str] | None = None, **attributes: Any):
        super().__init__(*arguments, **attributes)
        self.groups = {heading: names.split() for heading, names in (groups or {}).items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading_of = {name: heading for heading, names in self.groups.items() for name in names}
        rest = "Other options" if self.groups else "Options"
        found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*self.groups, rest)}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                found[heading_of.get(parameter.name or "", rest)].append(_shortened(*record))
        for heading, records in found.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def main(self, *arguments: Any, **attributes: Any) -> Any:
        with report_usage_errors():
            return super().main(*arguments, **attributes)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_with_underscores(argument) for argument in args])


class DefaultGroup(click.Group):
    """A group of commands with a default one, which runs if the first argument is not a command.

    The help of the group shows the options of the default command. Raises UsageError for a misspelled command.
    """

    def __init__(self, *arguments: Any, default: str, **attributes: Any):
        super().__init__(*arguments, **attributes)
        self.default = default

    def main(self, *arguments: Any, **attributes: Any) -> Any:
        with report_usage_errors():
            return super().main(*arguments, **attributes)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first != "--help" and first not in self.commands:
            self._check(first)
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, f"[{self.default}] [OPTIONS] [FOLDERS]...")
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ...")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        default = self.commands[self.default]
        default.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def _check(self, first: str) -> None:
        hint = did_you_mean(first, self.commands)
        if hint and not first.startswith("-") and not Path(first).exists():
            commands = ", ".join(self.commands)
            raise UsageError(f"There is neither a command nor a folder {first!r}{hint} Commands: {commands}.")


def option(settings: Any, name: str, **attributes: Any) -> Callable[[Any], Any]:
    """Returns a click option for a field of a settings dataclass, with its default."""
    default = next(field.default for field in fields(settings) if field.name == name)
    shown = default not in (None, MISSING)
    return click.option(f"--{name}", default=default, show_default=shown, **attributes)


_LONGEST = 4000  # columns of an error; a quoted value may be of any length
_REPORTED = (UsageError, KeyboardInterrupt, OSError, MemoryError, RecursionError, UnicodeError)


@contextmanager
def report_usage_errors() -> Iterator[None]:
    """Prints errors that are not bugs as one sentence, and exits with code 2; Ctrl-C exits with code 130.

    They are UsageError and errors of the system: OSError, MemoryError, RecursionError and UnicodeError. An error of
    writing to stdout is printed, but not if the reader closed the pipe (`| head`). Characters that the encoding of
    stdout lacks are printed as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _noting_interrupts():
        try:
            try:
                yield
            except SystemExit as end:
                _flush_stdout()
                if end.code == 1:  # click's, if Ctrl-C comes while it reads the arguments
                    raise_if_interrupted()
                raise
            _flush_stdout()
        except _REPORTED as error:
            sys.exit(_report(error))
        except Exception:
            if not _Interrupt.noted:
                raise
            sys.exit(_report(KeyboardInterrupt()))


class _Interrupt:
    """Whether Ctrl-C was pressed. Code of a library may turn the KeyboardInterrupt into an error without a cause."""

    noted = False


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed, and something else has been raised for it."""
    if _Interrupt.noted:
        raise KeyboardInterrupt


@contextmanager
def _noting_interrupts() -> Iterator[None]:
    """Notes Ctrl-C in `_Interrupt`, in the outermost context of the main thread."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        _Interrupt.noted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _Interrupt.noted = False


def _report(error: BaseException) -> int:
    """Prints the message of an error; returns the exit code."""
    if _is_interrupt(error):
        sentence, code = "Stopped.", 130
    else:
        sentence, code = _sentence(error), 2
    with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed, too
        if sentence:
            click.echo(truncate_middle(escape_control_chars(sentence), _LONGEST), err=True)
    _redirect_broken_stdout()
    return code


def _sentence(error: BaseException) -> str:
    if isinstance(error, UsageError):
        return f"Error: {error}"
    if isinstance(error, MemoryError):
        return "Error: The memory of this machine does not suffice. Use smaller inputs, or a machine with more memory."
    if isinstance(error, RecursionError):
        return "Error: An input is nested too deeply. Use a flatter one."
    if isinstance(error, UnicodeError):
        return f"Error: A text cannot be converted: {one_line(error):.200}. Use text in UTF-8."
    assert isinstance(error, OSError)
    if error.filename is None and error.errno == errno.EPIPE and _reader_closed_pipe():
        return ""
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"Error: The output cannot be written: {error.strerror}. Free space, or send it elsewhere."
    if error.filename is None:
        return f"Error: The system refused an operation: {one_line(error):.300}."
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"Error: {name:.300} cannot be used: {error.strerror}. Choose another path, or change its permissions."


def _flush_stdout() -> None:
    if sys.stdout is not None:  # stdout may be closed
        sys.stdout.flush()


def _reader_closed_pipe() -> bool:
    """Returns whether stdout is a pipe that its reader has closed."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    return False


def _redirect_broken_stdout() -> None:
    """Redirects a broken stdout to /dev/null, since the interpreter flushes it at exit."""
    try:
        _flush_stdout()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _is_interrupt(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C caused an error: some libraries turn it into another error during import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def option_pairs(options: tuple[str, ...], flag: str = "-o") -> dict[str, str]:
    """Returns KEY=VALUE options as a dict. Raises click.UsageError for another form or a repeated key."""
    values: dict[str, str] = {}
    for text in options:
        key, equals, value = text.partition("=")
        key = key.replace("-", "_")
        if not key or not equals:
            raise click.UsageError(f"{flag} {text!r} is not of the form KEY=VALUE.")
        if key in values:
            raise click.UsageError(f"{flag} gives {key} twice, {values[key]} and {value}: leave one of them out.")
        values[key] = value
    return values


def _shortened(flag: str, text: str) -> tuple[str, str]:
    """Returns an entry of --help with N for a whole number, and without bounds that only keep sizes within 32 bits."""
    text = re.sub(rf"(\d+)<=x<={LARGEST}\b", r"x>=\1", text.replace(f"; -{LARGEST}<=x<={LARGEST}", ""))
    return flag.replace("INTEGER RANGE", "N"), text


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
