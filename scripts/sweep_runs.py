"""The runs of a sweep: read from its file, and checked before the first one starts."""

import io
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from longbench_pred import main as predict_command
from sparsecache.cli import option_pairs
from sparsecache.configs import read_toml
from sparsecache.errors import UsageError, did_you_mean, listed, short
from sparsecache.methods import make_method, parse_options, short_name
from sparsecache.options import show
from sparsecache.runner.settings import Settings

_MAX_RUNS = 1000
_SHOWN = 3  # runs named per problem
_VALUES = str | bool | int | float
_KEYS = ("models", "methods", "arguments")
_ALLOWED = "A sweep has `models` (or --model) and [[methods]], may have `arguments`, and nothing else."


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a model, a method, and the options that the sweep states."""

    model: str
    method: str
    options: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Return the folder of the run: the method and its options."""
        return "-".join([short_name(self.method), *(f"{key}={value}" for key, value in self.options)])

    def __str__(self) -> str:
        return f"{self.model} {self.name}"

    def arguments(self, common_arguments: list[str], pred_dir: Path) -> list[str]:
        """Return the arguments of longbench_pred.py; `common_arguments` are those of every run."""
        options = [part for key, value in self.options for part in ("-o", f"{key}={value}")]
        named = ["--model", self.model, "--method", self.method, "--name", self.name, "--pred_dir", str(pred_dir)]
        return [*named, *options, *common_arguments]

    def shown(self, common_arguments: list[str], pred_dir: Path) -> str:
        """Return the command line as it is typed."""
        return shlex.join(["python", "longbench_pred.py", *self.arguments(common_arguments, pred_dir)])


def read_sweep(file: Path, models: Sequence[str] = ()) -> tuple[list[SweepRun], list[str]]:
    """Read a sweep file: its runs in order, and the arguments of every run. Raises UsageError for a bad file.

    models: those to take in place of the file's.
    """
    sweep = read_toml(file)
    if models:
        sweep["models"] = list(models)
    if unknown := [key for key in sweep if key not in _KEYS]:
        raise UsageError(f"{file}: there is no key {short(unknown[0])!r}{_right_key(unknown[0])} {_ALLOWED}")
    if not sweep.get("models") or not sweep.get("methods"):
        raise UsageError(f"{file} lacks {'[[methods]]' if sweep.get('models') else '`models`'}. {_ALLOWED}")
    lists = (("models", str), ("methods", dict))
    if any(not isinstance(sweep[key], list) or not all(isinstance(x, kind) for x in sweep[key]) for key, kind in lists):
        raise UsageError(
            f'{file}: `models` is a list of texts (models = ["demo"]), and methods are tables ([[methods]]).'
        )
    arguments = sweep.get("arguments", [])
    if not isinstance(arguments, list) or not all(isinstance(argument, _VALUES) for argument in arguments):
        raise UsageError(f'{file}: `arguments` is a list of texts (arguments = ["--max_samples", "20"]).')
    runs = [run for model in sweep["models"] for table in sweep["methods"] for run in _runs(model, table, file)]
    repeated = {run.name for run, times in Counter(runs).items() if times > 1}
    if repeated:
        raise UsageError(f"{file} names a run twice: {listed(sorted(repeated))}.")
    return runs, [str(argument) for argument in arguments]


def _right_key(key: str) -> str:
    """Return how a message about an unknown key continues."""
    if hint := did_you_mean(key, _KEYS):
        return hint
    is_option = any(f"--{key}" in option.opts for option in predict_command.params)
    return f'. It is an option of longbench_pred.py: arguments = ["--{key}", ...].' if is_option else "."


def _runs(model: str, table: dict[str, Any], file: Path) -> Iterator[SweepRun]:
    if not table.get("method"):
        raise UsageError(f"{file}: each of [[methods]] needs a `method`.")
    keys = ["method", *(key for key in table if key != "method")]
    values = [table[key] if isinstance(table[key], list) else [table[key]] for key in keys]
    for key, choices in zip(keys, values, strict=True):
        kind = str if key == "method" else _VALUES
        if not choices or not all(isinstance(choice, kind) for choice in choices):
            raise UsageError(f"{file}: {key} = {short(table[key])} must be a value, or a list of some.")
    if (number := math.prod(map(len, values))) > _MAX_RUNS:
        raise UsageError(f"{file}: a table of [[methods]] makes {number:,} runs; at most {_MAX_RUNS:,} are made.")
    for method, *chosen in itertools.product(*values):
        yield SweepRun(model, method, tuple(zip(keys[1:], map(show, chosen), strict=True)))


def check_runs(runs: list[SweepRun], common_arguments: list[str], pred_dir: Path) -> dict[SweepRun, Settings]:
    """Return the settings of every run.

    Raises UsageError for options that longbench_pred.py or the method does not take, and for two runs that would share
    a folder. It states each problem once, with the first runs that have it.
    """
    settings, problems, folders = dict[SweepRun, Settings](), dict[str, list[str]](), dict[Path, SweepRun]()
    for run in runs:
        try:
            settings[run] = _settings(run, common_arguments, pred_dir)
            folder = settings[run].run_folder
            if folder in folders:
                raise UsageError(
                    f"its folder {folder} is also that of {folders[folder]}. Rename a model or a method file."
                )
            folders[folder] = run
        except UsageError as error:
            problems.setdefault(str(error), []).append(str(run))
    if problems:
        described = " ".join(f"{listed(of, _SHOWN, whole=True)}: {problem}" for problem, of in problems.items())
        raise UsageError(f"{sum(map(len, problems.values()))} of {len(runs)} runs cannot start. {described}")
    return settings


def _settings(run: SweepRun, common_arguments: list[str], pred_dir: Path) -> Settings:
    """Return what longbench_pred.py makes of the run's command line, checked."""
    try:
        with redirect_stdout(io.StringIO()):  # of --help
            values = predict_command.make_context("longbench_pred.py", run.arguments(common_arguments, pred_dir)).params
        settings = Settings(**{**values, "options": option_pairs(values["options"])})
    except click.ClickException as error:
        raise UsageError(error.format_message()) from error
    except click.exceptions.Exit as error:
        raise UsageError("its arguments only print something (--help, --list_methods).") from error
    for key, value in {"model": run.model, "method": run.method, "name": run.name, "pred_dir": pred_dir}.items():
        if values[key] != value:  # the run would not be what its name says
            raise UsageError(f"its arguments give --{key}, which the sweep states. Leave it out of them.")
    settings.check()
    make_method(settings.method, parse_options(settings.method, settings.options))
    return settings
