"""Runs a sweep: every model with every method and every combination of its options, then one table of all runs.

A sweep is a small TOML file (configs/sweeps/ has examples):

    models = ["demo"]
    arguments = ["--sample_tokens", "2048"]  # of longbench_pred.py, for every run

    [[methods]]
    method = ["infinigen", "oracle"]
    budget = [0.02, 0.1]                     # each combination of the lists' values is a run

A sweep that was stopped goes on where it was: finished runs are only looked at again. What depends on the machine is
given behind --, for every run: `sweep.py FILE --jobs 8 -- --ray_address auto`.
"""

import itertools
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sparsecache.cli import make_folder, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.compare import compare
from sparsecache.longbench.comparison import Comparison
from sparsecache.longbench.html import compare_page
from sparsecache.longbench.paired import common_rows
from sparsecache.longbench.pictures import pictures, require_matplotlib
from sparsecache.longbench.score_tables import share
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tables import Cell, Document, Table, Value, number, records, render, words
from sparsecache.options import show

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    model: str
    method: str
    options: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Folder of the run: the method and the options that the sweep names."""
        return "-".join([self.method, *(f"{key}={value}" for key, value in self.options)])

    def command(self, arguments: list[str], pred_dir: Path) -> list[str]:
        """What predicts it."""
        options = [part for key, value in self.options for part in ("-o", f"{key}={value}")]
        named = ["--model", self.model, "--method", self.method, "--name", self.name, "--pred_dir", str(pred_dir)]
        return [sys.executable, str(PROJECT / "longbench_pred.py"), *named, *options, *arguments]


def read_sweep(file: Path) -> tuple[list[Run], list[str]]:
    """The runs of a sweep file, in its order, and the arguments that all share. Raises UsageError for a bad file."""
    try:
        sweep = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} is no readable TOML file ({error}).") from error
    unknown = sweep.keys() - {"models", "methods", "arguments"}
    if unknown or not sweep.get("models") or not sweep.get("methods"):
        raise UsageError(f"{file} needs `models` and [[methods]], may have `arguments`, and nothing else.")
    lists = (("models", str), ("methods", dict))
    if any(not isinstance(sweep[key], list) or not all(isinstance(x, kind) for x in sweep[key]) for key, kind in lists):
        raise UsageError(
            f'{file}: `models` is a list of texts (models = ["demo"]), and methods are tables ([[methods]]).'
        )
    runs = [run for model in sweep["models"] for table in sweep["methods"] for run in _runs(model, table, file)]
    repeated = {run.name for run in runs if runs.count(run) > 1}
    if repeated:
        raise UsageError(f"{file} names a run twice: {', '.join(sorted(repeated))}.")
    return runs, [str(argument) for argument in sweep.get("arguments", [])]


def _runs(model: str, table: dict[str, Any], file: Path) -> Iterator[Run]:
    if not table.get("method"):
        raise UsageError(f"{file}: each of [[methods]] needs a `method`.")
    keys = ["method", *(key for key in table if key != "method")]
    values = [table[key] if isinstance(table[key], list) else [table[key]] for key in keys]
    for key, choices in zip(keys, values, strict=True):
        if not choices or any(isinstance(choice, dict | list) for choice in choices):
            raise UsageError(f"{file}: {key} = {table[key]!r} must be a value, or a list of some.")
    for method, *chosen in itertools.product(*values):
        yield Run(model, method, tuple(zip(keys[1:], map(show, chosen), strict=True)))


def predict(run: Run, arguments: list[str], pred_dir: Path, threads: int) -> tuple[int, float]:
    """Runs it, its output in a log below `pred_dir`; returns the exit code and the seconds it took."""
    log = pred_dir / "logs" / f"{Path(run.model).name}-{run.name}.log"
    make_folder(log.parent)
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        command = run.command(arguments, pred_dir)
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "Error" in line]
        reason = f" {said[-1].strip()}" if said else ""
        click.echo(f"{run.name} failed (exit code {done.returncode}); see {log}.{reason}", err=True)
    return done.returncode, time.perf_counter() - began


def sweep_table(comparison: Comparison) -> Document:
    """One line a run: the mean of its datasets against the first run's, what it kept, and how fast it decoded."""
    line = next(line for line in comparison.lines if line.name == "flat_mean")
    head = ["run", "mean", "difference", "95% interval", "kept", "decode tokens/s"]
    rows: list[list[Cell]] = []
    facts: list[dict[str, Value]] = []
    for run, entry in zip(comparison.runs, line.entries, strict=True):
        versus, speed = entry.versus, (run.decode or {}).get("tokens_per_s")
        low, high = versus.interval if versus and versus.interval else (None, None)
        interval = "-" if low is None or high is None else f"{low:+.1f} to {high:+.1f}"
        rows.append(
            [
                words(run.name),
                number(entry.score, 1, entry.best),
                number(versus.difference if versus else None, 1),
                words(interval),
                share(entry.kept),
                number(speed, 1),
            ]
        )
        facts.append(
            {
                "run": run.name,
                "method": run.method,
                "mean": entry.score,
                "difference": versus.difference if versus else None,
                "low": low,
                "high": high,
                "kept": entry.kept,
                "decode_tokens_per_s": speed,
                "rows": line.n,
                "datasets": line.datasets,
            }
        )
    explained = f"Mean of {line.datasets} datasets over {line.n} rows; differences are to {comparison.runs[0].name}."
    return Document([Table("", head, rows)], records("", facts), notes=[explained, *comparison.notes])


def conclude(runs: list[Run], pred_dir: Path, out: Path | None, html: bool) -> None:
    """Prints a table for each model, and writes it as Markdown and JSON, with `html` a report too, below `out`."""
    for model in dict.fromkeys(run.model for run in runs):
        folders = [pred_dir / Path(run.model).name / run.name for run in runs if run.model == model]
        scored = [score_run(folder) for folder in folders if list(folder.glob("*.jsonl"))]
        if len(scored) < 2:
            raise UsageError(f"Fewer than two runs of {model} have predictions, so there is nothing to compare.")
        comparison = compare(scored)
        document = sweep_table(comparison)
        click.echo(f"\n{render(document, 'terminal')}")
        if out is not None:
            make_folder(out)
            for suffix, form in (("md", "markdown"), ("json", "json")):
                text = render(document, form)
                write_atomically(out / f"{Path(model).name}.{suffix}", text.rstrip("\n") + "\n")
            if html:
                page = compare_page(comparison, scored, pictures(common_rows(scored).runs))
                write_atomically(out / f"{Path(model).name}.html", page)
            click.echo(f"Written: {out / Path(model).name}.* ({', '.join(['md', 'json', *['html'] * html])})")


def check_report(out: Path | None, html: bool) -> None:
    """Raises UsageError for a report that has no place or cannot be drawn."""
    if html and out is None:
        raise UsageError("--html needs --out, the folder for the report.")
    if html:
        require_matplotlib()


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads of each run; 0: torch's own choice.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and JSON.")
@click.option("--html", is_flag=True, help="Write a report with pictures to --out, too.")
def main(
    file: Path, more: tuple[str, ...], pred_dir: Path, jobs: int, threads: int, out: Path | None, html: bool
) -> None:
    """Run the sweep in FILE and print a table of its runs; MORE, behind --, are arguments of every run."""
    with report_usage_errors():
        check_report(out, html)
        runs, arguments = read_sweep(file)
        make_folder(pred_dir / "logs")
        arguments += more
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda run: predict(run, arguments, pred_dir, threads), runs)
        for number, (run, (code, seconds)) in enumerate(zip(runs, results, strict=True), 1):
            failed += code != 0
            click.echo(
                f"[{number}/{len(runs)}] {run.model} {run.name}: {'failed' if code else 'done'}, {seconds:.0f} s"
            )
    with report_usage_errors():
        conclude(runs, pred_dir, out, html)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
