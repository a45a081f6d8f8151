"""Check that a cache method keeps the contract of the engine. The checks need only the method.

    python -m sparsecache.testing.contract my_method.py

runs them (`method_checks.py`) for your method, on tiny models with random weights, in under a minute.
"""

import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from transformers.utils.logging import disable_progress_bar

from sparsecache.cli import option_pairs, report_usage_errors
from sparsecache.engine.families import family_names
from sparsecache.errors import UsageError, listed
from sparsecache.methods import option_errors, parse_options
from sparsecache.testing.method_checks import Check, DecodingError, checks
from sparsecache.testing.method_under_test import MethodUnderTest, Options
from sparsecache.testing.random_checkpoint import make_random_checkpoint

_NOT_CHECKED = (
    "Not checked, since all ran on a CPU: that a step can be captured in a CUDA graph (no .item(), no boolean index)."
)


def _converted(method: str, pairs: tuple[str, ...], flag: str) -> Options | None:
    if not pairs:
        return None
    given = option_pairs(pairs, flag)
    options = parse_options(method, given)
    return {key: options[key] for key in given}


@click.command()
@click.argument("method")
@click.option("--lossless", multiple=True, metavar="KEY=VALUE", help="An option that drops nothing; repeatable.")
@click.option(
    "--tight", multiple=True, metavar="KEY=VALUE", help="An option that drops tokens of 40-token prompts; repeatable."
)
@click.option("--model_type", type=click.Choice(family_names()), help="One family only; all by default.")
def main(method: str, lossless: tuple[str, ...], tight: tuple[str, ...], model_type: str | None) -> None:
    """Check a cache METHOD: a built-in one, a .py file, or an installed module.

    Prints a line per check that passes, and one per error of a check that fails; the traceback of an error once. Exits
    with 0, or with 1 if a check fails. With a `budget` option, --lossless is budget=1.0 and --tight is budget=4 unless
    given.
    """
    with report_usage_errors(), option_errors(method):
        subject = MethodUnderTest.of(
            method, _converted(method, lossless, "--lossless"), _converted(method, tight, "--tight")
        )
        torch.set_num_threads(1)
        disable_progress_bar()
        families = [model_type] if model_type else family_names()
        click.echo(f"Families: {listed(families)} (tiny models with random weights)")
        with tempfile.TemporaryDirectory() as folder:
            by_family = [list(checks(subject, _make_checkpoint(Path(folder), family))) for family in families]
            shown: set[str] = set()
            passed = [_passes(families, same_check, shown) for same_check in zip(*by_family, strict=True)]
        failed = passed.count(False)
        click.echo(f"{failed} of {len(passed)} checks failed." if failed else "All checks passed.")
        click.echo(_NOT_CHECKED)
        sys.exit(1 if failed else 0)


def _make_checkpoint(folder: Path, family: str) -> Path:
    return make_random_checkpoint(folder / family, model_type=family, initializer_range=0.25, num_hidden_layers=3)


def _passes(families: Sequence[str], same_check: Sequence[Check], shown: set[str]) -> bool:
    """Run a check with each family; print a line if all pass, else one per error. Return whether all pass.

    shown: errors, without their numbers. Those that are not in it are added, and printed with their traceback.
    """
    failed: dict[str, list[str]] = {}
    for family, (_, check) in zip(families, same_check, strict=True):
        try:
            check()
        except UsageError:
            raise
        except Exception as error:  # an external method may raise anything
            text = str(error) if isinstance(error, DecodingError) else f"{type(error).__name__}: {error}"
            if (kind := re.sub(r"[0-9]+", "N", text)) in shown:
                text = "(the same error)"
            else:
                shown.add(kind)
                text = " ".join([text, *getattr(error, "__notes__", [])])
                click.echo(_traceback(error), err=True, nl=False)
            failed.setdefault(text, []).append(family)
    for text, of in failed.items():
        click.echo(f"FAILED  {same_check[0][0]}: {listed(of)}: {text}")
    if not failed:
        click.echo(f"passed  {same_check[0][0]}")
    return not failed


def _traceback(error: Exception) -> str:
    """Return the traceback of the method's error; none of a check's own error, which says all."""
    if isinstance(error, DecodingError):
        return str(error.args[1])
    return "" if isinstance(error, AssertionError) else "".join(traceback.format_exception(error))


if __name__ == "__main__":
    main()
