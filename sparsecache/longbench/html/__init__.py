"""HTML reports of comparisons, scores and gate verdicts, each in one self-contained file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsecache.longbench.baseline import Baseline
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.comparison import Comparison
from sparsecache.longbench.gate import Verdict
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
)
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.show import changed_rows, worst_rows

if TYPE_CHECKING:
    from sparsecache.longbench.plots._figure import Plot


def compare_page(comparison: Comparison, runs: Sequence[RunScore], plots: Sequence["Plot"]) -> str:
    """Return the page of a comparison, with plots of its runs.

    `runs` are in the comparison's order.
    """
    first, *others = [run.name for run in comparison.runs]
    content = compare_document(comparison)
    changed = [(name, changed_rows(run, runs[0])) for name, run in zip(others, runs[1:], strict=True)]
    return page(
        content.title,
        f"{len(runs)} runs of {_benchmark(comparison.e)}, compared row by row over their common rows.",
        document(content),
        *([section("Plots", figures(plots, "plot"))] if plots else []),
        section(
            "Rows whose text changed, greatest loss first",
            *(
                details(f"{name} against {first}: {len(rows)} rows", row_list(rows, name, first))
                for name, rows in changed
            ),
        ),
        run_records((run.name, run.record.json) for run in comparison.runs),
    )


def score_page(runs: Sequence[RunScore], plots: Sequence[Sequence["Plot"]]) -> str:
    """Return the page of one or more independent runs, with the plots of each."""
    names = short_names([run.folder for run in runs])
    parts = [
        section(
            name,
            document(score_document(run)),
            figures(of_run, f"plot-{number}"),
            details("Rows with the lowest scores", row_list(worst_rows(run), name)),
        )
        for number, (name, run, of_run) in enumerate(zip(names, runs, plots, strict=True), 1)
    ]
    return page(
        f"Scores of {', '.join(names)}",
        f"Official scores of {_benchmark(runs[0].e)}, in percent.",
        *parts,
        run_records((name, run.run.json) for name, run in zip(names, runs, strict=True)),
    )


def gate_page(run: Baseline, baseline: Baseline, verdict: Verdict) -> str:
    """Return the page of a verdict: checks (failed ones first), warnings, both identities."""
    checks = sorted(verdict.checks, key=lambda check: check.passed)
    failed = sum(not check.passed for check in checks)
    return page(
        f"Failed: {failed} of {len(checks)} checks" if failed else "Passed",
        f"{run.name} ({run.method}) against {baseline.name} ({baseline.method})",
        note_list([f"Warning: {warning}" for warning in verdict.warnings]),
        definitions(("passed" if check.passed else "FAILED", check.text) for check in checks),
        run_records((f"{side.name} ({side.method})", side.identity) for side in (run, baseline)),
    )


def _benchmark(e: bool) -> str:
    return "LongBench-E" if e else "LongBench"
