"""Writes the verdicts of a gate as Markdown and as JUnit XML, for the pages of a CI system."""

from collections.abc import Sequence
from xml.etree import ElementTree

from sparsecache.longbench.gate import Verdict
from sparsecache.longbench.tables import Document, Table, records, render, words
from sparsecache.longbench.terminal import escape_control_chars


def gate_title(verdicts: Sequence[Verdict]) -> str:
    """Return the outcome of one or more verdicts in a few words."""
    failed = sum(not verdict.passed for verdict in verdicts)
    if len(verdicts) == 1:
        checks = verdicts[0].checks
        failed = sum(not check.passed for check in checks)
        return f"Failed: {failed} of {len(checks)} checks" if failed else "Passed"
    return f"Failed: {failed} of {len(verdicts)} runs" if failed else f"Passed: {len(verdicts)} runs"


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """Return a Markdown page with a table of checks per run, failed ones first, and the warnings."""
    tables = [
        Table(
            verdict.title,
            ["result", "check"],
            [[words("passed" if check.passed else "FAILED"), words(check.text)] for check in verdict.failed_first],
            "ll",
        )
        for verdict in verdicts
    ]
    notes = [f"Warning: {warning}" for verdict in verdicts for warning in verdict.warnings]
    document = Document(tables, records("", []), f"Gate: {gate_title(verdicts)}", notes=list(dict.fromkeys(notes)))
    return render(document, "markdown") + "\n"


def to_junit(verdicts: Sequence[Verdict]) -> str:
    """Return JUnit XML: a test suite per run, a test case per check, the warnings as its output."""
    counts = [(len(verdict.checks), sum(not check.passed for check in verdict.checks)) for verdict in verdicts]
    root = ElementTree.Element("testsuites", _counted("gate", *map(sum, zip(*counts, strict=True))))
    for verdict, (tests, failures) in zip(verdicts, counts, strict=True):
        suite = ElementTree.SubElement(root, "testsuite", _counted(verdict.title, tests, failures))
        for check in verdict.checks:
            names = {"classname": escape_control_chars(verdict.run.name), "name": escape_control_chars(check.name)}
            case = ElementTree.SubElement(suite, "testcase", names)
            if not check.passed:
                ElementTree.SubElement(case, "failure", {"message": escape_control_chars(check.text)})
        if verdict.warnings:
            output = ElementTree.SubElement(suite, "system-out")
            output.text = "\n".join(f"Warning: {escape_control_chars(warning)}" for warning in verdict.warnings)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _counted(name: str, tests: int, failures: int) -> dict[str, str]:
    return {"name": escape_control_chars(name), "tests": str(tests), "failures": str(failures)}
