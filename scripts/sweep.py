"""Run a sweep: every model with every method and every combination of its options, then print one table.

A sweep is a small TOML file (configs/sweeps/ has examples):

    models = ["demo"]
    arguments = ["--sample_tokens", "2048"]  # of longbench_pred.py, for every run

    [[methods]]
    method = ["infinigen", "oracle"]
    budget = [0.02, 0.1]                     # each combination of the lists' values is a run

All options are checked before the first run starts. Rerun the command to resume: finished runs are skipped. Arguments
that depend on the machine go behind --, for every run: `sweep.py FILE -- --data ROWS --batch_size 16`.

The runs of a model share one process: weights are loaded once, and each prompt is prefilled once. Texts are those
of longbench_pred.py. A row's prefill_s is the time in which its prompt was prefilled for all runs (shared_prefill_s)
and the method's own. Runs with --workers, --verify or --engine transformers are processes of their own.
"""

import math
import sys
from pathlib import Path

import click
from sweep_predict import predict_in_process, predict_in_subprocesses
from sweep_runs import check_runs, read_sweep
from sweep_table import Report, move_mismatched_runs

from sparsecache.cli import FlexibleCommand, make_folder, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.runner.settings import Settings


@click.command(cls=FlexibleCommand)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", "models", multiple=True, help="Checkpoint in place of the file's models; repeatable.")
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True)
@click.option(
    "--limit_memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory for queries, keys and values of prompts. Default: at least half of the free memory.",
)
@click.option(
    "--separate", is_flag=True, help="Make each run in a process of its own. Prompts are then prefilled once per run."
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Processes at a time. More than 1 implies --separate.",
)
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads per process. 0: torch's default.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and JSON.")
@click.option("--html", is_flag=True, help="Write a report with plots to --out, too.")
@click.option("--dry_run", is_flag=True, help="Check all options and print the command of each run; start none.")
def main(
    file: Path,
    more: tuple[str, ...],
    models: tuple[str, ...],
    pred_dir: Path,
    limit_memory: float | None,
    separate: bool,
    jobs: int,
    threads: int,
    out: Path | None,
    html: bool,
    dry_run: bool,
) -> None:
    """Make all runs of the sweep in FILE and print one table. MORE, behind --, are arguments of every run.

    Exits with 1 if a run failed. The table shows the others.
    """
    with report_usage_errors():
        report = Report(out, html)
        if limit_memory is not None and math.isnan(limit_memory):  # click's range lets it pass
            raise UsageError("--limit_memory nan must be a number of GiB above 0.")
        runs, arguments = read_sweep(file, models)
        common_arguments = [*arguments, *more]
        settings = check_runs(runs, common_arguments, pred_dir)
        if dry_run:
            for run in runs:
                click.echo(run.shown(common_arguments, pred_dir))
            return
        make_folder(pred_dir / "logs", "--pred_dir")
        separate = separate or jobs > 1 or any(map(_needs_process, settings.values()))
        if separate:
            ended = predict_in_subprocesses(settings, jobs, threads)
        else:
            ended = predict_in_process(settings, limit_memory, threads)
        outcomes = {}
        for number, (run, outcome) in enumerate(ended, 1):
            outcomes[run] = outcome
            click.echo(f"[{number}/{len(settings)}] {run}: {outcome}")
        done = [settings[run] for run, outcome in outcomes.items() if outcome.has_rows]
        missing = [f"{run}, which {outcome}" for run, outcome in outcomes.items() if not outcome.has_rows]
        report.show(*move_mismatched_runs(done, missing) if separate else (done, missing))
        sys.exit(1 if any(outcome.code for outcome in outcomes.values()) else 0)


def _needs_process(settings: Settings) -> bool:
    """Return whether a run needs a process of its own."""
    return settings.on_ray or bool(settings.verify) or settings.engine != "sparsecache"


if __name__ == "__main__":
    main()
