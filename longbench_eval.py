"""Command line to score predictions, compare runs, plot them, gate them and show rows.

Does not import torch. In one file because the commands share their options.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecache.cli import DefaultGroup, FlexibleCommand, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.longbench.metrics import EDIT_BACKENDS
from sparsecache.longbench.plots import SUFFIXES, check_suffix, draw_all, get_plot, plot_kinds, require_matplotlib
from sparsecache.longbench.tables import FORMATS, Document, merge_documents, render
from sparsecache.longbench.terminal import escape_control_chars

if TYPE_CHECKING:
    from sparsecache.longbench.baseline import Baseline
    from sparsecache.longbench.score_types import RunScore
    from sparsecache.longbench.scores import ScoringOptions

_SCORING = (
    click.option(
        "--pred_dir",
        type=click.Path(path_type=Path),
        default=Path("pred"),
        show_default=True,
        help="Folder of all runs.",
    ),
    click.option("--e", is_flag=True, help="Score LongBench-E (<dataset>_e.jsonl) by length bucket."),
    click.option(
        "--tasks",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="File of own tasks, in the form of configs/datasets.toml; by default those that run.json records.",
    ),
    click.option(
        "--edit_backend",
        type=click.Choice(EDIT_BACKENDS),
        default=EDIT_BACKENDS[0],
        show_default=True,
        help="Library that computes the edit similarity of code.",
    ),
    click.option(
        "--official_recursion",
        is_flag=True,
        help="Score 0.0 where the official scorer exceeds Python's recursion limit.",
    ),
)
_FILE = click.Path(path_type=Path, dir_okay=False)
_GROUPS = {
    "Runs": "pred_dir model name baseline",
    "Limits": "max_drop non_inferior max_drop_dataset max_kept min_speedup",
    "Rows": "allow_partial allow_unlike allow_duplicates dataset rows changed_from columns",
    "Output": "kind out per_dataset labels title html format markdown junit save_baseline no_write rouge_score",
    "Scoring": "e tasks edit_backend official_recursion seed",
}


def _check_suffix(*suffixes: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """Return a check that refuses other suffixes, so that a report cannot overwrite predictions or a baseline."""

    def check(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
        if file is not None and file.suffix.lower() not in suffixes:
            raise click.BadParameter(
                f"{file} must end in {' or '.join(suffixes)}, so that it overwrites no other file."
            )
        return file

    return check


_REPORT: dict[str, Any] = {"type": _FILE, "metavar": "FILE", "callback": _check_suffix(".html", ".htm")}
_HTML = click.option("--html", **_REPORT, help="Also write a report with tables and plots to FILE (.html).")
_FORMAT = click.option(
    "--format", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True, help="Format of the tables."
)
_LABELS = click.option(
    "--label", "labels", multiple=True, metavar="RUN=TEXT", help="Name of a run in tables and plots; repeatable."
)
_TITLE = click.option("--title", help="Title, instead of one that names model, data and runs.")


@dataclass(frozen=True)
class _Scoring:
    """The options that every command has: where runs are, and how to score them."""

    pred_dir: Path
    e: bool
    tasks: Path | None
    edit_backend: str
    official_recursion: bool

    def run(self, name: str, **more: bool) -> "RunScore":
        """Return the scores of a run named on the command line."""
        from sparsecache.longbench.runs import find_run
        from sparsecache.longbench.scores import ScoringOptions, score_run
        from sparsecache.longbench.tasks import load_own_tasks

        options = ScoringOptions(self.edit_backend, self.official_recursion, **more)
        return score_run(find_run(name, self.pred_dir), self.e, options, load_own_tasks(self.tasks))

    def labeled(self, names: Sequence[str], labels: Sequence[str]) -> "list[RunScore]":
        """Return the scores of runs with their labels (RUN=TEXT)."""
        from sparsecache.longbench.runs import parse_labels, with_label

        found = parse_labels(labels, names)
        return [with_label(self.run(name), found.get(name)) for name in names]

    def baseline(self, name: str) -> "Baseline":
        """Return a saved baseline, or a run as one."""
        from sparsecache.longbench.baseline import load_baseline, make_baseline

        if os.path.isfile(name):
            return load_baseline(Path(name))
        return make_baseline(self.run(name), self._options)

    def pair(self, run: str, baseline: str) -> "tuple[Baseline, Baseline, list[str]]":
        """Return a run and a baseline, and notes on rows that were matched by order."""
        from sparsecache.longbench.baseline import load_baseline, make_baseline
        from sparsecache.longbench.row_ids import matched_by_order_notes, with_row_ids

        if os.path.isfile(baseline):
            return self.baseline(run), load_baseline(Path(baseline)), []
        runs, stems = with_row_ids([self.run(run), self.run(baseline)])
        candidate, reference = (make_baseline(each, self._options) for each in runs)
        return candidate, reference, list(matched_by_order_notes(stems))

    @property
    def _options(self) -> "ScoringOptions":
        from sparsecache.longbench.scores import ScoringOptions

        return ScoringOptions(self.edit_backend, self.official_recursion)


def _scoring(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SCORING):
        command = option(command)
    return command


@click.group(cls=DefaultGroup, default="score")
def main() -> None:
    """Score the predictions in FOLDERS, or those of --model and --name; or run one of the commands below.

    A run is given as the path of its folder, or as MODEL/NAME below --pred_dir. Every command has --help.
    """


@main.command(cls=FlexibleCommand, groups=_GROUPS)
@click.argument("folders", nargs=-1)
@click.option("--model", help="Model folder of the run, with --name.")
@click.option("--name", help="Name of the run, with --model.")
@_scoring
@click.option("--allow_partial", is_flag=True, help="Exit with 0 even if rows are missing or failed.")
@click.option("--allow_duplicates", is_flag=True, help="Count every row with a repeated _id.")
@click.option("--rouge_score", is_flag=True, help="Also show ROUGE-1/2/L of the package rouge-score.")
@click.option("--no_write", is_flag=True, help="Write no result.json and summary.json into FOLDERS.")
@_HTML
@_FORMAT
def score(
    folders: tuple[str, ...],
    model: str | None,
    name: str | None,
    allow_partial: bool,
    allow_duplicates: bool,
    rouge_score: bool,
    no_write: bool,
    html: Path | None,
    format: str,
    pred_dir: Path,
    e: bool,
    tasks: Path | None,
    edit_backend: str,
    official_recursion: bool,
) -> None:
    """Print official scores of FOLDERS (the default command).

    Scores the predictions in FOLDERS, or those of --model and --name, and prints a table. Writes result.json (the
    official format) and summary.json into each folder, unless --no_write is given.

    Exit code: 0; 1 if a file is incomplete; 2 if predictions cannot be scored.
    """
    with report_usage_errors():
        if (model is None) != (name is None) or (model is None) == (not folders):
            raise UsageError("Give either --model and --name, or the paths of prediction folders.")
        from sparsecache.longbench.report import write_results
        from sparsecache.longbench.runs import find_run
        from sparsecache.longbench.score_tables import score_document
        from sparsecache.longbench.scores import ScoringOptions, score_run
        from sparsecache.longbench.tasks import load_own_tasks

        if html is not None:
            require_matplotlib()
        paths = [pred_dir / model / name] if model is not None and name is not None else []
        options = ScoringOptions(edit_backend, official_recursion, rouge_score, allow_duplicates)
        results = []
        for folder in paths or [find_run(folder, pred_dir) for folder in folders]:
            results.append(score_run(folder, e, options, load_own_tasks(tasks)))
            if format == "terminal":
                _print(score_document(results[-1]), format)
            if not no_write:
                written = ", ".join(str(path) for path in write_results(results[-1], options))
                click.echo(escape_control_chars(f"Written: {written}") + "\n", err=format != "terminal")
        if format != "terminal":
            _print(merge_documents([score_document(result) for result in results]), format)
        if html is not None:
            from sparsecache.longbench.html import score_page

            _write_page(html, score_page(results, [draw_all([result]) for result in results]))
        sys.exit(0 if allow_partial or all(result.complete for result in results) else 1)


@main.command(cls=FlexibleCommand, groups=_GROUPS)
@click.argument("runs", nargs=-1)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--per_dataset", is_flag=True, help="Also print scores and differences per dataset, and all costs.")
@_LABELS
@_TITLE
@_scoring
@_HTML
@_FORMAT
def compare(
    runs: tuple[str, ...],
    seed: int,
    per_dataset: bool,
    labels: tuple[str, ...],
    title: str | None,
    html: Path | None,
    format: str,
    **scoring: Any,
) -> None:
    """Compare runs over their common rows.

    Prints a line per run: its score, its difference to the first of RUNS with a 95 % interval, what it kept, its cache
    memory and its speed. Rows are matched by dataset and _id, or by order in files without _id; rows that some run
    lacks are left out.

    Exit code: 0, or 2 if runs cannot be compared.
    """
    with report_usage_errors():
        if len(runs) < 2:
            raise UsageError(
                f"compare takes two runs or more, the reference first, not {', '.join(runs) or 'none'}. To score a "
                f"folder named compare, use ./compare."
            )
        from sparsecache.longbench.compare import compare as compared
        from sparsecache.longbench.compare_tables import compare_document

        if html is not None:
            require_matplotlib()
        scored = _Scoring(**scoring).labeled(runs, labels)
        comparison = compared(scored, seed)
        document = compare_document(comparison)
        document = replace(document, title=title or document.title)
        _print(document.with_details() if per_dataset else document, format)
        if html is not None:
            from sparsecache.longbench.html import compare_page
            from sparsecache.longbench.paired import common_rows

            _write_page(html, compare_page(comparison, scored, draw_all(common_rows(scored).runs), title or ""))


@main.command(cls=FlexibleCommand, groups=_GROUPS)
@click.argument("runs", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(plot_kinds()), required=True, help="Kind of plot, see above.")
@click.option("--out", type=_FILE, required=True, help=f"File to write ({', '.join(SUFFIXES)}).")
@_LABELS
@_TITLE
@_scoring
def plot(
    runs: tuple[str, ...], kind: str, out: Path, labels: tuple[str, ...], title: str | None, **scoring: Any
) -> None:
    """Plot one or more RUNS.

    bars: scores by dataset. buckets: scores by length, with --e. frontier: scores against the kept share, a line per
    method and group of options. methods: the same in a panel per method. time: prefill and decode time.

    Uses the rows that all RUNS have, and prints a caption.

    Exit code: 0, or 2 if the plot cannot be drawn.
    """
    with report_usage_errors():
        check_suffix(out)
        draw = get_plot(kind)
        from sparsecache.longbench.paired import common_rows_notes, common_rows_or_all
        from sparsecache.longbench.runs import run_names

        scored = _Scoring(**scoring).labeled(runs, labels)
        drawable = [run for run in scored if not run.failed] or scored
        common = common_rows_or_all(drawable)
        drawn = draw(common.runs)
        drawn = replace(drawn, title=title or drawn.title)
        drawn.save(out)
        for line in (drawn.caption, *common_rows_notes(drawable, common), f"Written: {out}"):
            print(escape_control_chars(line))
        if failed := [name for run, name in zip(scored, run_names(scored), strict=True) if run not in drawable]:
            print(escape_control_chars(f"Left out, since all rows failed: {', '.join(failed)}."))


@main.command(cls=FlexibleCommand, groups=_GROUPS)
@click.argument("runs", nargs=-1, required=True)
@click.option("--baseline", help="Run or saved baseline to compare with.")
@click.option("--max_drop", type=float, help="Largest drop of the mean, in points; 1 without --non_inferior.")
@click.option(
    "--non_inferior",
    type=float,
    metavar="POINTS",
    help="Judge the mean by its 95 % interval: all of it must lie above -POINTS.",
)
@click.option("--max_drop_dataset", type=float, help="Largest drop of any dataset, in points.")
@click.option("--max_kept", type=float, help="Largest mean share of past tokens attended to, 0 to 1.")
@click.option("--min_speedup", type=float, help="Smallest decode speedup over the baseline, on the same device.")
@click.option("--save_baseline", type=click.Path(path_type=Path), help="Save RUN as a baseline unless the gate fails.")
@click.option("--html", **_REPORT, help="Also write a report to FILE (.html).")
@click.option(
    "--markdown", type=_FILE, metavar="FILE", callback=_check_suffix(".md"), help="Also write a table to FILE (.md)."
)
@click.option(
    "--junit", type=_FILE, metavar="FILE", callback=_check_suffix(".xml"), help="Also write JUnit XML to FILE (.xml)."
)
@click.option("--allow_partial", is_flag=True, help="Use the common rows if rows are missing or failed.")
@click.option("--allow_unlike", is_flag=True, help="Turn errors about different data or prompts into warnings.")
@_scoring
def gate(
    runs: tuple[str, ...],
    baseline: str | None,
    max_drop: float | None,
    non_inferior: float | None,
    max_drop_dataset: float | None,
    max_kept: float | None,
    min_speedup: float | None,
    save_baseline: Path | None,
    html: Path | None,
    markdown: Path | None,
    junit: Path | None,
    allow_partial: bool,
    allow_unlike: bool,
    **scoring: Any,
) -> None:
    """Check runs against a baseline.

    Checks that each of RUNS is as good as --baseline within the limits. The method, its options, the engine and the
    dtype may differ; the rest of the identity in run.json (checkpoint, data, prompts, ...) must be equal.

    Exit code: 0 if all pass, 1 if one fails, 2 if runs cannot be compared.
    """
    with report_usage_errors():
        if baseline is None and save_baseline is None:
            raise UsageError("Give --baseline (a run, or a saved file), or --save_baseline to save one, or both.")
        for flag, file in (("--html", html), ("--markdown", markdown), ("--junit", junit)):
            if baseline is None and file is not None:
                raise UsageError(f"{flag} needs --baseline to report on. Give --baseline, or omit {flag}.")
        if save_baseline is not None and len(runs) > 1:
            raise UsageError(f"--save_baseline takes one run, not {len(runs)}. Name the run to save alone.")
        from sparsecache.longbench import gate as gating
        from sparsecache.longbench import gate_report
        from sparsecache.longbench.gate_checks import Limits

        if max_drop is None and non_inferior is None:
            max_drop = 1.0
        limits = Limits(max_drop, max_drop_dataset, max_kept, min_speedup, non_inferior)
        verdicts = []
        for run in runs:
            if baseline is None:
                break
            candidate, reference, notes = _Scoring(**scoring).pair(run, baseline)
            verdict = gating.gate(candidate, reference, limits, allow_partial, allow_unlike)
            verdicts.append(replace(verdict, warnings=[*verdict.warnings, *notes]))
            for warning in verdicts[-1].warnings:
                click.echo(escape_control_chars(f"Warning: {warning}"), err=True)
            print("\n".join(map(escape_control_chars, gating.format_verdict(verdict))))
        passed = all(verdict.passed for verdict in verdicts)
        if len(verdicts) > 1:
            print(gate_report.gate_title(verdicts) + ".")
        if html is not None:
            from sparsecache.longbench.html import gate_page

            _write_page(html, gate_page(verdicts))
        if markdown is not None:
            _write_page(markdown, gate_report.to_markdown(verdicts))
        if junit is not None:
            _write_page(junit, gate_report.to_junit(verdicts))
        if save_baseline is not None and passed:
            candidate = verdicts[0].run if verdicts else _Scoring(**scoring).baseline(runs[0])
            gating.check_complete(candidate, allow_partial, allow_unlike)
            candidate.save(save_baseline)
        if save_baseline is not None:
            print(escape_control_chars(f"Written: {save_baseline}" if passed else f"Not written: {save_baseline}"))
        sys.exit(0 if passed else 1)


@main.command(cls=FlexibleCommand, groups=_GROUPS)
@click.argument("run")
@click.option("--dataset", help="Only this dataset.")
@click.option("--rows", type=click.IntRange(1), default=10, show_default=True, help="Most rows to show.")
@click.option("--changed_from", metavar="OTHER", help="Only rows whose text differs from OTHER.")
@click.option("--columns", type=click.IntRange(20), default=400, show_default=True, help="Shorten texts to this width.")
@_scoring
def show(run: str, dataset: str | None, rows: int, changed_from: str | None, columns: int, **scoring: Any) -> None:
    """Show the rows of a run, worst first.

    Prints prediction, answers and score; with --changed_from, both predictions, greatest loss first. Long texts are
    shortened in the middle.

    Exit code: 0, or 2 if the rows cannot be shown.
    """
    with report_usage_errors():
        from sparsecache.longbench import show as showing

        runs = [_Scoring(**scoring).run(run, allow_duplicates=changed_from is None)]
        if changed_from is None:
            found = showing.worst_rows(runs[0], dataset)
        else:
            runs.append(_Scoring(**scoring).run(changed_from))
            found = showing.changed_rows(runs[0], runs[1], dataset)
        for line in showing.format_rows(found, runs, rows, columns):
            print(line)


def _write_page(path: Path, page: str) -> None:
    from sparsecache.files import write_atomically

    write_atomically(path, page)
    click.echo(escape_control_chars(f"Written: {path}"), err=True)


def _print(document: Document, format: str) -> None:
    print(render(document, format))
    for note in document.all_notes if format == "csv" else ():
        click.echo(escape_control_chars(note), err=True)


if __name__ == "__main__":
    main()
