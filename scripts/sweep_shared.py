"""As sweep.py, but in one process that reads each prompt once and decodes it with every run's method in turn.

Predictions are those of sweep.py at a fraction of its time where many runs share long prompts. A row's prefill_s is
not its method's own, since only the first run reads the prompt; decode_s is. Prompts of one dataset are held in memory
at a time (the bundled checkpoint: 62 MB for 2,048 tokens).
"""

import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
from sparsecache.engine.remembering import Memory, RememberingDecoder
from sweep import Run, check_report, conclude, read_sweep

from longbench_pred import main as predict_command
from sparsecache.cli import option_pairs, report_usage_errors
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights
from sparsecache.errors import UsageError
from sparsecache.longbench.tasks import select_tasks
from sparsecache.runner.context import RunContext
from sparsecache.runner.run import run as predict
from sparsecache.runner.settings import Settings


class SharedContext(RunContext):
    """A plan whose prompts are read once for all that share its memory."""

    def __init__(self, settings: Settings, memory: Memory):
        super().__init__(settings)
        self.memory = memory

    def make_decoder(self, architecture: Architecture, weights: Weights, rope: Rope) -> Decoder:
        return RememberingDecoder(architecture, weights, rope, self.method, self.memory)


def settings_of(run: Run, arguments: list[str], pred_dir: Path) -> Settings:
    """What longbench_pred.py makes of the run's command line, checked."""
    command = run.command(arguments, pred_dir)[2:]
    values = predict_command.make_context("longbench_pred.py", command).params
    settings = Settings(**{**values, "options": option_pairs(values["options"])})
    settings.check()
    return settings


def predict_all(
    runs: list[Run], arguments: list[str], pred_dir: Path, context_type: type[SharedContext] = SharedContext
) -> None:
    """Predicts all runs, dataset by dataset, their output in logs below `pred_dir`.

    Raises UsageError for what the user can put right, and at the end if rows failed or a method did nothing.
    """
    wanted = [settings_of(run, arguments, pred_dir) for run in runs]
    failed = set()
    for model in dict.fromkeys(settings.model for settings in wanted):
        mine = [settings for settings in wanted if settings.model == model]
        for task in select_tasks(mine[0].datasets, mine[0].e):
            began, memory = time.perf_counter(), Memory()
            for settings in mine:
                log = pred_dir / "logs" / f"{Path(model).name}-{settings.run_name}.log"
                make_context = partial(context_type, memory=memory)
                if _predict_quietly(replace(settings, datasets=task.name), make_context, log):
                    failed.add(str(log))
            click.echo(f"{model} {task.name}: {len(mine)} runs, {time.perf_counter() - began:.0f} s", err=True)
    if failed:
        raise UsageError(f"Rows failed, or the method did nothing; see {', '.join(sorted(failed))}.")


def _predict_quietly(settings: Settings, make_context: Callable[[Settings], RunContext], log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        return predict(settings, make_context)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the tables as Markdown and JSON.")
@click.option("--html", is_flag=True, help="Write a report with pictures to --out, too.")
def main(file: Path, pred_dir: Path, out: Path | None, html: bool) -> None:
    """Run the sweep in FILE, dataset by dataset, and print a table of its runs."""
    with report_usage_errors():
        check_report(out, html)
        runs, arguments = read_sweep(file)
        predict_all(runs, arguments, pred_dir)
        conclude(runs, pred_dir, out, html)


if __name__ == "__main__":
    main()
