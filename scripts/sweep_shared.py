"""Runs a sweep, as sweep.py, in one process that prefills each prompt once for all runs.

Predictions equal those of sweep.py. It is faster where many runs share long prompts. A row's prefill_s is of no use,
since only the first run prefills; decode_s is the method's own. The prompts of one dataset are in memory at a time
(bundled checkpoint: 62 MB for 2,048 tokens).
"""

import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
from sweep_runs import Run, check_runs, read_sweep
from sweep_table import Report

from sparsecache.cli import make_folder, report_usage_errors
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights
from sparsecache.errors import UsageError
from sparsecache.runner.context import RunContext
from sparsecache.runner.run import run as predict
from sparsecache.runner.settings import Settings


class SharedContext(RunContext):
    """A run's context whose prompts are prefilled once for all runs that share `prompts`."""

    def __init__(self, settings: Settings, prompts: PrefillCache):
        super().__init__(settings)
        self.prompts = prompts

    def make_decoder(self, architecture: Architecture, weights: Weights, rope: Rope) -> Decoder:
        return PrefillCachingDecoder(architecture, weights, rope, self.method, self.prompts)


def predict_all(
    settings: dict[Run, Settings], context_type: type[SharedContext] = SharedContext
) -> tuple[dict[Run, str], set[Run]]:
    """Predicts all runs, dataset by dataset, with their output in logs below --pred_dir.

    Returns why runs failed, and the runs with failed rows or a method that dropped nothing.
    """
    failed, incomplete = dict[Run, str](), set[Run]()
    for model in dict.fromkeys(run.model for run in settings):
        of_model = {run: each for run, each in settings.items() if run.model == model}
        first = next(iter(of_model.values()))
        for task in first.wanted_tasks():
            start, prompts = time.perf_counter(), PrefillCache()
            for run, each in of_model.items():
                if run in failed:
                    continue
                log = each.pred_dir / "logs" / f"{each.run_folder.parent.name}-{run.name}.log"
                make_context = partial(context_type, prompts=prompts)
                try:
                    if _predict_quietly(replace(each, datasets=task.name), make_context, log):
                        incomplete.add(run)
                except UsageError as error:
                    failed[run] = str(error)
                    click.echo(f"{run} failed: {error}", err=True)
            click.echo(f"{model} {task.name}: {len(of_model)} runs, {time.perf_counter() - start:.0f} s", err=True)
    return failed, incomplete


def _predict_quietly(settings: Settings, make_context: Callable[[Settings], RunContext], log: Path) -> int:
    make_folder(log.parent, "--pred_dir")
    with log.open("a", encoding="utf-8", errors="replace") as out, redirect_stdout(out), redirect_stderr(out):
        return predict(settings, make_context)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and JSON.")
@click.option("--html", is_flag=True, help="Write a report with plots to --out, too.")
def main(file: Path, pred_dir: Path, out: Path | None, html: bool) -> None:
    """Run the sweep in FILE, dataset by dataset, and print a table of its runs; exits with 1 if a run failed."""
    with report_usage_errors():
        report = Report(out, html)
        runs, arguments = read_sweep(file)
        settings = check_runs(runs, arguments, pred_dir)
        failed, incomplete = predict_all(settings)
        for run in incomplete:
            click.echo(f"{run}: rows failed, or the method dropped nothing; see its log in {pred_dir}/logs.", err=True)
        done = [each for run, each in settings.items() if run not in failed]
        report.show(done, [f"{run}, which failed: {reason}" for run, reason in failed.items()])
        sys.exit(1 if failed or incomplete else 0)


if __name__ == "__main__":
    main()
