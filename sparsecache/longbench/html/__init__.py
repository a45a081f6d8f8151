"""HTML reports of comparisons, scores and gate verdicts, each in one self-contained file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.comparison import Comparison
from sparsecache.longbench.gate import Verdict, with_methods
from sparsecache.longbench.gate_report import gate_title
from sparsecache.longbench.html.markup import Html, tag
from sparsecache.longbench.html.parts import (
    definitions,
    details,
    document,
    figures,
    note_list,
    page,
    row_list,
    run_records,
    section,
    table,
)
from sparsecache.longbench.runs import run_names
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.show import changed_rows, worst_rows
from sparsecache.longbench.subjects import subject

if TYPE_CHECKING:
    from sparsecache.longbench.plots._figure import Plot


def compare_page(comparison: Comparison, runs: Sequence[RunScore], plots: Sequence["Plot"], title: str = "") -> str:
    """Return the page of a comparison: plots, a line per run, and the rest folded.

    `runs` are in the comparison's order. title: instead of one that names model, data and runs.
    """
    first, *others = [run.name for run in comparison.runs]
    content = compare_document(comparison)
    changed = [(name, changed_rows(run, runs[0])) for name, run in zip(others, runs[1:], strict=True)]
    unchanged = [name for name, rows in changed if not rows]
    return page(
        title or content.title,
        f"{comparison.subject}: {len(runs)} runs, compared row by row over their common rows.",
        *([section("Plots", figures(plots, "plot"))] if plots else []),
        section("One line per run", document(content)),
        section("Details", details("Per dataset, and costs", *(table(each) for each in content.details))),
        section(
            "Rows whose text changed, greatest loss first",
            *(
                details(f"{name} against {first}: {len(rows)} row{'s' * (len(rows) != 1)}", row_list(rows, name, first))
                for name, rows in changed
                if rows
            ),
            *([tag("p", f"No text changed: {', '.join(unchanged)}.")] if unchanged else []),
        ),
        run_records((run.name, run.record.json) for run in comparison.runs),
    )


def score_page(runs: Sequence[RunScore], plots: Sequence[Sequence["Plot"]]) -> str:
    """Return the page of one or more independent runs, with the plots of each."""
    names = run_names(runs)
    subjects = [subject([run]) for run in runs]
    parts = [
        section(
            f"{name}: {about}" if len(set(subjects)) > 1 else name,
            figures(of_run, f"plot-{number}"),
            document(score_document(run)),
            details("Rows with the lowest scores", row_list(worst_rows(run), name)),
        )
        for number, (name, about, run, of_run) in enumerate(zip(names, subjects, runs, plots, strict=True), 1)
    ]
    return page(
        f"{subject(runs)}: scores of {', '.join(names)}",
        "Official scores, in percent.",
        *parts,
        run_records((name, run.run.json) for name, run in zip(names, runs, strict=True)),
    )


def gate_page(verdicts: Sequence[Verdict]) -> str:
    """Return the page of verdicts on one baseline: checks (failed ones first), warnings, all identities."""
    sides = [*(verdict.run for verdict in verdicts), verdicts[0].baseline]
    *names, baseline = with_methods(sides)
    if len(verdicts) == 1:
        title, summary = gate_title(verdicts), verdicts[0].title
        parts = _verdict(verdicts[0])
    else:
        title, summary = gate_title(verdicts), f"{len(verdicts)} runs against {baseline}"
        parts = [section(name, *_verdict(each)) for name, each in zip(names, verdicts, strict=True)]
    return page(
        title,
        summary,
        *parts,
        run_records(zip([*names, baseline], (side.identity for side in sides), strict=True)),
    )


def _verdict(verdict: Verdict) -> list[Html]:
    return [
        note_list([f"Warning: {warning}" for warning in verdict.warnings]),
        definitions(
            ("passed" if check.passed else tag("strong", "FAILED"), check.text) for check in verdict.failed_first
        ),
    ]
