"""Runs the datasets of one run: rows, prompts, completions, prediction files, `run.json`.

In one file because the steps of a run share its folder, its datasets and its engine.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from sparsecache.engine.base import Engine, Request
from sparsecache.engine.library_warnings import show_library_warnings
from sparsecache.errors import UsageError
from sparsecache.longbench.data import Source, load_rows, open_source
from sparsecache.longbench.kept import aggregate_kept, count_undropped_rows
from sparsecache.longbench.prompts import Prompt
from sparsecache.longbench.records import RunFolder, verify_rows
from sparsecache.longbench.report import health_table, speed_lines
from sparsecache.longbench.run_record import RUN_FILE
from sparsecache.longbench.scores import load_metric
from sparsecache.longbench.sessions import workers_lines
from sparsecache.longbench.tasks import OWN, Task, find_ruler_tasks, load_tasks, make_own_tasks, own_table
from sparsecache.ruler.source import RulerSource
from sparsecache.runner.context import RunContext
from sparsecache.runner.folders import check_same_checkpoint
from sparsecache.runner.pending import PendingDataset, Row, WantedDataset, in_order, largest, longest_first
from sparsecache.runner.progress import Progress
from sparsecache.runner.provenance import new_session, now
from sparsecache.runner.rows import failed_row, finished_row
from sparsecache.runner.settings import Settings
from sparsecache.runner.verification import Expected, expected_completions, verify
from sparsecache.synthetic.source import SampleSource

if TYPE_CHECKING:
    from sparsecache.cluster.connection import Cluster

_SAVE_EVERY_S = 10.0  # a kill loses at most this much of the speed figures, and no row


def run(settings: Settings, make_context: Callable[[Settings], RunContext] = RunContext) -> int:
    """Predicts what the settings ask for; rows that an earlier run of the same name finished are kept.

    The settings must have passed their own check. Returns the exit code: 0 if every wanted row was read back from
    the prediction files, 1 if a row failed or the method dropped nothing. Raises UsageError for what the user can
    correct, where possible before weights are read.
    """
    show_library_warnings()
    with _cluster(settings) as cluster:
        if cluster is not None:
            settings = replace(settings, device=cluster.device(settings.device))
            settings.check()  # again, now that "auto" is resolved
        return _Run(settings, make_context, cluster).execute()


def is_finished(settings: Settings) -> bool:
    """Whether every wanted row of a run is there, made as these settings would make it. Reads no weights.

    Raises UsageError as `run`: for settings that do not fit the checkpoint, and for a folder of another run.
    """
    return _Run(settings, RunContext, None).is_finished()


def check_recorded(settings: Settings) -> None:
    """Raises UsageError unless the run's folder records what these settings would make. Reads no weights."""
    _Run(settings, RunContext, None).check_recorded()


class _Run:
    def __init__(self, settings: Settings, make_context: Callable[[Settings], RunContext], cluster: "Cluster | None"):
        self.settings, self.cluster = settings, cluster
        self.context = make_context(settings)  # first: it finds mistakes sooner than the data does
        self.tasks = settings.wanted_tasks()
        self.sources = self._sources()
        self.folder = RunFolder(settings.run_folder)
        self.failed = 0
        self._expected: list[Expected] = []

    def check_recorded(self) -> list[WantedDataset]:
        datasets = self._wanted_datasets()
        self.folder.check(self._identity(datasets))
        return datasets

    def is_finished(self) -> bool:
        datasets = self.check_recorded()
        return all(self._is_complete(dataset) for dataset in datasets)

    def execute(self) -> int:
        """Makes what is missing, reads everything back, and prints a summary; returns the exit code."""
        wanted = self._wanted_datasets()
        self.context.fetch_weights()
        identity = self._identity(wanted)
        place, overwrite = self.context.checkpoint_place, self.settings.overwrite
        check_same_checkpoint(self.folder.path, place, identity["checkpoint"], overwrite)
        self.folder.make()
        with ExitStack() as stack:
            engine = self._clear(stack, wanted, identity) if overwrite else None
            self.folder.claim(identity)
            datasets = [stack.enter_context(dataset.open(self.folder)) for dataset in wanted]
            self.folder.claim(identity)  # again: open files cannot be deleted by another process
            self._announce(datasets)
            if self.settings.verify or any(dataset.missing for dataset in datasets):
                self._predict(datasets, engine or self._load_engine(stack, wanted, identity))
            rows = {dataset.stem: verify_rows(dataset.file.path, dataset.wanted_ids) for dataset in datasets}
            if not self.settings.quiet:
                print(self._summary(datasets, rows))
        no_effect = _no_effect_error(self.settings.method, rows.values())
        if no_effect:
            print(f"Error: {no_effect}", file=sys.stderr)
        failed = self.failed or any("error" in row for each in rows.values() for row in each)
        return 1 if failed or no_effect else 0

    def _wanted_datasets(self) -> list[WantedDataset]:
        """Loads the rows of all datasets, and checks that each can be predicted and scored."""
        e, limit = self.settings.e, self.settings.max_samples
        datasets = []
        tasks = [self.settings.limited(task) for task in self.tasks]
        for task in tasks:
            self.context.check_ruler_length(task)
        for task in tasks:
            rows = load_rows(self.sources[task.benchmark], task, e)
            available = len(rows.dataset)
            datasets.append(WantedDataset(task, task.file_stem(e), rows, min(limit or available, available)))
        for dataset in datasets:
            load_metric(dataset.task.metric, dataset.task.source)
            self.context.check_lengths(dataset.task)
        return datasets

    def _sources(self) -> dict[str, Source]:
        """Opens the source of the rows of each benchmark. Raises UsageError for an invalid one."""
        settings = self.settings
        sources: dict[str, Source] = {}
        if files := list(dict.fromkeys(task.benchmark for task in self.tasks if task.benchmark != "ruler")):
            source = open_source(
                settings.data_source,
                revision=settings.data_revision,
                offline=settings.offline,
                sample=SampleSource(settings.sample_rows, settings.sample_tokens, settings.sample_seed),
                benchmarks=files,
            )
            sources |= dict.fromkeys(files, source)
        if len(files) < len({task.benchmark for task in self.tasks}):
            texts = settings.ruler_texts
            sources["ruler"] = RulerSource(self.context.prompter, settings.ruler_rows, settings.ruler_seed, texts)
        return sources

    def _describe_sources(self) -> dict[str, Any]:
        """The entry of the sources in run.json: that of RULER beside the other one, if the run has both."""
        found = [self.sources[benchmark] for benchmark in sorted(self.sources, key=lambda name: name == "ruler")]
        *first, last = (source.describe() for source in found)
        return {**first[0], "ruler": last} if first and "ruler" in self.sources else last

    def _identity(self, datasets: list[WantedDataset]) -> dict[str, Any]:
        """What all rows of the run must share; templates, protocol and data are compared dataset by dataset."""
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

    def _clear(self, stack: ExitStack, wanted: list[WantedDataset], identity: dict[str, Any]) -> Engine:
        """Deletes the old rows, once the engine that makes the new ones is loaded; returns it."""
        engine = self._load_engine(stack, wanted, identity)
        known = [task.file_stem(e) for task in load_tasks().values() for e in (False, True)]
        known += [path.stem for path in self.folder.path.glob("*.jsonl") if find_ruler_tasks([path.stem])]
        own = [*make_own_tasks(self.folder.load().tasks, str(self.folder.path / RUN_FILE)), *self._own_tables()]
        self.folder.clear(list(dict.fromkeys([*known, *own])))
        return engine

    def _load_engine(self, stack: ExitStack, wanted: list[WantedDataset], identity: dict[str, Any]) -> Engine:
        """Returns the engine, with its weights loaded: this process's own, or the workers of a cluster."""
        most_rows = max(dataset.wanted for dataset in wanted)
        if self.cluster is None:
            self._run_reference(wanted)  # first: its weights are freed before ours are loaded
            return self.context.engine(most_rows)
        from sparsecache.runner.ray_workers import start_workers

        own_identity = {key: identity[key] for key in self.context.identity()}
        workers = stack.enter_context(start_workers(self.cluster, self.settings, own_identity, most_rows))
        if self.settings.overwrite:
            workers.check_loaded()
        return workers

    def _run_reference(self, wanted: list[WantedDataset]) -> None:
        """Runs the first --verify prompts through transformers."""
        if not self.settings.verify:
            return
        rows = ((dataset, row) for dataset in wanted for row in islice(dataset.rows.dataset, dataset.wanted))
        requests = []
        for dataset, row in islice(rows, self.settings.verify):
            try:
                requests.append(self._request((dataset.stem, row["_id"]), dataset.task, self._prompt(dataset, row)))
            except UsageError:
                raise
            except Exception:  # the run itself reports this row
                continue
        self._expected = expected_completions(self.context.reference(), requests)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _announce(self, datasets: list[PendingDataset]) -> None:
        for warning in self.context.warnings():
            print(f"Warning: {warning}", file=sys.stderr)
        if self.settings.quiet:
            return
        missing, wanted = sum(dataset.missing for dataset in datasets), sum(dataset.wanted for dataset in datasets)
        for line in self.context.describe():
            print(line)
        data = [*([self.settings.data_source] if self.sources.keys() - {"ruler"} else [])]
        data += [f"RULER with seed {self.settings.ruler_seed}"] if "ruler" in self.sources else []
        print(f"data        {' and '.join(data)}")
        print(f"rows        {missing} of {wanted} to do, into {self.folder.path}", flush=True)

    def _predict(self, datasets: list[PendingDataset], engine: Engine) -> None:
        session = new_session(self.settings, self.context.devices, self._describe_sources())
        self._save(session, datasets)
        if not self.settings.quiet:
            for line in self.context.describe_loaded():
                print(line, flush=True)
        saved = time.monotonic()
        if self._expected:
            session["verify"] = verify(engine, self._expected, self.context.dtype, self.settings.method)
            engine.reset_stats()  # the run's figures are those of its own rows
        for group in [datasets] if self.cluster else [[dataset] for dataset in datasets]:
            for _ in self._predict_group(engine, group):
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    session |= engine.session()
                    saved = time.monotonic()
                    self._save(session, datasets)
        session |= engine.session()
        session["ended"] = now()
        self._save(session, datasets)
        if not self.settings.quiet:
            for line in workers_lines(session):
                print(line)

    def _predict_group(self, engine: Engine, datasets: list[PendingDataset]) -> Iterator[None]:
        """Predicts the missing rows of these datasets; yields after every row."""
        requests = self._requests(longest_first(datasets) if self.cluster else in_order(datasets))
        if self.context.slots > 1:
            if self.cluster:
                known = list(self._requests(largest(datasets), report_errors=False))
            else:
                requests = iter(known := list(requests))
            if known:
                max_tokens = max(len(request.token_ids) + request.max_new_tokens for request in known)
                engine.reserve(max_tokens, max(request.max_new_tokens for request in known))
        with self._progress(datasets) as progress:
            for completion in engine.generate(requests, progress.add_tokens):
                row, prompt, dataset = completion.key
                record = finished_row(row, prompt, completion, self.context.decode)
                dataset.file.append(record)
                self.failed += "error" in record
                progress.add_row()
                yield

    def _progress(self, datasets: list[PendingDataset]) -> Progress:
        wanted, missing = sum(dataset.wanted for dataset in datasets), sum(dataset.missing for dataset in datasets)
        workers = self.settings.workers
        name = datasets[0].stem if self.cluster is None else f"{workers} worker{'s' * (workers != 1)}"
        per_second = self.cluster is not None
        return Progress(name, wanted - missing, wanted, quiet=self.settings.quiet, per_second=per_second)

    def _requests(self, rows: Iterable[tuple[PendingDataset, Row]], report_errors: bool = True) -> Iterator[Request]:
        """Yields a request per row. A row whose prompt cannot be built becomes an error row, or is passed over."""
        for dataset, row in rows:
            try:
                prompt = self._prompt(dataset, row)
                yield self._request((row, prompt, dataset), dataset.task, prompt)
            except UsageError:
                raise
            except Exception as error:  # one row must not end the run
                if report_errors:
                    dataset.file.append(failed_row(row, error))
                    self.failed += 1

    def _prompt(self, dataset: WantedDataset, row: Row) -> Prompt:
        return self.context.prompter.build(dataset.task, row)

    def _request(self, key: Any, task: Task, prompt: Prompt) -> Request:
        return Request(
            key=key,
            token_ids=prompt.token_ids,
            max_new_tokens=task.max_new_tokens,
            stop_ids=self.context.stop_ids(task),
            min_new_tokens=1 if task.newline_stop else 0,
        )

    def _save(self, session: dict[str, Any], datasets: list[PendingDataset]) -> None:
        def change(record: dict[str, Any]) -> None:
            record["model"] = self.context.model_record()
            known = record.setdefault("datasets", {})
            for dataset in datasets:
                before = known.get(dataset.stem, {}).get("expected_rows", 0)
                known[dataset.stem] = {"expected_rows": max(before, dataset.wanted)}
                if deviations := self._deviations(dataset.task):
                    known[dataset.stem]["deviations"] = deviations
            if own := self._own_tables():
                record["tasks"] = record.get("tasks", {}) | own
            others = [other for other in record.get("sessions", []) if other.get("id") != session["id"]]
            record["sessions"] = [*others, session]

        self.folder.update(change)

    def _own_tables(self) -> dict[str, Any]:
        built_in = load_tasks()
        return {task.name: own_table(task) for task in self.tasks if task.group == OWN and task.name not in built_in}

    def _deviations(self, task: Task) -> list[str]:
        """How this run deviates from the protocol of a dataset."""
        (own,) = (each.max_new_tokens for each in self.tasks if each.name == task.name)
        return [] if own == task.max_new_tokens else [f"max_new_tokens is {task.max_new_tokens} instead of {own}"]

    def _summary(self, datasets: list[PendingDataset], rows: dict[str, list[dict[str, Any]]]) -> str:
        table = health_table((each.task, each.stem, each.wanted, rows[each.stem]) for each in datasets)
        return "\n".join([table, *speed_lines(self.folder.load())])


def _no_effect_error(method: str, datasets: Iterable[list[dict[str, Any]]]) -> str | None:
    """Returns the error for a method that dropped nothing in any of these rows though it could have; else None."""
    rows = count_undropped_rows(aggregate_kept(rows) for rows in datasets)
    if not rows:
        return None
    return (
        f"Method {method} did nothing: {rows} rows had more past tokens than its budget, and each attended to all of "
        f"them, so these are the texts of the full cache. Check its options (--list_methods) and its code, and rerun "
        f"with --overwrite."
    )


def _cluster(settings: Settings) -> "AbstractContextManager[Cluster | None]":
    """The Ray cluster that the settings ask for, not connected yet. Ray is not imported without one."""
    if not settings.on_ray:
        return nullcontext()
    from sparsecache.cluster.connection import Cluster

    return Cluster(settings.ray_address)


def _protocol(task: Task) -> str:
    return f"max_new_tokens={task.max_new_tokens} chat={task.chat} newline_stop={task.newline_stop}"
