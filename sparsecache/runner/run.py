"""Run the datasets of one run: rows, prompts, completions, prediction files, `run.json`.

In one file because the steps of a run share its folder, its datasets and its engine.
"""

import gc
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from sparsecache.cli import raise_if_interrupted
from sparsecache.engine.base import Completion, Engine, Request
from sparsecache.engine.library_warnings import show_library_warnings
from sparsecache.errors import UsageError
from sparsecache.longbench.kept import aggregate_kept, count_undropped_rows
from sparsecache.longbench.prompts import Prompt
from sparsecache.longbench.records import RunFolder, verify_rows
from sparsecache.longbench.report import health_table, speed_lines
from sparsecache.longbench.run_record import RUN_FILE
from sparsecache.longbench.sessions import workers_lines
from sparsecache.longbench.tasks import OWN, Task, find_ruler_tasks, load_tasks, make_own_tasks, own_table
from sparsecache.runner.context import RunContext
from sparsecache.runner.description import context_warnings, describe, describe_engine
from sparsecache.runner.folders import check_same_checkpoint
from sparsecache.runner.pending import PendingDataset, Row, WantedDataset, in_order, longest_first, longest_per_dataset
from sparsecache.runner.progress import Progress
from sparsecache.runner.provenance import new_session, now
from sparsecache.runner.rows import error_message, failed_row, finished_row
from sparsecache.runner.settings import Settings
from sparsecache.runner.steps import RowStep, generate_steps, in_batches
from sparsecache.runner.verification import Expected, expected_completions, verify
from sparsecache.runner.wanted import WantedRows, load_wanted

if TYPE_CHECKING:
    from sparsecache.cluster.connection import Cluster

_SAVE_EVERY_S = 10.0  # a kill loses at most this much of the speed figures, and no row


def run(settings: Settings, make_context: Callable[[Settings], RunContext] = RunContext) -> int:
    """Predict what the settings ask for; rows that an earlier run of the same name finished are kept.

    The settings must have passed their own check. The exit code is 0 if every wanted row was read back from
    the prediction files, 1 if a row failed or the method dropped nothing. Raises UsageError for what the user can
    correct, where possible before weights are read.
    """
    show_library_warnings()
    with _cluster(settings) as cluster:
        if cluster is not None:
            settings = replace(settings, device=cluster.device(settings.device))
            settings.check()  # again, now that "auto" is resolved
        return Run(settings, make_context(settings), cluster=cluster).execute()


def is_finished(settings: Settings, context: RunContext | None = None) -> bool:
    """Return whether every wanted row of a run is finished, made as these settings would make it. Reads no weights.

    context: of these settings, if there is one already.

    Raises UsageError as `run`: for settings that do not fit the checkpoint, and for a folder of another run.
    """
    return Run(settings, context or RunContext(settings)).is_finished()


def check_recorded(settings: Settings, context: RunContext | None = None) -> None:
    """Raise UsageError unless the run's folder records what these settings would make. Reads no weights.

    context: of these settings, if there is one already.
    """
    Run(settings, context or RunContext(settings)).check_recorded()


class Run:
    """One run: its folder, its rows, and what is missing of them.

    wanted: the rows, if they are loaded already; runs of one checkpoint may share them.
    """

    def __init__(
        self,
        settings: Settings,
        context: RunContext,
        wanted: WantedRows | None = None,
        cluster: "Cluster | None" = None,
    ):
        self.settings, self.context, self.cluster = settings, context, cluster
        self.wanted = wanted or load_wanted(settings, context)
        self.folder = RunFolder(settings.run_folder)
        self.failed = 0
        self._session: dict[str, Any] = {}
        self._saved = 0.0
        self._expected: list[Expected] = []

    def check_recorded(self) -> None:
        """Raise UsageError unless the folder records this run."""
        self.folder.check(self._identity)

    def is_finished(self) -> bool:
        """Return whether every wanted row is finished. Raises UsageError for a folder of another run."""
        self.check_recorded()
        return all(self._is_complete(dataset) for dataset in self.wanted.datasets)

    def execute(self) -> int:
        """Make what is missing, read everything back, and print a summary; return the exit code."""
        self.context.fetch_weights()
        self.check_folder()
        with ExitStack() as stack:
            engine = None
            if self.settings.overwrite:  # old rows are deleted only once the engine is loaded
                engine = self._load_engine(stack)
                self.clear()
            datasets = stack.enter_context(self.open())
            self.announce(datasets)
            if self.settings.verify or any(dataset.num_missing for dataset in datasets):
                self._predict(datasets, engine or self._load_engine(stack))
            return self.read_back()

    def check_folder(self) -> None:
        """Make the folder. Raises UsageError if a run beside it is of another checkpoint of the same name."""
        location, overwrite = self.context.checkpoint_location, self.settings.overwrite
        check_same_checkpoint(self.folder.path, location, self._identity["checkpoint"], overwrite)
        self.folder.make()

    @contextmanager
    def open(self, stems: Collection[str] | None = None) -> Iterator[list[PendingDataset]]:
        """Claim the folder and open its prediction files, or those of some datasets; close them at the end."""
        wanted = [each for each in self.wanted.datasets if stems is None or each.stem in stems]
        with ExitStack() as stack:
            self.folder.claim(self._identity)
            datasets = [stack.enter_context(dataset.open(self.folder)) for dataset in wanted]
            self.folder.claim(self._identity)  # again: open files cannot be deleted by another process
            yield datasets

    def read_back(self) -> int:
        """Read all wanted rows, and print a summary; return the exit code."""
        datasets = self.wanted.datasets
        rows = {each.stem: verify_rows(self.folder.predictions(each.stem), each.wanted_ids) for each in datasets}
        if not self.settings.quiet:
            print(self._summary(rows))
        no_effect = _no_effect_error(self.settings.method, rows.values())
        if no_effect:
            print(f"Error: {no_effect}", file=sys.stderr)
        failed = self.failed or any("error" in row for each in rows.values() for row in each)
        return 1 if failed or no_effect else 0

    @cached_property  # after the weights are fetched, which it covers
    def _identity(self) -> dict[str, Any]:
        """Return what all rows of the run must share; templates, protocol and data are compared dataset by dataset."""
        datasets = self.wanted.datasets
        return {
            **self.context.identity(),
            "templates": {dataset.stem: dataset.task.template_sha256 for dataset in datasets},
            "protocol": {dataset.stem: _protocol(dataset.task) for dataset in datasets},
            "data": {dataset.stem: dataset.rows.sha256 for dataset in datasets},
        }

    def _is_complete(self, dataset: WantedDataset) -> bool:
        try:
            rows = verify_rows(self.folder.predictions(dataset.stem), dataset.wanted_ids)
        except UsageError:
            return False
        wanted = set(dataset.wanted_ids)
        return not any("error" in row for row in rows if row.get("_id") in wanted)

    def clear(self) -> None:
        """Delete the rows and the record of an earlier run in the folder."""
        known = [task.file_stem(e) for task in load_tasks().values() for e in (False, True)]
        known += [path.stem for path in self.folder.path.glob("*.jsonl") if find_ruler_tasks([path.stem])]
        own = [*make_own_tasks(self.folder.load().tasks, str(self.folder.path / RUN_FILE)), *self._own_tables()]
        self.folder.clear(list(dict.fromkeys([*known, *own])))

    def _load_engine(self, stack: ExitStack) -> Engine:
        """Return the engine, with its weights loaded: this process's own, or the workers of a cluster."""
        max_rows = max(dataset.num_wanted for dataset in self.wanted.datasets)
        if self.cluster is None:
            self._run_reference()  # first: its weights are freed before ours are loaded
            return self.context.engine(max_rows)
        from sparsecache.runner.ray_workers import start_workers

        own_identity = {key: self._identity[key] for key in self.context.identity()}
        workers = stack.enter_context(start_workers(self.cluster, self.settings, own_identity, max_rows))
        if self.settings.overwrite:
            workers.check_loaded()
        return workers

    def _run_reference(self) -> None:
        """Run the first --verify prompts through transformers."""
        if not self.settings.verify:
            return
        rows = (
            (dataset, row)
            for dataset in self.wanted.datasets
            for row in islice(dataset.rows.dataset, dataset.num_wanted)
        )
        requests = []
        for dataset, row in islice(rows, self.settings.verify):
            try:
                prompt = self._prompt(dataset, row)
                requests.append(make_request((dataset.stem, row["_id"]), dataset.task, prompt, self.context))
            except UsageError:
                raise
            except Exception:  # the run itself reports this row
                continue
        self._expected = expected_completions(self.context.reference(), requests)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def announce(self, datasets: list[PendingDataset]) -> None:
        """Print warnings, the settings, and how many rows are missing."""
        for warning in context_warnings(self.context):
            print(f"Warning: {warning}", file=sys.stderr)
        if self.settings.quiet:
            return
        missing = sum(dataset.num_missing for dataset in datasets)
        wanted = sum(dataset.num_wanted for dataset in datasets)
        for line in describe(self.context):
            print(line)
        data = [*([self.settings.data_source] if self.wanted.sources.keys() - {"ruler"} else [])]
        data += [f"RULER with seed {self.settings.ruler_seed}"] if "ruler" in self.wanted.sources else []
        print(f"data        {' and '.join(data)}")
        print(f"rows        {missing} of {wanted} to do, into {self.folder.path}", flush=True)

    def _predict(self, datasets: list[PendingDataset], engine: Engine) -> None:
        self.begin_session()
        if not self.settings.quiet:
            for line in describe_engine(self.context):
                print(line, flush=True)
        if self._expected:
            self._session["verify"] = verify(engine, self._expected, self.context.dtype, self.settings.method)
            engine.reset_stats()  # the run's figures are those of its own rows
        for group in self._groups(datasets):
            self._predict_group(engine, group)
        self.end_session(engine.session())
        if not self.settings.quiet:
            for line in workers_lines(self._session):
                print(line)

    def _groups(self, datasets: list[PendingDataset]) -> list[list[PendingDataset]]:
        """Return the datasets that are decoded together: on a cluster all that have one step, else each alone."""
        one_step = [dataset for dataset in datasets if not dataset.task.answer_template]
        if self.cluster is None or not one_step:
            return [[dataset] for dataset in datasets]
        return [one_step, *([dataset] for dataset in datasets if dataset.task.answer_template)]

    def begin_session(self, **facts: Any) -> None:
        """Record in run.json that this process works on the run, with further facts about it."""
        self._session = new_session(self.settings, self.context.devices, self.wanted.describe_sources()) | facts
        self.save({})

    def end_session(self, measured: dict[str, Any]) -> None:
        """Record what the engine measured, and that this process is done."""
        self.save({**measured, "ended": now()})

    def _predict_group(self, engine: Engine, datasets: list[PendingDataset]) -> None:
        """Predict the missing rows of these datasets."""
        requests = self._requests(longest_first(datasets) if self.cluster else in_order(datasets))
        if self.context.slots > 1:
            if self.cluster:
                known = list(self._requests(longest_per_dataset(datasets), report_errors=False))
            else:
                requests = iter(known := list(requests))
            reserve(engine, known)
        with self._progress(datasets) as progress:
            for batch in in_batches(requests, datasets):
                for completion in generate_steps(engine, batch, self.next_step, progress.add_tokens):
                    self.write(completion)
                    progress.add_row()
                    self.save_periodically(engine.session())

    def next_step(self, completion: Completion) -> Request | Completion:
        """Return the request that asks for the answer after reasoning; after a row's last step, its completion."""
        done: RowStep = completion.key
        task = done.dataset.task
        if not task.answer_template or done.reasoning is not None or completion.error is not None:
            return completion
        try:
            reasoning = self.context.detokenizer.decode(completion.token_ids)
            prompt = self.context.prompter.build_answer(task, done.row, reasoning)
        except UsageError:
            raise
        except Exception as error:  # one row must not end the run
            return replace(completion, error=error_message(error))
        request = make_request(replace(done, reasoning=completion), task, prompt, self.context)
        return replace(request, max_new_tokens=task.answer_max_new_tokens or task.max_new_tokens)

    def write(self, completion: Completion) -> None:
        """Write the row of its last completion."""
        done: RowStep = completion.key
        record = finished_row(done.row, done.prompt, completion, self.context.detokenizer.decode, done.reasoning)
        if "error" in record:
            raise_if_interrupted()
        done.dataset.file.append(record)
        self.failed += "error" in record

    def write_failed(self, row: Row, error: Exception, dataset: PendingDataset) -> None:
        """Write the error row of a row whose prompt could not be built."""
        raise_if_interrupted()
        dataset.file.append(failed_row(row, error))
        self.failed += 1

    def _progress(self, datasets: list[PendingDataset]) -> Progress:
        missing = sum(dataset.num_missing for dataset in datasets)
        wanted = sum(dataset.num_wanted for dataset in datasets)
        workers = self.settings.workers
        name = datasets[0].stem if self.cluster is None else f"{workers} worker{'s' * (workers != 1)}"
        per_second = self.cluster is not None
        return Progress(name, wanted - missing, wanted, quiet=self.settings.quiet, per_second=per_second)

    def _requests(self, rows: Iterable[tuple[PendingDataset, Row]], report_errors: bool = True) -> Iterator[Request]:
        """Yield a request per row. A row whose prompt cannot be built becomes an error row, or is passed over."""
        for dataset, row in rows:
            try:
                prompt = self._prompt(dataset, row)
                yield make_request(RowStep(row, prompt, dataset), dataset.task, prompt, self.context)
            except UsageError:
                raise
            except Exception as error:  # one row must not end the run
                if report_errors:
                    self.write_failed(row, error, dataset)

    def _prompt(self, dataset: WantedDataset, row: Row) -> Prompt:
        return self.context.prompter.build(dataset.task, row)

    def save_periodically(self, measured: dict[str, Any]) -> None:
        """Call `save` if the last call was more than _SAVE_EVERY_S ago."""
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save(measured)

    def save(self, measured: dict[str, Any]) -> None:
        """Record the session in run.json, with what the engine has measured so far."""
        self._session |= measured
        self._saved = time.monotonic()

        def change(record: dict[str, Any]) -> None:
            record["model"] = self.context.model_record()
            known = record.setdefault("datasets", {})
            for dataset in self.wanted.datasets:
                before = known.get(dataset.stem, {}).get("expected_rows", 0)
                known[dataset.stem] = {"expected_rows": max(before, dataset.num_wanted)}
                if deviations := self._deviations(dataset.task):
                    known[dataset.stem]["deviations"] = deviations
            if own := self._own_tables():
                record["tasks"] = record.get("tasks", {}) | own
            others = [other for other in record.get("sessions", []) if other.get("id") != self._session["id"]]
            record["sessions"] = [*others, self._session]

        self.folder.update(change)

    def _own_tables(self) -> dict[str, Any]:
        built_in = load_tasks()
        tasks = self.wanted.tasks
        return {task.name: own_table(task) for task in tasks if task.group == OWN and task.name not in built_in}

    def _deviations(self, task: Task) -> list[str]:
        """Return how this run deviates from the protocol of a dataset."""
        (own,) = (each.max_new_tokens for each in self.wanted.tasks if each.name == task.name)
        return [] if own == task.max_new_tokens else [f"max_new_tokens is {task.max_new_tokens} instead of {own}"]

    def _summary(self, rows: dict[str, list[dict[str, Any]]]) -> str:
        table = health_table((each.task, each.stem, each.num_wanted, rows[each.stem]) for each in self.wanted.datasets)
        return "\n".join([table, *speed_lines(self.folder.load())])


def make_request(key: Any, task: Task, prompt: Prompt, context: RunContext) -> Request:
    """Return the request that continues a prompt."""
    return Request(
        key=key,
        token_ids=prompt.token_ids,
        max_new_tokens=task.max_new_tokens,
        stop_ids=context.stop_ids(task),
        min_new_tokens=1 if task.newline_stop else 0,
    )


def reserve(engine: Engine, requests: list[Request]) -> None:
    """Allocate for the longest of these requests."""
    if requests:
        max_tokens = max(len(request.token_ids) + request.max_new_tokens for request in requests)
        engine.reserve(max_tokens, max(request.max_new_tokens for request in requests))


def _no_effect_error(method: str, datasets: Iterable[list[dict[str, Any]]]) -> str | None:
    """Return the error for a method that dropped nothing in any of these rows though it could have; else None."""
    rows = count_undropped_rows(aggregate_kept(rows) for rows in datasets)
    if not rows:
        return None
    return (
        f"Method {method} did nothing: {rows} rows had more past tokens than its budget, and each attended to all of "
        f"them, so these are the texts of the full cache. Check its options (--list_methods) and its code, and rerun "
        f"with --overwrite."
    )


def _cluster(settings: Settings) -> "AbstractContextManager[Cluster | None]":
    """Return the Ray cluster that the settings ask for, not connected yet. Ray is not imported without one."""
    if not settings.on_ray:
        return nullcontext()
    from sparsecache.cluster.connection import Cluster

    return Cluster(settings.ray_address)


def _protocol(task: Task) -> str:
    answer = f" answer_max_new_tokens={task.answer_max_new_tokens}" if task.answer_template else ""
    return f"max_new_tokens={task.max_new_tokens} chat={task.chat} newline_stop={task.newline_stop}{answer}"
