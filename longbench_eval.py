"""Evaluate: prediction folders in; official scores, comparisons, verdicts and rows out. Imports no torch."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecache.cli import DefaultGroup, FlexibleCommand, report_usage_errors
from sparsecache.errors import UsageError
from sparsecache.longbench.metrics import EDIT_BACKENDS
from sparsecache.longbench.pictures import SUFFIXES, check_suffix, kinds, painter, pictures, require_matplotlib
from sparsecache.longbench.tables import FORMATS, Document, joined, render
from sparsecache.longbench.terminal import visible

if TYPE_CHECKING:
    from sparsecache.longbench.baseline import Baseline
    from sparsecache.longbench.scores import RunScore

_SCORING = (
    click.option("--pred_dir", type=click.Path(path_type=Path), default=Path("pred"), show_default=True),
    click.option("--e", is_flag=True, help="LongBench-E: <dataset>_e.jsonl, by length bucket."),
    click.option("--edit_backend", type=click.Choice(EDIT_BACKENDS), default=EDIT_BACKENDS[0], show_default=True),
    click.option("--official_recursion", is_flag=True, help="Give 0.0 where the reference hits the recursion limit."),
)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _page(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    """Refuses a name under which predictions or a baseline might lie."""
    if file is not None and file.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{file} must end in .html or .htm, so that no other file is overwritten.")
    return file


_REPORT: dict[str, Any] = {"type": _FILE, "metavar": "FILE", "callback": _page}
_HTML = click.option("--html", **_REPORT, help="Also write a report with tables and pictures to FILE (.html).")
_FORMAT = click.option("--format", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True)


@dataclass(frozen=True)
class _Scoring:
    """Where runs lie and how they are scored: the options that every command has."""

    pred_dir: Path
    e: bool
    edit_backend: str
    official_recursion: bool

    def run(self, name: str, **more: bool) -> "RunScore":
        """The scores of a run named on the command line."""
        from sparsecache.longbench.runs import find_run
        from sparsecache.longbench.scores import Options, score_run

        options = Options(self.edit_backend, self.official_recursion, **more)
        return score_run(find_run(name, self.pred_dir), self.e, options)

    def baseline(self, name: str) -> "Baseline":
        """A run, or a saved baseline, for a gate."""
        from sparsecache.longbench.baseline import baseline_of, load_baseline
        from sparsecache.longbench.scores import Options

        if os.path.isfile(name):
            return load_baseline(Path(name))
        return baseline_of(self.run(name), Options(self.edit_backend, self.official_recursion))


def _scoring(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SCORING):
        command = option(command)
    return command


@click.group(cls=DefaultGroup, default="score")
def main() -> None:
    """Score the predictions in FOLDERS, or those of --model and --name; or do one of the commands below.

    A run is named by the path of its folder, or as MODEL/NAME below --pred_dir. Every command has --help.
    """


@main.command(cls=FlexibleCommand)
@click.argument("folders", nargs=-1)
@click.option("--model", help="Model folder of the run, with --name.")
@click.option("--name", help="Name of the run, with --model.")
@_scoring
@click.option("--allow_partial", is_flag=True, help="Exit with 0 even if rows are missing or failed.")
@click.option("--allow_duplicates", is_flag=True, help="Score repeated _ids as often as they stand there.")
@click.option("--rouge_score", is_flag=True, help="Show rouge-score's ROUGE-1/2/L beside the official ROUGE-L.")
@_HTML
@_FORMAT
def score(
    folders: tuple[str, ...],
    model: str | None,
    name: str | None,
    allow_partial: bool,
    allow_duplicates: bool,
    rouge_score: bool,
    html: Path | None,
    format: str,
    pred_dir: Path,
    e: bool,
    edit_backend: str,
    official_recursion: bool,
) -> None:
    """Official scores of FOLDERS (the default).

    Scores the predictions in FOLDERS, or those of --model and --name: writes result.json (the official shape) and
    summary.json beside them and prints a table. Exit code: 0, 1 when a file is incomplete, 2 when something cannot
    be scored.
    """
    with report_usage_errors():
        if (model is None) != (name is None) or (model is None) == (not folders):
            raise UsageError("Give either --model and --name, or the paths of prediction folders.")
        from sparsecache.longbench.report import write_results
        from sparsecache.longbench.runs import find_run
        from sparsecache.longbench.score_tables import score_document
        from sparsecache.longbench.scores import Options, score_run

        if html is not None:
            require_matplotlib()
        paths = [pred_dir / model / name] if model is not None and name is not None else []
        options = Options(edit_backend, official_recursion, rouge_score, allow_duplicates)
        results = []
        for folder in paths or [find_run(folder, pred_dir) for folder in folders]:
            results.append(score_run(folder, e, options))
            if format == "terminal":
                _print(score_document(results[-1]), format)
            written = ", ".join(str(path) for path in write_results(results[-1], options))
            click.echo(visible(f"Written: {written}") + "\n", err=format != "terminal")
        if format != "terminal":
            _print(joined([score_document(result) for result in results]), format)
        if html is not None:
            from sparsecache.longbench.html import score_page

            _write_page(html, score_page(results, [pictures([result]) for result in results]))
        sys.exit(0 if allow_partial or all(result.complete for result in results) else 1)


@main.command(cls=FlexibleCommand)
@click.argument("runs", nargs=-1)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap.")
@_scoring
@_HTML
@_FORMAT
def compare(runs: tuple[str, ...], seed: int, html: Path | None, format: str, **scoring: Any) -> None:
    """Runs side by side, and what differs.

    One table of scores, of differences to the first of RUNS with 95 % intervals, and of what each run cost. Rows
    are matched by dataset and _id; those that only some runs have are left out. Exit code: 0, or 2 when something
    cannot be compared.
    """
    with report_usage_errors():
        if len(runs) < 2:
            raise UsageError(
                f"compare takes two runs or more, the one to compare with first, not {', '.join(runs) or 'none'}. "
                f"To score a folder that is named compare, give ./compare."
            )
        from sparsecache.longbench.compare import compare as compared
        from sparsecache.longbench.compare_tables import compare_document

        if html is not None:
            require_matplotlib()
        scored = [_Scoring(**scoring).run(name) for name in runs]
        comparison = compared(scored, seed)
        _print(compare_document(comparison), format)
        if html is not None:
            from sparsecache.longbench.html import compare_page
            from sparsecache.longbench.paired import common_rows

            _write_page(html, compare_page(comparison, scored, pictures(common_rows(scored).runs)))


@main.command(cls=FlexibleCommand)
@click.argument("runs", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(kinds()), required=True, help="What to draw (see below).")
@click.option("--out", type=_FILE, required=True, help=f"File to write, which ends in {', '.join(SUFFIXES)}.")
@_scoring
def plot(runs: tuple[str, ...], kind: str, out: Path, **scoring: Any) -> None:
    """A picture of one or more RUNS.

    bars: scores by dataset. buckets: scores by length, with --e. frontier: scores against the kept share, a line per
    method. time: prefill and decode. Of the rows that all RUNS have; prints a caption. Exit code: 0, or 2 when
    something cannot be drawn.
    """
    with report_usage_errors():
        check_suffix(out)
        draw = painter(kind)
        from sparsecache.longbench.paired import remarks, same_rows

        scored = [_Scoring(**scoring).run(name) for name in runs]
        same = same_rows(scored)
        picture = draw(same.runs)
        picture.save(out)
        for line in (picture.caption, *remarks(scored, same), f"Written: {out}"):
            print(visible(line))


@main.command(cls=FlexibleCommand)
@click.argument("run")
@click.option("--baseline", help="Run, or file of --save_baseline, to be as good as.")
@click.option("--max_drop", type=float, default=1.0, show_default=True, help="Points, of the mean over datasets.")
@click.option("--max_drop_dataset", type=float, help="Points, of each dataset.")
@click.option("--max_kept", type=float, help="Share of past tokens attended to, 0 to 1: the mean over datasets.")
@click.option("--min_speedup", type=float, help="Decode speed over the baseline's, on the same device.")
@click.option("--save_baseline", type=click.Path(path_type=Path), help="Save RUN as a baseline unless the gate fails.")
@click.option("--html", **_REPORT, help="Also write the verdict as a report to FILE (.html).")
@click.option("--allow_partial", is_flag=True, help="Gate the rows that both have, though some miss or failed.")
@click.option("--allow_unlike", is_flag=True, help="Warn of other data, prompts or checkpoints, and go on.")
@_scoring
def gate(
    run: str,
    baseline: str | None,
    max_drop: float,
    max_drop_dataset: float | None,
    max_kept: float | None,
    min_speedup: float | None,
    save_baseline: Path | None,
    html: Path | None,
    allow_partial: bool,
    allow_unlike: bool,
    **scoring: Any,
) -> None:
    """Pass or fail a run beside a baseline.

    Is RUN as good as --baseline, within limits? Exit code: 0 yes, 1 no, 2 when there is no telling. The method, its
    options, the engine and the dtype may differ; checkpoint, data, prompts and everything else that identifies a
    run in run.json must be the same.
    """
    with report_usage_errors():
        if baseline is None and save_baseline is None:
            raise UsageError("Give --baseline (a run, or a saved file), or --save_baseline to save one, or both.")
        if baseline is None and html is not None:
            raise UsageError("--html writes a verdict, for which --baseline is missing. Give it, or leave --html out.")
        from sparsecache.longbench import gate as gating

        limits = gating.Limits(max_drop, max_drop_dataset, max_kept, min_speedup)
        mine = _Scoring(**scoring).baseline(run)
        passed = True
        if baseline is not None:
            theirs = _Scoring(**scoring).baseline(baseline)
            verdict = gating.gate(mine, theirs, limits, allow_partial, allow_unlike)
            for warning in verdict.warnings:
                click.echo(visible(f"Warning: {warning}"), err=True)
            print("\n".join(map(visible, gating.lines(mine, theirs, verdict))))
            passed = verdict.passed
            if html is not None:
                from sparsecache.longbench.html import gate_page

                _write_page(html, gate_page(mine, theirs, verdict))
        if save_baseline is not None and passed:
            gating.check_savable(mine, allow_partial, allow_unlike)
            mine.save(save_baseline)
        if save_baseline is not None:
            print(visible(f"Written: {save_baseline}" if passed else f"Not written: {save_baseline}"))
        sys.exit(0 if passed else 1)


@main.command(cls=FlexibleCommand)
@click.argument("run")
@click.option("--dataset", help="Only this dataset.")
@click.option("--rows", type=click.IntRange(1), default=10, show_default=True, help="How many rows at most.")
@click.option("--changed_from", metavar="OTHER", help="Only rows whose text differs from this run's.")
@click.option("--columns", type=click.IntRange(20), default=400, show_default=True, help="Cut longer texts to it.")
@_scoring
def show(run: str, dataset: str | None, rows: int, changed_from: str | None, columns: int, **scoring: Any) -> None:
    """The rows of a run, worst first.

    Shows prediction, answers and score; with --changed_from both predictions, the greatest loss first. Long texts
    are cut in the middle. Exit code: 0, or 2 when something cannot be shown.
    """
    with report_usage_errors():
        from sparsecache.longbench import show as showing

        runs = [_Scoring(**scoring).run(run, allow_duplicates=changed_from is None)]
        if changed_from is None:
            found = showing.worst_rows(runs[0], dataset)
        else:
            runs.append(_Scoring(**scoring).run(changed_from))
            found = showing.changed_rows(runs[0], runs[1], dataset)
        for line in showing.lines(found, runs, rows, columns):
            print(line)


def _write_page(path: Path, page: str) -> None:
    from sparsecache.files import write_atomically

    write_atomically(path, page)
    click.echo(visible(f"Written: {path}"), err=True)


def _print(document: Document, format: str) -> None:
    print(render(document, format))
    for remark in document.remarks if format == "csv" else ():
        click.echo(visible(remark), err=True)


if __name__ == "__main__":
    main()
