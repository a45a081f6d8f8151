"""Runs a sweep: every model with every method and every combination of its options, then prints one table.

A sweep is a small TOML file (configs/sweeps/ has examples):

    models = ["demo"]
    arguments = ["--sample_tokens", "2048"]  # of longbench_pred.py, for every run

    [[methods]]
    method = ["infinigen", "oracle"]
    budget = [0.02, 0.1]                     # each combination of the lists' values is a run

All options are checked before the first run starts. Rerun the command to resume: finished runs are skipped. Arguments
that depend on the machine go behind --, for every run: `sweep.py FILE --jobs 8 -- --ray_address auto`.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
from sweep_runs import Run, check_runs, read_sweep
from sweep_table import Report

from sparsecache.cli import make_folder, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.runner.settings import Settings

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """How a run ended. code: the exit code; reason: of a failure, the error that the run printed."""

    code: int
    seconds: float = 0.0
    reason: str = ""
    log: Path | None = None

    def __str__(self) -> str:
        if self.log is None:
            return "finished before" if self.code == 0 else f"failed: {self.reason.rstrip('.')}"
        ended = {0: "done", 1: "done, with failed rows"}.get(self.code, f"failed (exit code {self.code})")
        see = f"; see {self.log}. {self.reason}".rstrip(". ")
        return f"{ended}, {self.seconds:.0f} s" + (see if self.code else "")


def predict(run: Run, settings: Settings, shared: list[str], threads: int) -> Outcome:
    """Predicts a run in a process of its own, with its output in a log, unless it is finished."""
    pred_dir = settings.pred_dir
    try:
        if _is_finished(settings):
            return Outcome(0)
    except UsageError as error:
        return Outcome(2, reason=str(error))
    log = pred_dir / "logs" / f"{settings.run_folder.parent.name}-{run.name}.log"
    make_folder(log.parent)
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    with log.open("ab") as out:
        begin = out.tell()
        code = subprocess.run(
            run.command(shared, pred_dir), stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    output = log.read_bytes()[begin:].decode(errors="replace")
    errors = [line.strip() for line in output.splitlines() if "Error" in line]
    return Outcome(code, time.perf_counter() - start, errors[-1] if errors else "", log)


def _is_finished(settings: Settings) -> bool:
    """Whether all rows of a run are there. Raises UsageError for settings that do not fit, or another run's folder.

    Runs on Ray, which need the cluster for it, and those that must start anyway are left to their own process.
    """
    if settings.overwrite or settings.verify or settings.on_ray:
        return False
    from sparsecache.runner.run import is_finished  # imports transformers

    with _one_at_a_time:
        return is_finished(settings)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True)
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads of each run; 0: torch's own choice."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and JSON.")
@click.option("--html", is_flag=True, help="Write a report with plots to --out, too.")
@click.option("--dry_run", is_flag=True, help="Check all options, print the command of each run, and start none.")
def main(
    file: Path, more: tuple[str, ...], pred_dir: Path, jobs: int, threads: int, out: Path | None, html: bool,
    dry_run: bool,
) -> None:  # fmt: skip
    """Run the sweep in FILE and print a table of its runs; MORE, behind --, are arguments of every run.

    Exits with 1 if a run failed; the table shows those that did not.
    """
    with report_usage_errors():
        report = Report(out, html)
        runs, arguments = read_sweep(file)
        shared = [*arguments, *more]
        settings = check_runs(runs, shared, pred_dir)
        if dry_run:
            for run in runs:
                click.echo(run.shown(shared, pred_dir))
            return
        make_folder(pred_dir / "logs", "--pred_dir")
        outcomes = _predict_all(settings, shared, jobs, threads)
        done = [settings[run] for run, outcome in outcomes.items() if outcome.code in (0, 1)]
        missing = [f"{run}, which {outcome}" for run, outcome in outcomes.items() if outcome.code not in (0, 1)]
        report.show(done, missing)
        sys.exit(1 if any(outcome.code for outcome in outcomes.values()) else 0)


def _predict_all(settings: dict[Run, Settings], shared: list[str], jobs: int, threads: int) -> dict[Run, Outcome]:
    """Predicts all runs, `jobs` at a time, and prints a line when each has ended."""
    outcomes = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        results = pool.map(lambda run: predict(run, settings[run], shared, threads), settings)
        for number, (run, outcome) in enumerate(zip(settings, results, strict=True), 1):
            outcomes[run] = outcome
            click.echo(f"[{number}/{len(settings)}] {run}: {outcome}")
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes


if __name__ == "__main__":
    main()
