"""The table of a sweep's runs: that of `compare`, or that of `score` where one run alone succeeded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from sweep_predict import shared_context

from sparsecache.cli import make_folder
from sparsecache.errors import UsageError
from sparsecache.files import write_atomically
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.html import compare_page, score_page
from sparsecache.longbench.paired import common_rows
from sparsecache.longbench.plots import draw_all, require_matplotlib
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tables import render
from sparsecache.runner.settings import Settings


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
        """Print and write a table per model of the runs that are `done`; note those that are `missing`."""
        for folder in dict.fromkeys(settings.run_folder.parent for settings in done):
            scored = [score_run(each.run_folder, each.e) for each in done if each.run_folder.parent == folder]
            self._show(folder.name, scored, [f"Not in the table: {each}." for each in missing])
        if not done:
            click.echo("No run succeeded, so there is no table.", err=True)

    def _show(self, model: str, scored: list[RunScore], notes: list[str]) -> None:
        if len(scored) > 1:
            comparison = compare(scored)
            document = replace(compare_document(comparison), title=comparison.subject)
        else:
            comparison, document = None, score_document(scored[0])
            notes = ["There is no other run to compare with.", *notes]
        document = replace(document, notes=[*document.notes, *notes])
        click.echo(f"\n{render(document, 'terminal')}")
        if self.out is None:
            return
        make_folder(self.out, "--out")
        for suffix, form in (("md", "markdown"), ("json", "json")):
            write_atomically(self.out / f"{model}.{suffix}", render(document, form).rstrip("\n") + "\n")
        if self.html:
            plots = draw_all(common_rows(scored).runs if comparison else scored)
            page = compare_page(comparison, scored, plots) if comparison else score_page(scored, [plots])
            write_atomically(self.out / f"{model}.html", page)
        click.echo(f"Written: {self.out / model}.* (md, json{', html' * self.html})")


def move_mismatched_runs(done: Sequence[Settings], missing: Sequence[str]) -> tuple[list[Settings], list[str]]:
    """Move runs whose folder records another run from `done` to `missing`, with the reason; return both."""
    from sparsecache.runner.context import RunContext  # imports torch, which takes seconds
    from sparsecache.runner.run import check_recorded

    missing, found = list(missing), []
    contexts: dict[str, RunContext] = {}
    for settings in done:
        try:
            if not settings.on_ray:  # there the cluster decides on the device, and so on the dtype
                check_recorded(settings, shared_context(settings, contexts))
            found.append(settings)
        except UsageError as error:
            missing.append(f"{settings.run_folder}: {error}".rstrip("."))
    return found, missing
