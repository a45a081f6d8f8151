"""Predict several runs of one checkpoint in one process: load weights once, and prefill each prompt once.

The runs differ in method, options and name. Prompts are prefilled in groups, the longest first. A group's keys and
values, and the queries that methods read, stay in memory while every run decodes the group's rows. If memory does not
suffice for all queries of all prompts, runs that read few of them come first, and the prompts are prefilled again for
the others.

In one file because the steps of a group share its runs and their errors. shared_prompts.py prefills the prompts.
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

from sparsecache.cache.base import most_queries_read, queries_read
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
from sparsecache.runner.shared_prompts import PromptGroups, PromptRow, memory_for_prompts
from sparsecache.runner.steps import RowStep, generate_steps
from sparsecache.runner.wanted import load_wanted


@dataclass(eq=False)
class RunState:
    """The state of one run among others of its checkpoint, and how it ended.

    error: why it failed; skipped: whether it was finished before. exit_code: as `run` returns it. seconds: of its own
    work, shared prefill not included. missing: dataset and `_id` of the rows to make. memory: tokens of each group's
    prompts, and what the caches took for them (`CacheMemory`).
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
        """Return the name of the run's folder."""
        return self.settings.run_folder.name

    @property
    def required_run(self) -> Run:
        """Return the run, which must exist."""
        assert self.run is not None
        return self.run

    @property
    def measured(self) -> dict[str, Any]:
        """Return what run.json records of the work so far. Cache memory is a mean over the tokens of all groups."""
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
    def is_pending(self) -> bool:
        """Return whether rows of the run may be missing, and no error keeps it from making them."""
        return self.run is not None and not self.error and not self.skipped


def predict_shared(
    all_settings: Sequence[Settings],
    on_progress: Callable[[str], None],
    limit_nbytes: float | None = None,
    context_type: type[RunContext] = RunContext,
) -> list[RunState]:
    """Predict runs of one checkpoint that differ in method, options and name. Finished rows are kept.

    A run that fails does not end the others. on_progress: receives lines about the progress. limit_nbytes: the most
    bytes of queries, keys and values of prompts in memory; None: at least half of what is free. The output of each run
    goes to `logs/<model>-<name>.log` below its --pred_dir. Predictions equal those of `run`.
    """
    show_library_warnings()
    states = [RunState(settings, _log(settings)) for settings in all_settings]
    _SharedPrediction(states, on_progress, limit_nbytes, context_type).execute()
    return states


class _SharedPrediction:
    """Predicts several runs of one checkpoint, group by group of prompts."""

    def __init__(
        self,
        states: list[RunState],
        on_progress: Callable[[str], None],
        limit_nbytes: float | None,
        context_type: type[RunContext],
    ) -> None:
        self._states, self._on_progress, self._limit = states, on_progress, limit_nbytes
        self._context_type = context_type
        self._began = time.monotonic()

    @property
    def _pending(self) -> list[RunState]:
        return [state for state in self._states if state.is_pending]

    def execute(self) -> None:
        context = self._prepare()
        if context is None:
            return
        context.fetch_weights()  # first: the identity of a run covers them
        for state in self._pending:
            with self._errors_recorded(state):
                state.skipped = not _needs_work(state)
        if not self._pending:
            return
        model = context.load_model()
        for state in self._pending:
            with self._errors_recorded(state):
                _start(state)
        prompt_rows = self._prompt_rows(context)
        prefiller = PrefillCachingDecoder(*model, Vanilla(), PrefillCache())
        limit = self._limit or memory_for_prompts(prefiller, context.slots, prompt_rows[0].tokens if prompt_rows else 0)
        fits = sum(prefiller.qkv_nbytes(prompt_row.tokens) for prompt_row in prompt_rows) <= limit
        gc.collect()
        gc.freeze()  # existing objects stay, so that collections between runs are fast
        try:
            for states in [self._pending] if fits else _by_queries(self._pending):
                self._predict_runs([state for state in states if state.is_pending], prompt_rows, model, limit)
        finally:
            gc.unfreeze()

    def _prepare(self) -> RunContext | None:
        """Make the runs, which find mistakes before weights are read; return a context, None if no run has one."""
        context, wanted = None, None
        for state in self._states:
            own = None
            with self._errors_recorded(state):
                settings = state.settings
                own = self._context_type(settings) if context is None else context.with_method(settings)
            if own is not None:
                context = context or own
                wanted = wanted or load_wanted(settings, own)
                state.run = Run(settings, own, wanted)
        return context

    def _prompt_rows(self, context: RunContext) -> list[PromptRow]:
        """Return the rows that some run misses, the longest prompt first."""
        prompt_rows = []
        missing = {key for state in self._pending for key in state.missing}
        for dataset in self._pending[0].required_run.wanted.datasets if self._pending else []:
            for index, row_id in enumerate(dataset.wanted_ids):
                if (dataset.stem, row_id) not in missing:
                    continue
                row = dataset.rows.dataset[index]
                try:
                    prompt_rows.append(PromptRow(dataset, row, context.prompter.build(dataset.task, row)))
                except UsageError:
                    raise
                except Exception as error:  # one row must not end the runs
                    prompt_rows.append(PromptRow(dataset, row, None, error))
        return sorted(prompt_rows, key=lambda prompt_row: prompt_row.tokens, reverse=True)

    def _predict_runs(
        self, states: list[RunState], prompt_rows: list[PromptRow], model: LoadedModel, limit: float
    ) -> None:
        """Decode the rows that the runs miss; prompts take at most `limit` bytes."""
        missing = {key for state in states for key in state.missing}
        prompt_rows = [prompt_row for prompt_row in prompt_rows if prompt_row.key in missing]
        queries = most_queries_read(state.required_run.context.method for state in states)
        groups = PromptGroups(prompt_rows, model, limit, queries, self._on_progress)
        self._on_progress(f"{len(states)} runs, {len(prompt_rows)} prompts in {groups.plan}")
        number = 0
        while groups.waiting and any(state.is_pending for state in states):
            number, began = number + 1, time.monotonic()
            group = groups.prefill_next_group()
            name = f"group {number} of {number + len(groups.waiting)}"
            described = groups.described(group, time.monotonic() - began)
            self._on_progress(f"{name}: {described}{self._elapsed()}")
            self._predict_group(name, states, group, model, groups.prompts)
        for state in states:
            if state.is_pending:
                with self._errors_recorded(state):
                    state.required_run.end_session({})
                    state.exit_code = state.required_run.read_back()

    def _predict_group(
        self, name: str, states: list[RunState], group: list[PromptRow], model: LoadedModel, prompts: PrefillCache
    ) -> None:
        """Decode the rows of a group with every run."""
        for number, state in enumerate(states, 1):
            if not state.is_pending:  # it failed in another group, or the GPU did
                continue
            start = time.monotonic()
            with self._errors_recorded(state):
                rows, ready = self._decode(state, group, model, prompts)
                seconds = time.monotonic() - start
                state.seconds += seconds
                self._on_progress(
                    f"{name}, run {number} of {len(states)}: {state.name}, {rows} rows in {seconds:.1f} s, "
                    f"{ready:.1f} s of them to set up{self._elapsed()}"
                )
            gc.collect()  # caches and methods may refer to each other

    def _decode(
        self, state: RunState, group: list[PromptRow], model: LoadedModel, prompts: PrefillCache
    ) -> tuple[int, float]:
        """Decode the rows of a group that a run misses; return their number, and the seconds of setting up."""
        began, run = time.monotonic(), state.required_run
        prompt_rows = [prompt_row for prompt_row in group if prompt_row.key in state.missing]
        with run.open({prompt_row.dataset.stem for prompt_row in prompt_rows}) as datasets:
            files = {dataset.stem: dataset for dataset in datasets}
            requests = []
            for prompt_row in prompt_rows:
                dataset = files[prompt_row.dataset.stem]
                if prompt_row.row["_id"] in dataset.file.done:  # another process has finished the row meanwhile
                    continue
                if prompt_row.prompt is None:
                    run.write_failed(prompt_row.row, prompt_row.error or ValueError("no prompt"), dataset)
                else:
                    key = RowStep(prompt_row.row, prompt_row.prompt, dataset)
                    requests.append(make_request(key, dataset.task, prompt_row.prompt, run.context))
            if not requests:
                return 0, 0.0
            # Those that may decode longest start first, so that few steps have few sequences.
            requests.sort(key=lambda request: request.max_new_tokens, reverse=True)
            context, before = run.context, state.stats
            try:
                engine = context.generator(PrefillCachingDecoder(*model, context.method, prompts), len(requests))
                reserve(engine, requests)
                ready = time.monotonic() - began
                for completion in generate_steps(engine, requests, run.next_step):
                    run.write(completion)
                    state.stats = _sum(before, engine.stats)
                    run.save_periodically(state.measured)
                if memory := engine.session().get("cache"):
                    state.memory.append((sum(prompt_row.tokens for prompt_row in prompt_rows), memory))
            finally:
                context.method = context.make_method()  # the used one may refer to its caches
            run.save(state.measured)
        return len(requests), ready

    @contextmanager
    def _errors_recorded(self, state: RunState) -> Iterator[None]:
        """Send output to the run's log; record an error as the run's, and do not raise it."""
        make_folder(state.log.parent, "--pred_dir")
        with state.log.open("a", encoding="utf-8", errors="replace") as log:
            try:
                with redirect_stdout(log), redirect_stderr(log):
                    yield
            except UsageError as error:
                state.error = str(error)
            except Exception as error:  # a run's method must not end the other runs
                raise_if_interrupted()
                state.error = _message(error)
                traceback.print_exc(file=log)
        if state.error:
            self._on_progress(f"{state.name} failed: {state.error}")
            if not _gpu_works():
                for other in self._pending:
                    other.error = (
                        f"The GPU cannot be used since {state.name} failed. Give the same command again, without that "
                        f"run; finished rows are kept."
                    )

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"; {seconds // 60}:{seconds % 60:02} since the start"


def _by_queries(states: list[RunState]) -> list[list[RunState]]:
    """Return the runs whose methods read few queries of a prompt, and those that read all; no empty list."""
    reads_all = [queries_read(state.required_run.context.method) is None for state in states]
    parts = (
        [state for state, all_ in zip(states, reads_all, strict=True) if all_ == wanted] for wanted in (False, True)
    )
    return [part for part in parts if part]


def _needs_work(state: RunState) -> bool:
    return state.settings.overwrite or not state.required_run.is_finished()


def _start(state: RunState) -> None:
    """Claim the folder of a run, find what is missing, and record that this process works on it."""
    run = state.required_run
    run.check_folder()
    if state.settings.overwrite:
        run.clear()
    with run.open() as datasets:
        run.announce(datasets)
        state.missing = {(dataset.stem, row_id) for dataset in datasets for row_id in dataset.missing_ids}
    run.begin_session(shared_prompts=True)


def _sum(one: EngineStats, other: EngineStats) -> EngineStats:
    """Return the totals of both. The peak of GPU memory is left out, since it holds the prompts of all runs."""
    return EngineStats(
        one.prefill_tokens + other.prefill_tokens,
        one.prefill_s + other.prefill_s,
        one.decode_tokens + other.decode_tokens,
        one.decode_s + other.decode_s,
    )


def _gpu_works() -> bool:
    """Return whether the GPU, if there is one, can still be used: some errors of a kernel end that for the process."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _message(error: Exception) -> str:
    """Return the message that a user sees for a run's error."""
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
