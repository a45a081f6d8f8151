"""A run of scripts/bench.py: what it measures, and its results as they come."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from sparsecache.bench.methods_table import MethodRow, methods_table
from sparsecache.bench.models import BenchModel
from sparsecache.bench.modes import BaselineSeconds, decode, prefill, replay
from sparsecache.bench.results import Result, save, save_plot, table
from sparsecache.bench.several_methods import measure_methods
from sparsecache.bench.specs import MethodSpec
from sparsecache.bench.timing import free_memory
from sparsecache.bench.vllm_baseline import Vllm
from sparsecache.bench.workload import Workload
from sparsecache.engine.base import Request
from sparsecache.errors import one_line
from sparsecache.files import write_atomically


@dataclass
class BenchRun:
    """What to measure, and the results so far."""

    mode: str
    model: str
    dtype: str
    workloads: list[Workload]
    baselines: list[str]
    specs: list[MethodSpec]
    vllm: Vllm | None = None

    def __post_init__(self) -> None:
        self.name = f"{self.mode}-{Path(self.model).name}"
        self.results: list[Result] = []
        self.failed = False

    def run(self, measured: Iterator[Result], what: str = "") -> None:
        """Print and keep each result as it comes; on a failure print why and keep the results before it."""
        try:
            for result in measured:
                self.results.append(result)
                click.echo(table([result]).strip("\n"))
        except RuntimeError as error:  # includes OutOfMemoryError
            click.echo(f"Could not finish {self.mode}{what}: {one_line(error)}", err=True)
            self.failed = True
        free_memory()

    def run_methods(self, model: BenchModel, out: Path | None) -> None:
        """Measure all methods at every size; print a table per size. The files in `out` hold the rows so far."""
        stem = None if out is None else out / f"methods-{Path(self.model).name}"
        rows: list[MethodRow] = []
        external_s = self.vllm.decode_step_s(model, self.workloads) if self.vllm else {}
        try:
            for measured in measure_methods(model, self.workloads, self.baselines, self.specs, external_s):
                before = len(rows)
                for row in measured:
                    rows.append(row)
                    time = f"{1000 * row.step_s:.2f} ms" if row.step_s is not None else row.error
                    click.echo(f"{row.tokens} tokens, batch {row.batch}, {row.name}: {time}", err=True)
                    if stem is not None:
                        save(rows, Path(f"{stem}.json"), model=self.model, dtype=self.dtype)
                        write_atomically(Path(f"{stem}.md"), methods_table(rows, "markdown") + "\n")
                click.echo(methods_table(rows[before:]))
        except RuntimeError as error:  # the device is not usable any more
            click.echo(f"Could not measure the other methods: {one_line(error)}", err=True)
            self.failed = True
        self.failed |= any(row.error for row in rows)

    def run_each(self, model: BenchModel) -> None:
        """Measure each workload; a failure of one leaves the others."""
        external_s: BaselineSeconds = {}
        if self.vllm is not None:
            measure = self.vllm.decode_step_s if self.mode == "decode" else self.vllm.first_token_s
            external_s = measure(model, self.workloads)
        for workload in self.workloads:
            what = f" of {workload.tokens} tokens, batch {workload.batch}"
            if self.mode == "decode":
                self.run(decode(model, [workload], self.baselines, self.specs, external_s), what)
            else:
                self.run(prefill(model, [workload], self.baselines, external_s), what)

    def run_replay(self, model: BenchModel, requests: list[Request], slots: int) -> None:
        """Measure a replay of requests with up to `slots` at once."""
        external_s = self.vllm.replay_s(model, requests) if self.vllm else {}
        self.run(replay(model, requests, slots, self.baselines, self.specs[0], external_s))

    @contextmanager
    def saved(self, stem: Path | None) -> Iterator[None]:
        """On leaving, also after Ctrl-C, write the results as JSON and, where matplotlib is installed, as a plot."""
        interrupted = True
        try:
            yield
            interrupted = False
        finally:
            if stem is not None and (self.results or not interrupted):
                methods = ", ".join(map(str, self.specs))
                save(self.results, Path(f"{stem}.json"), model=self.model, dtype=self.dtype, method=methods)
            if stem is not None and self.results:
                save_plot(self.results, Path(f"{stem}.svg"))
