"""Predict the runs of a sweep: those of a model together in this process, or each in a process of its own."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sweep_runs import SweepRun

from sparsecache.cli import make_folder, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.runner.settings import Settings

if TYPE_CHECKING:
    from sparsecache.runner.context import RunContext

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """How a run ended. code: as that of longbench_pred.py. reason: of a failure. log: None if it did not start."""

    code: int
    seconds: float = 0.0
    reason: str = ""
    log: Path | None = None

    @property
    def has_rows(self) -> bool:
        """Return whether the run ended with all its rows, failed ones included."""
        return self.code in (0, 1)

    def __str__(self) -> str:
        if self.log is None:
            return "finished before" if self.code == 0 else f"failed: {self.reason.rstrip('.')}"
        ended = {0: "done", 1: "done, with failed rows"}.get(self.code, "failed")
        see = f"; see {self.log}. {self.reason}".rstrip(". ")
        return f"{ended}, {self.seconds:.0f} s" + (see if self.code else "")


def predict_in_process(
    settings: dict[SweepRun, Settings],
    limit_gib: float | None = None,
    threads: int = 0,
    context_type: "type[RunContext] | None" = None,
) -> Iterator[tuple[SweepRun, Outcome]]:
    """Predict the runs of each model in this process; yield each run with its outcome. Each prompt is prefilled once.

    limit_gib: the most memory of prompts. threads: CPU threads; 0: torch's choice. context_type: of the runs.
    """
    import torch

    from sparsecache.runner.context import RunContext
    from sparsecache.runner.shared import predict_shared

    if threads:
        torch.set_num_threads(threads)
    limit_nbytes = None if limit_gib is None else limit_gib * 2**30
    for model in dict.fromkeys(run.model for run in settings):
        runs = [run for run in settings if run.model == model]
        of_model = [settings[run] for run in runs]
        on_progress = _progress_printer(of_model[0].run_folder.parent.name)
        states = predict_shared(of_model, on_progress, limit_nbytes, context_type or RunContext)
        for run, state in zip(runs, states, strict=True):
            if state.error:
                yield run, Outcome(2, state.seconds, state.error, state.log if state.missing else None)
            else:
                yield run, Outcome(state.exit_code, state.seconds, log=None if state.skipped else state.log)


def _progress_printer(model: str) -> Callable[[str], None]:
    stderr = sys.stderr  # runs send theirs to a log
    return lambda line: print(f"{model}, {line}", file=stderr, flush=True)


def predict_in_subprocesses(
    settings: dict[SweepRun, Settings], jobs: int, threads: int
) -> Iterator[tuple[SweepRun, Outcome]]:
    """Predict each run in a process of its own, `jobs` at a time; yield each with its outcome.

    threads: CPU threads of each process; 0: torch's choice.
    """
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the processes inherit it
    pool, predict = ThreadPoolExecutor(jobs), partial(_predict, {})
    try:
        yield from zip(settings, pool.map(predict, settings.values()), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _predict(contexts: dict[str, "RunContext"], settings: Settings) -> Outcome:
    """Predict a run in a process of its own, with its output in a log, unless it is finished.

    contexts: of each model's first run, by model; empty before the first run of all.
    """
    try:
        if _is_finished(settings, contexts):
            return Outcome(0)
    except UsageError as error:
        return Outcome(2, reason=str(error))
    folder = settings.run_folder
    log = settings.pred_dir / "logs" / f"{folder.parent.name}-{folder.name}.log"
    make_folder(log.parent)
    begin = log.stat().st_size if log.exists() else 0
    start = time.perf_counter()
    code = start_process(settings, log)
    output = log.read_bytes()[begin:].decode(errors="replace")
    errors = [line.strip() for line in output.splitlines() if "Error" in line]
    return Outcome(code, time.perf_counter() - start, errors[-1] if errors else "", log)


def _is_finished(settings: Settings, contexts: dict[str, "RunContext"]) -> bool:
    """Return whether all rows of a run are finished.

    The tokenizer of a model is read once. Runs on Ray, which need the cluster for it, and those that must start anyway
    are left to their own process. Raises UsageError for settings that do not fit, and for a folder of another run.
    """
    if settings.overwrite or settings.verify or settings.on_ray:
        return False
    from sparsecache.runner.run import is_finished  # imports transformers

    with _one_at_a_time:
        return is_finished(settings, shared_context(settings, contexts))


def shared_context(settings: Settings, contexts: dict[str, "RunContext"]) -> "RunContext":
    """Return the context of a run, made of that of the model's first run, which is read if `contexts` lacks it."""
    from sparsecache.runner.context import RunContext  # imports transformers

    first = contexts.get(settings.model)
    context = RunContext(settings) if first is None else first.with_method(settings)
    contexts.setdefault(settings.model, context)
    return context


def start_process(settings: Settings, log: Path) -> int:
    """Predict a run in a new process that writes its output to a log; return the exit code when it has ended."""
    process = multiprocessing.get_context("spawn").Process(target=_run_in_log, args=(settings, log))
    process.start()
    process.join()
    return 2 if process.exitcode is None else process.exitcode


def _run_in_log(settings: Settings, log: Path) -> None:
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    from sparsecache.runner.run import run

    with report_usage_errors():
        sys.exit(run(settings))
