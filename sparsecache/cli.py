"""What the two command lines share: option names with dashes or underscores, defaults written once, errors."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

import click

from sparsecache.errors import UsageError


class FlexibleCommand(click.Command):
    """A command whose long options may be spelled with dashes or underscores alike."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_with_underscores(argument) for argument in args])


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
    except UsageError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        sys.exit(130)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
