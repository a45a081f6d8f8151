"""One run: tasks -> prompts -> completions -> records. Joins the benchmark half and the generation half."""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sparsecache.engine.base import Completion, Engine, Request
from sparsecache.engine.library_warnings import show_library_warnings
from sparsecache.errors import UsageError
from sparsecache.longbench.data import Rows, Source, load_rows, open_source
from sparsecache.longbench.kept import dropped_nothing, kept_of
from sparsecache.longbench.records import PredictionFile, RunFolder, read_rows
from sparsecache.longbench.report import health_table, speed_lines
from sparsecache.longbench.scores import load_metric
from sparsecache.longbench.sessions import workers_lines
from sparsecache.longbench.tasks import Task, load_tasks, select_tasks
from sparsecache.runner.context import RunContext
from sparsecache.runner.pending import PendingDataset, Row, in_order, largest, longest_first
from sparsecache.runner.provenance import new_session, now
from sparsecache.runner.rows import failed_row, finished_row
from sparsecache.runner.settings import Settings
from sparsecache.synthetic.source import SampleSource

if TYPE_CHECKING:
    from sparsecache.cluster.connection import Cluster


def run(settings: Settings, make_context: Callable[[Settings], RunContext] = RunContext) -> int:
    """Runs what the settings ask for, from where an earlier run of the same name left off.

    The settings must have passed their own check; `make_context` brings them together with a checkpoint. Returns the
    exit code: 0, or 1 when a row failed or the method did nothing. Raises UsageError for anything the user can put
    right, before any weights are read where that is possible.
    """
    show_library_warnings()
    with _cluster(settings) as cluster:
        if cluster is not None:
            settings = replace(settings, device=cluster.device(settings.device))
            settings.check()  # once more, now that "auto" is decided
        return _Run(settings, make_context, cluster).execute()


_SAVE_EVERY_S = 10.0  # what a kill may cost of the speed figures; rows are never lost
_ROWS_PER_SECOND = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class _Run:
    def __init__(self, settings: Settings, make_context: Callable[[Settings], RunContext], cluster: "Cluster | None"):
        self.settings, self.cluster = settings, cluster
        self.context = make_context(settings)  # first: a wrong model is found sooner than data is had
        self.source = _source(settings)
        self.folder = RunFolder(settings.pred_dir / self.context.model.name / settings.run_name)
        self.failed = 0

    def execute(self) -> int:
        """Claims the folder, does what is missing, and prints the health of what is there."""
        e = self.settings.e
        loaded = [(task, load_rows(self.source, task, e)) for task in select_tasks(self.settings.datasets, e)]
        for task, _ in loaded:
            load_metric(task.metric)
            self.context.prompter.room(task)
        self.context.fetch_weights()
        identity = {**self.context.identity(), **_tasks_identity(loaded, e)}
        self.folder.make()
        if self.settings.overwrite:
            if self.cluster is not None:  # else a refusal would cost the old rows
                from sparsecache.runner.ray_workers import check_capacity

                check_capacity(self.cluster, self.settings)
            self.context.check_weights()  # before any row is deleted
            self.folder.clear([task.file_stem(flag) for task in load_tasks().values() for flag in (False, True)])
        with ExitStack() as stack:
            self.folder.claim(identity)
            works = [self._open(stack, task, rows) for task, rows in loaded]
            self.folder.claim(identity)  # once more, now that nobody can delete what is held
            self._announce(works)
            if self.settings.verify or any(work.missing for work in works):
                self._predict(works)
            rows = {work.stem: list(read_rows(work.file.path)) for work in works}
            print(self._health(works, rows))
        useless = _useless(self.settings.method, rows.values())
        if useless:
            print(f"Error: {useless}", file=sys.stderr)
        return 1 if self.failed or useless else 0

    def _open(self, stack: ExitStack, task: Task, rows: Rows) -> PendingDataset:
        stem = task.file_stem(self.settings.e)
        file = stack.enter_context(PredictionFile(self.folder.predictions(stem)))
        available = len(rows.dataset)
        return PendingDataset(task, stem, rows, file, min(self.settings.max_samples or available, available))

    def _announce(self, works: list[PendingDataset]) -> None:
        missing, wanted = sum(work.missing for work in works), sum(work.wanted for work in works)
        for line in self.context.describe():
            print(line)
        print(f"data        {self.settings.data_source}")
        print(f"rows        {missing} of {wanted} to do, into {self.folder.path}", flush=True)
        for warning in self.context.warnings():
            print(f"Warning: {warning}", file=sys.stderr)

    def _predict(self, works: list[PendingDataset]) -> None:
        session = new_session(self.settings, self.context.devices, self.source.describe())
        self._save(session, works)
        saved = time.monotonic()
        expected = self._reference_completions(works)  # before our own weights take the memory
        with self._engine(max(work.wanted for work in works)) as engine:
            if expected:
                session["verify"] = _compare(engine, expected)
                engine.reset_clock()  # the run's figures are those of its own rows
            for together in [works] if self.cluster else [[work] for work in works]:
                for _ in self._predict_together(engine, together):
                    if time.monotonic() - saved > _SAVE_EVERY_S:
                        session |= engine.session()
                        saved = time.monotonic()
                        self._save(session, works)
            session |= engine.session()
        session["ended"] = now()
        self._save(session, works)
        for line in workers_lines(session):
            print(line)

    def _engine(self, most_rows: int) -> AbstractContextManager[Engine]:
        """This process's own, or the workers of a cluster."""
        if self.cluster is None:
            return nullcontext(self.context.engine(most_rows))
        from sparsecache.runner.ray_workers import start_workers

        return start_workers(self.cluster, self.settings, self.context.identity(), most_rows)

    def _predict_together(self, engine: Engine, works: list[PendingDataset]) -> Iterator[None]:
        """Does what is missing of these datasets, and yields after every row."""
        requests = self._requests(longest_first(works) if self.cluster else in_order(works))
        if self.context.slots > 1:
            if self.cluster:
                known = list(self._requests(largest(works), quietly=True))
            else:
                requests = iter(known := list(requests))
            if known:
                max_tokens = max(len(request.token_ids) + request.max_new_tokens for request in known)
                engine.reserve(max_tokens, max(request.max_new_tokens for request in known))
        new_tokens = 0

        def tick(tokens: int) -> None:
            nonlocal new_tokens
            new_tokens += tokens
            bar.set_postfix_str(f"{new_tokens} new tokens", refresh=False)
            bar.update(0)

        with self._bar(works) as bar:
            for completion in engine.generate(requests, tick):
                row, prompt, work = completion.key
                record = finished_row(row, prompt, completion, self.context.decode)
                work.file.append(record)
                self.failed += "error" in record
                bar.update()
                yield

    def _bar(self, works: list[PendingDataset]) -> Any:
        wanted, missing = sum(work.wanted for work in works), sum(work.missing for work in works)
        if self.cluster is None:
            return tqdm(total=wanted, initial=wanted - missing, desc=works[0].stem, unit="row")
        workers = f"{self.settings.workers} worker{'s' * (self.settings.workers != 1)}"
        return tqdm(total=wanted, initial=wanted - missing, desc=workers, unit="row", bar_format=_ROWS_PER_SECOND)

    def _requests(self, rows: Iterable[tuple[PendingDataset, Row]], quietly: bool = False) -> Iterator[Request]:
        """A request for each row. One that makes none becomes an error row, or (`quietly`) is passed over."""
        for work, row in rows:
            try:
                yield self._request(work, row)
            except UsageError:
                raise
            except Exception as error:  # a row that the tokenizer chokes on must not end the run
                if not quietly:
                    work.file.append(failed_row(row, error))
                    self.failed += 1

    def _request(self, work: PendingDataset, row: Row) -> Request:
        prompt = self.context.prompter.build(work.task, row)
        return Request(
            key=(row, prompt, work),
            token_ids=prompt.token_ids,
            max_new_tokens=work.task.max_new_tokens,
            stop_ids=self.context.stop_ids(work.task),
            min_new_tokens=1 if work.task.newline_stop else 0,
        )

    def _reference_completions(self, works: list[PendingDataset]) -> list[Completion]:
        """What transformers makes of the first --verify prompts, its weights gone again afterwards."""
        if not self.settings.verify:
            return []
        rows = ((work, row) for work in works for row in islice(work.rows.dataset, work.wanted))
        requests = list(self._requests(islice(rows, self.settings.verify), quietly=True))  # the run reports the others
        completions = list(self.context.reference().generate(requests))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return completions

    def _save(self, session: dict[str, Any], works: list[PendingDataset]) -> None:
        def change(record: dict[str, Any]) -> None:
            record["model"] = self.context.model_record()
            datasets = record.setdefault("datasets", {})
            for work in works:
                before = datasets.get(work.stem, {}).get("expected_rows", 0)
                datasets[work.stem] = {"expected_rows": max(before, work.wanted)}
            others = [other for other in record.get("sessions", []) if other.get("id") != session["id"]]
            record["sessions"] = [*others, session]

        self.folder.update(change)

    def _health(self, works: list[PendingDataset], rows: dict[str, list[dict[str, Any]]]) -> str:
        table = health_table((work.task, work.stem, work.wanted, rows[work.stem]) for work in works)
        return "\n".join([table, *speed_lines(self.folder.load())])


def _useless(method: str, datasets: Iterable[list[dict[str, Any]]]) -> str | None:
    """The sentence on a method that dropped nothing in any of these rows though it could have; None for any other."""
    rows = dropped_nothing(kept_of(rows) for rows in datasets)
    if not rows:
        return None
    return (
        f"Method {method} did nothing: {rows} rows had more past tokens than its cap, and each attended to all of "
        f"them, so these are the texts of the full cache, not the method's. Look at its options (--list_methods) and "
        f"its code, and run again with --overwrite."
    )


def _compare(engine: Engine, expected: list[Completion]) -> dict[str, Any]:
    """Runs the same prompts through our engine; prints and returns where the texts part."""
    theirs = {done.key[0]["_id"]: done for done in expected}
    differing = []
    for mine in engine.generate([done.request for done in expected]):
        row, other = mine.key[0], theirs[mine.key[0]["_id"]]
        if mine.error or other.error or mine.token_ids != other.token_ids:
            at = _first_difference(mine.token_ids, other.token_ids)
            differing.append({"_id": row["_id"], "dataset": row["dataset"], "first_differing_token": at})
            print(f"verify: {row['dataset']} {row['_id']}: texts part at new token {at}.")
    print(f"verify: {len(expected) - len(differing)} of {len(expected)} prompts give the text of transformers.")
    return {"prompts": len(expected), "differing": differing}


def _cluster(settings: Settings) -> "AbstractContextManager[Cluster | None]":
    """The Ray cluster that the settings ask for; nothing is connected or started yet, nor Ray imported without one."""
    if not settings.on_ray:
        return nullcontext()
    from sparsecache.cluster.connection import Cluster

    return Cluster(settings.ray_address)


def _source(settings: Settings) -> Source:
    sample = SampleSource(settings.sample_rows, settings.sample_tokens, settings.sample_seed)
    return open_source(settings.data_source, revision=settings.data_revision, offline=settings.offline, sample=sample)


def _tasks_identity(loaded: list[tuple[Task, Rows]], e: bool) -> dict[str, dict[str, str]]:
    """The part of a run's identity that is compared dataset by dataset."""
    return {
        "templates": {task.file_stem(e): task.template_sha256 for task, _ in loaded},
        "protocol": {
            task.file_stem(e): f"max_new_tokens={task.max_new_tokens} chat={task.chat} newline_stop={task.newline_stop}"
            for task, _ in loaded
        },
        "data": {task.file_stem(e): rows.sha256 for task, rows in loaded},
    }


def _first_difference(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
