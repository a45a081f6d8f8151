"""Predicts several runs of one checkpoint in one process: weights are loaded once, and each prompt is read once.

The runs differ in method, options and name. Prompts are read in groups, the longest first. A group's keys and values,
and the queries that methods read, stay in memory while every run decodes the group's rows. If memory does not suffice
for all queries of all prompts, runs that read few of them come first, and the prompts are read again for the others.

In one file because the steps of a group share its runs and their errors. shared_prompts.py reads the prompts.
"""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsecache.cache.base import queries_read
from sparsecache.cli import raise_if_interrupted
from sparsecache.engine.base import EngineStats
from sparsecache.engine.library_warnings import show_library_warnings
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.errors import UsageError, one_line
from sparsecache.files import make_folder
from sparsecache.methods.vanilla import Vanilla
from sparsecache.runner.context import LoadedModel, RunContext
from sparsecache.runner.run import Run, make_request, reserve
from sparsecache.runner.settings import Settings
from sparsecache.runner.shared_prompts import Job, PromptGroups, memory_for_prompts
from sparsecache.runner.steps import RowStep, generate_steps
from sparsecache.runner.wanted import load_wanted


@dataclass(eq=False)
class SharedRun:
    """A run among others of its checkpoint, and how it ended.

    error: why it failed; skipped: whether it was finished before. exit_code: as `run` returns it. seconds: of its own
    work, prompts not included. missing: dataset and `_id` of the rows to make. memory: tokens of each group's prompts,
    and what the caches took for them (`CacheMemory`).
    """

    settings: Settings
    log: Path
    run: Run | None = None
    error: str = ""
    skipped: bool = False
    exit_code: int = 0
    seconds: float = 0.0
    missing: set[tuple[str, str]] = field(default_factory=set)
    stats: EngineStats = field(default_factory=EngineStats)
    memory: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.settings.run_folder.name

    @property
    def required_run(self) -> Run:
        """The run, which must have been made."""
        assert self.run is not None
        return self.run

    @property
    def measured(self) -> dict[str, Any]:
        """What run.json records of the work so far; the memory of caches is a mean over the tokens of all groups."""
        measured: dict[str, Any] = {"clock": asdict(self.stats)}
        if self.memory:
            tokens = sum(count for count, _ in self.memory)
            means = {
                key: value if isinstance(value, int) else sum(count * of[key] for count, of in self.memory) / tokens
                for key, value in self.memory[0][1].items()
            }
            measured["cache"] = {key: round(mean, 1) for key, mean in means.items()}
        return measured

    @property
    def is_open(self) -> bool:
        """Whether rows of it may be missing, and nothing keeps it from making them."""
        return self.run is not None and not self.error and not self.skipped


def predict_shared(
    all_settings: Sequence[Settings],
    on_progress: Callable[[str], None],
    limit_nbytes: float | None = None,
    context_type: type[RunContext] = RunContext,
) -> list[SharedRun]:
    """Predicts runs of one checkpoint that differ in method, options and name. Finished rows are kept.

    A run that fails does not end the others. on_progress: receives lines about the progress. limit_nbytes: the most
    bytes of queries, keys and values of prompts in memory; None: at least half of what is free. The output of each run
    goes to `logs/<model>-<name>.log` below its --pred_dir. Predictions equal those of `run`.
    """
    show_library_warnings()
    runs = [SharedRun(settings, _log(settings)) for settings in all_settings]
    _SharedPrediction(runs, on_progress, limit_nbytes, context_type).execute()
    return runs


class _SharedPrediction:
    """Predicts several runs of one checkpoint, group by group of prompts."""

    def __init__(
        self,
        runs: list[SharedRun],
        on_progress: Callable[[str], None],
        limit_nbytes: float | None,
        context_type: type[RunContext],
    ) -> None:
        self._runs, self._on_progress, self._limit, self._context_type = runs, on_progress, limit_nbytes, context_type
        self._began = time.monotonic()

    @property
    def _open(self) -> list[SharedRun]:
        return [run for run in self._runs if run.is_open]

    def execute(self) -> None:
        context = self._prepare()
        if context is None:
            return
        context.fetch_weights()  # first: the identity of a run covers them
        for run in self._open:
            with self._errors_recorded(run):
                run.skipped = not _needs_work(run)
        if not self._open:
            return
        model = context.load_model()
        for run in self._open:
            with self._errors_recorded(run):
                _start(run)
        jobs = self._jobs(context)
        reader = PrefillCachingDecoder(*model, Vanilla(), PrefillCache())
        limit = self._limit or memory_for_prompts(reader, context.slots, jobs[0].tokens if jobs else 0)
        fits = sum(reader.qkv_nbytes(job.tokens) for job in jobs) <= limit
        gc.collect()
        gc.freeze()  # existing objects stay, so that collections between runs are fast
        try:
            for runs in [self._open] if fits else _by_queries(self._open):
                self._predict_runs([run for run in runs if run.is_open], jobs, model, limit)
        finally:
            gc.unfreeze()

    def _prepare(self) -> RunContext | None:
        """Makes the runs, which find mistakes before weights are read; returns a context, None if no run has one."""
        context, wanted = None, None
        for run in self._runs:
            own = None
            with self._errors_recorded(run):
                settings = run.settings
                own = self._context_type(settings) if context is None else context.with_method(settings)
            if own is not None:
                context = context or own
                wanted = wanted or load_wanted(settings, own)
                run.run = Run(settings, own, wanted)
        return context

    def _jobs(self, context: RunContext) -> list[Job]:
        """Returns the rows that some run misses, the longest prompt first."""
        jobs = []
        missing = {key for run in self._open for key in run.missing}
        for dataset in self._open[0].required_run.wanted.datasets if self._open else []:
            for index, row_id in enumerate(dataset.wanted_ids):
                if (dataset.stem, row_id) not in missing:
                    continue
                row = dataset.rows.dataset[index]
                try:
                    jobs.append(Job(dataset, row, context.prompter.build(dataset.task, row)))
                except UsageError:
                    raise
                except Exception as error:  # one row must not end the runs
                    jobs.append(Job(dataset, row, None, error))
        return sorted(jobs, key=lambda job: job.tokens, reverse=True)

    def _predict_runs(self, runs: list[SharedRun], jobs: list[Job], model: LoadedModel, limit: float) -> None:
        """Decodes the rows that the runs miss; prompts take at most `limit` bytes."""
        missing = {key for run in runs for key in run.missing}
        jobs = [job for job in jobs if job.key in missing]
        read = [queries_read(run.required_run.context.method) for run in runs]
        queries = None if None in read else max(filter(None, read), default=0)
        groups = PromptGroups(jobs, model, limit, queries, self._on_progress)
        self._on_progress(f"{len(runs)} runs, {len(jobs)} prompts in {groups.plan}")
        number = 0
        while groups.waiting and any(run.is_open for run in runs):
            number, began = number + 1, time.monotonic()
            group = groups.read_next()
            name = f"group {number} of {number + len(groups.waiting)}"
            described = groups.described(group, time.monotonic() - began)
            self._on_progress(f"{name}: {described}{self._elapsed()}")
            self._predict_group(name, runs, group, model, groups.prompts)
        for run in runs:
            if run.is_open:
                with self._errors_recorded(run):
                    run.required_run.end_session({})
                    run.exit_code = run.required_run.read_back()

    def _predict_group(
        self, name: str, runs: list[SharedRun], group: list[Job], model: LoadedModel, prompts: PrefillCache
    ) -> None:
        """Decodes the rows of a group with every run."""
        for number, run in enumerate(runs, 1):
            if not run.is_open:  # it failed in another group, or the GPU did
                continue
            start = time.monotonic()
            with self._errors_recorded(run):
                rows, ready = self._decode(run, group, model, prompts)
                seconds = time.monotonic() - start
                run.seconds += seconds
                self._on_progress(
                    f"{name}, run {number} of {len(runs)}: {run.name}, {rows} rows in {seconds:.1f} s, "
                    f"{ready:.1f} s of them to set up{self._elapsed()}"
                )
            gc.collect()  # caches and methods may refer to each other

    def _decode(self, run: SharedRun, group: list[Job], model: LoadedModel, prompts: PrefillCache) -> tuple[int, float]:
        """Decodes the rows of a group that a run misses; returns their number, and the seconds of setting up."""
        began, shared = time.monotonic(), run.required_run
        jobs = [job for job in group if job.key in run.missing]
        with shared.open({job.dataset.stem for job in jobs}) as datasets:
            files = {dataset.stem: dataset for dataset in datasets}
            requests = []
            for job in jobs:
                dataset = files[job.dataset.stem]
                if job.row["_id"] in dataset.file.done:  # another process has finished the row meanwhile
                    continue
                if job.prompt is None:
                    shared.write_failed(job.row, job.error or ValueError("no prompt"), dataset)
                else:
                    key = RowStep(job.row, job.prompt, dataset)
                    requests.append(make_request(key, dataset.task, job.prompt, shared.context))
            if not requests:
                return 0, 0.0
            # Those that may decode longest start first, so that few steps have few sequences.
            requests.sort(key=lambda request: request.max_new_tokens, reverse=True)
            context, before = shared.context, run.stats
            try:
                engine = context.generator(PrefillCachingDecoder(*model, context.method, prompts), len(requests))
                reserve(engine, requests)
                ready = time.monotonic() - began
                for completion in generate_steps(engine, requests, shared.next_step):
                    shared.write(completion)
                    run.stats = _sum(before, engine.stats)
                    shared.save_sometimes(run.measured)
                if memory := engine.session().get("cache"):
                    run.memory.append((sum(job.tokens for job in jobs), memory))
            finally:
                context.method = context.make_method()  # the used one may refer to its caches
            shared.save(run.measured)
        return len(requests), ready

    @contextmanager
    def _errors_recorded(self, run: SharedRun) -> Iterator[None]:
        """Sends output to the run's log; records an error as the run's, and does not raise it."""
        make_folder(run.log.parent, "--pred_dir")
        with run.log.open("a", encoding="utf-8", errors="replace") as log:
            try:
                with redirect_stdout(log), redirect_stderr(log):
                    yield
            except UsageError as error:
                run.error = str(error)
            except Exception as error:  # a run's method must not end the other runs
                raise_if_interrupted()
                run.error = _message(error)
                traceback.print_exc(file=log)
        if run.error:
            self._on_progress(f"{run.name} failed: {run.error}")
            if not _gpu_works():
                for other in self._open:
                    other.error = (
                        f"The GPU cannot be used since {run.name} failed. Give the same command again, without that "
                        f"run; finished rows are kept."
                    )

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"; {seconds // 60}:{seconds % 60:02} since the start"


def _by_queries(runs: list[SharedRun]) -> list[list[SharedRun]]:
    """Returns the runs whose methods read few queries of a prompt, and those that read all; no empty list."""
    reads_all = [queries_read(run.required_run.context.method) is None for run in runs]
    parts = ([run for run, all_ in zip(runs, reads_all, strict=True) if all_ == wanted] for wanted in (False, True))
    return [part for part in parts if part]


def _needs_work(run: SharedRun) -> bool:
    return run.settings.overwrite or not run.required_run.is_finished()


def _start(run: SharedRun) -> None:
    """Claims the folder of a run, finds what is missing, and records that this process works on it."""
    run.required_run.check_folder()
    if run.settings.overwrite:
        run.required_run.clear()
    with run.required_run.open() as datasets:
        run.required_run.announce(datasets)
        run.missing = {(dataset.stem, row_id) for dataset in datasets for row_id in dataset.missing_ids}
    run.required_run.begin_session(shared_prompts=True)


def _sum(one: EngineStats, other: EngineStats) -> EngineStats:
    """The totals of both. The peak of GPU memory is left out, since it holds the prompts of all runs."""
    return EngineStats(
        one.prefill_tokens + other.prefill_tokens,
        one.prefill_s + other.prefill_s,
        one.decode_tokens + other.decode_tokens,
        one.decode_s + other.decode_s,
    )


def _gpu_works() -> bool:
    """Whether the GPU, if there is one, can still be used: some errors of a kernel end that for the process."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _message(error: Exception) -> str:
    """Returns the message that a user sees for a run's error."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "Out of memory. Pass a smaller --limit_memory or --batch_size, or end other programs on the device. Then "
            "rerun the command; finished rows are kept."
        )
    # Later lines of a CUDA error are advice for debugging.
    text = str(error).splitlines()[0] if isinstance(error, torch.AcceleratorError) else one_line(error)
    return f"{type(error).__name__}: {text}"


def _log(settings: Settings) -> Path:
    folder = settings.run_folder
    return settings.pred_dir / "logs" / f"{folder.parent.name}-{folder.name}.log"
