"""One table of a sweep's runs: score, difference to the first, share of tokens kept, speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from sparsecache.cli import make_folder
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.comparison import Comparison
from sparsecache.longbench.html import compare_page
from sparsecache.longbench.paired import common_rows
from sparsecache.longbench.plots import draw_all, require_matplotlib
from sparsecache.longbench.report import decode_speed
from sparsecache.longbench.score_tables import share
from sparsecache.longbench.score_types import MEANS, RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.subjects import subject
from sparsecache.longbench.tables import Document, Table, Value, number, records, render, words
from sparsecache.runner.run import check_recorded
from sparsecache.runner.settings import Settings

_HEAD = ["run", "mean", "kept", "decode tokens/s"]


@dataclass(frozen=True)
class Report:
    """Where the tables go: `out`, a folder for Markdown and JSON, if any; with `html` for a report with plots too.

    The constructor raises UsageError for `html` without `out` or without matplotlib.
    """

    out: Path | None
    html: bool

    def __post_init__(self) -> None:
        if self.html and self.out is None:
            raise UsageError("--html needs --out, the folder for the report.")
        if self.html:
            require_matplotlib()

    def show(self, done: Sequence[Settings], missing: Sequence[str]) -> None:
        """Prints and writes a table per model of the runs that are `done`; notes those that are `missing`."""
        for folder in dict.fromkeys(settings.run_folder.parent for settings in done):
            scored = [score_run(each.run_folder, each.e) for each in done if each.run_folder.parent == folder]
            self._show(folder.name, scored, [f"Not in the table: {each}." for each in missing])
        if not done:
            click.echo("No run succeeded, so there is no table.", err=True)

    def _show(self, model: str, scored: list[RunScore], notes: list[str]) -> None:
        comparison = compare(scored) if len(scored) > 1 else None
        document = sweep_table(comparison, notes) if comparison else _one_run(scored[0], notes)
        click.echo(f"\n{render(document, 'terminal')}")
        if self.out is None:
            return
        make_folder(self.out, "--out")
        for suffix, form in (("md", "markdown"), ("json", "json")):
            write_atomically(self.out / f"{model}.{suffix}", render(document, form).rstrip("\n") + "\n")
        if self.html and comparison:
            page = compare_page(comparison, scored, draw_all(common_rows(scored).runs))
            write_atomically(self.out / f"{model}.html", page)
        kinds = ", ".join(["md", "json", *["html"] * (self.html and comparison is not None)])
        click.echo(f"Written: {self.out / model}.* ({kinds})")


def recorded(done: Sequence[Settings], missing: Sequence[str]) -> tuple[list[Settings], list[str]]:
    """Moves runs whose folder records another run from `done` to `missing`, with the reason."""
    missing, found = list(missing), []
    for settings in done:
        try:
            if not settings.on_ray:  # there the cluster decides on the device, and so on the dtype
                check_recorded(settings)
            found.append(settings)
        except UsageError as error:
            missing.append(f"{settings.run_folder}: {error}".rstrip("."))
    return found, missing


def sweep_table(comparison: Comparison, notes: Sequence[str] = ()) -> Document:
    """The table of `compare` with one line per run, whose flat form has a row per run."""
    means = {group.name: group for group in comparison.groups if group.kind == "average"}
    mean = next(means[name] for name in MEANS.values() if name in means)
    facts: list[dict[str, Value]] = []
    for run, entry in zip(comparison.runs, mean.entries, strict=True):
        difference = entry.difference
        low, high = difference.interval if difference and difference.interval else (None, None)
        facts.append(
            {
                "run": run.name,
                "method": run.method,
                "mean": entry.score,
                "difference": difference.mean if difference else None,
                "low": low,
                "high": high,
                "kept": entry.kept,
                "model_share": entry.model_share,
                "cache_token_nbytes": run.cache.nbytes,
                "host_token_nbytes": run.cache.host_nbytes,
                "decode_tokens_per_s": (run.decode or {}).get("tokens_per_s"),
                "rows": mean.n,
                "datasets": mean.datasets,
            }
        )
    explained = f"Mean of {mean.datasets} datasets over {mean.n} rows; differences are to {comparison.runs[0].name}."
    tables, notes = compare_document(comparison).tables, [explained, *comparison.notes, *notes]
    return Document(tables, records("", facts), title=comparison.subject, notes=notes)


def _one_run(run: RunScore, notes: Sequence[str]) -> Document:
    """The table where one run alone succeeded: no difference to show."""
    mean, speed = run.headline, (decode_speed(run.run) or {}).get("tokens_per_s")
    rows = sum(len(dataset.rows) for dataset in run.datasets)
    cells = [words(run.folder.name), number(mean.score, 1), share(mean.kept), number(speed, 1)]
    fact: dict[str, Value] = {"run": run.folder.name, "method": run.run.identity.method, "mean": mean.score}
    fact |= {"kept": mean.kept, "decode_tokens_per_s": speed, "rows": rows, "datasets": mean.datasets}
    explained = f"Mean of {mean.datasets} datasets over {rows} rows; no other run to compare with."
    return Document([Table("", _HEAD, [cells])], records("", [fact]), title=subject([run]), notes=[explained, *notes])
