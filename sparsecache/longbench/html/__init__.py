"""Reports: one HTML file for a comparison, for scores, or for a gate's verdict, that needs nothing else to be read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsecache.longbench.baseline import Baseline
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.comparison import Comparison
from sparsecache.longbench.gate import Verdict
from sparsecache.longbench.html.parts import document, facts, fold, notes, page, pictures, rows, run_records, section
from sparsecache.longbench.runs import short_names
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.scores import RunScore
from sparsecache.longbench.show import changed_rows, worst_rows

if TYPE_CHECKING:
    from sparsecache.longbench.pictures._canvas import Picture


def compare_page(comparison: Comparison, runs: Sequence[RunScore], drawn: Sequence["Picture"]) -> str:
    """The page of a comparison, of the runs that it was made from, in its order, and of pictures of them."""
    first, *others = [run.name for run in comparison.runs]
    content = compare_document(comparison)
    found = [changed_rows(run, runs[0]) for run in runs[1:]]
    changed = [
        fold(f"{name} against {first}: {len(those)} rows", rows(those, name, first))
        for name, those in zip(others, found, strict=True)
    ]
    return page(
        content.title,
        f"{len(runs)} runs of {_benchmark(comparison.e)}, row by row over those that all have.",
        document(content),
        *([section("Pictures", pictures(drawn, "picture"))] if drawn else []),
        section("Rows whose text changed, greatest loss first", *changed),
        run_records((run.name, run.record.json) for run in comparison.runs),
    )


def score_page(runs: Sequence[RunScore], drawn: Sequence[Sequence["Picture"]]) -> str:
    """The page of one run, or of several that have nothing to do with each other; pictures of each."""
    names = short_names([run.folder for run in runs])
    parts = [
        section(
            name,
            document(score_document(run)),
            pictures(its, f"picture-{number}"),
            fold("Rows with the lowest scores", rows(worst_rows(run), name)),
        )
        for number, (name, run, its) in enumerate(zip(names, runs, drawn, strict=True), 1)
    ]
    return page(
        f"Scores of {', '.join(names)}",
        f"Official scores of {_benchmark(runs[0].e)}, in percent.",
        *parts,
        run_records((name, run.run.json) for name, run in zip(names, runs, strict=True)),
    )


def gate_page(run: Baseline, baseline: Baseline, verdict: Verdict) -> str:
    """The page of a gate's verdict: failed checks first, warnings, and the identities of both sides."""
    checks = sorted(verdict.checks, key=lambda check: check.passed)
    failed = sum(not check.passed for check in checks)
    return page(
        f"Failed: {failed} of {len(checks)} checks" if failed else "Passed",
        f"{run.name} ({run.method}) against {baseline.name} ({baseline.method})",
        notes([f"Warning: {warning}" for warning in verdict.warnings]),
        facts(("passed" if check.passed else "FAILED", check.text) for check in checks),
        run_records((f"{side.name} ({side.method})", side.identity) for side in (run, baseline)),
    )


def _benchmark(e: bool) -> str:
    return "LongBench-E" if e else "LongBench"
