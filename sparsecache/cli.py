"""What the two command lines share: option names with dashes or underscores, defaults written once, errors."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from sparsecache.errors import UsageError
from sparsecache.longbench.terminal import visible


class FlexibleCommand(click.Command):
    """A command whose long options may be spelled with dashes or underscores alike."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_with_underscores(argument) for argument in args])


class DefaultGroup(click.Group):
    """Commands of which one, `default`, is meant when the first argument names none; its help stands with the list.

    A first argument that is nearly the name of a command, and nothing else, is refused.
    """

    def __init__(self, *arguments: Any, default: str, **attributes: Any):
        super().__init__(*arguments, **attributes)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first != "--help" and first not in self.commands:
            with report_usage_errors():
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
        near = get_close_matches(first, self.commands)
        if near and not first.startswith("-") and not Path(first).exists():
            raise UsageError(
                f"There is neither a command nor a folder {first!r}; did you mean {near[0]!r}? Commands: "
                f"{', '.join(self.commands)}."
            )


def option(settings: Any, name: str, **attributes: Any) -> Callable[[Any], Any]:
    """A click option for a field of a settings dataclass, whose default it takes over."""
    default = next(field.default for field in fields(settings) if field.name == name)
    shown = default not in (None, MISSING)
    return click.option(f"--{name}", default=default, show_default=shown, **attributes)


@contextmanager
def report_usage_errors() -> Iterator[None]:
    """Prints a UsageError as one sentence and exits with code 2; Ctrl-C exits with 130."""
    try:
        yield
    except (UsageError, KeyboardInterrupt) as error:
        if _is_stop(error):
            click.echo("Stopped.", err=True)
            sys.exit(130)
        click.echo(f"Error: {visible(str(error))}", err=True)
        sys.exit(2)


def _is_stop(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries make a failure of their own of one while they import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def make_folder(path: Path, option: str = "") -> None:
    """Makes a folder that `option` names. Raises UsageError where there can be none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        named = f"{option} {path}".strip()
        raise UsageError(f"{named} is no folder to write to ({error.strerror}). Name another one.") from error


def option_pairs(options: tuple[str, ...], flag: str = "-o") -> dict[str, str]:
    """The values of `flag` by key. Raises click.UsageError for one that is not KEY=VALUE, and for a key given twice."""
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


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
