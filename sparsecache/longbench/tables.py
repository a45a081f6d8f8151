"""Tables for people (terminal, Markdown, LaTeX) and for machines (CSV, JSON). Knows nothing of what stands in them.

People get rounded text, machines get whole values. Everything that comes from data is escaped in every format.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sparsecache.longbench.terminal import pad, visible, width

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Cell:
    """What people read, the whole value behind it, and whether it is marked as the best of its line."""

    text: str
    value: Value = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A title, a head, and rows of as many cells; an empty row is a rule.

    alignment: a letter per column, l or r; by default the first column is on the left, the others on the right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    alignment: str = ""

    @property
    def columns(self) -> str:
        """The letters of all columns."""
        return self.alignment or "l" + "r" * (len(self.head) - 1)

    @property
    def lines(self) -> list[Sequence[Cell]]:
        """The rows without the rules."""
        return [row for row in self.rows if row]


@dataclass(frozen=True)
class Document:
    """What a command has to say: tables for people, the same facts as one flat table for machines, remarks.

    lead: lines that must be read before the tables; notes: those below them.
    """

    tables: Sequence[Table]
    records: Table
    title: str = ""
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def remarks(self) -> list[str]:
        """The lines that stand around the tables."""
        return [*self.lead, *self.notes]


def words(text: str) -> Cell:
    """A cell of text."""
    return Cell(text, text)


def number(value: float | None, digits: int, best: bool = False) -> Cell:
    """A cell of a number with so many digits after the point; - where there is none."""
    return Cell("-" if value is None else f"{value:.{digits}f}", value, best)


def records(title: str, rows: Iterable[dict[str, Value]]) -> Table:
    """A flat table of rows with the same keys."""
    rows = list(rows)
    head = list(rows[0]) if rows else []
    return Table(title, head, [[Cell(str(value), value) for value in row.values()] for row in rows])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts for the terminal; an empty row is a rule."""
    return terminal(Table("", head, [[Cell(text) for text in row] for row in rows]))


def terminal(table: Table) -> str:
    """Columns two spaces apart, the best of a line with an asterisk behind it."""
    marked = [any(row[at].best for row in table.lines) for at in range(len(table.head))]
    head = [visible(text) + " " * mark for text, mark in zip(table.head, marked, strict=True)]
    body = [[visible(cell.text) + ("*" if cell.best else " " * mark) for cell, mark in zip(row, marked, strict=True)]
            if row else [] for row in table.rows]  # fmt: skip
    widths = [max(width(line[at]) for line in [head, *filter(None, body)]) for at in range(len(head))]
    sides = [letter == "r" for letter in table.columns]
    rule = "  ".join("-" * columns for columns in widths)
    lines = ["  ".join(map(pad, line, widths, sides)).rstrip() if line else rule for line in [head, [], *body]]
    return "\n".join([visible(table.title), *lines] if table.title else lines)


def markdown(table: Table) -> str:
    """GitHub's table, the best of a line in bold; rules are left out, since it knows none."""
    rules = ["---:" if letter == "r" else ":---" for letter in table.columns]
    body = [[_bold(_markdown(cell.text), "**{}**", cell.best) for cell in row] for row in table.lines]
    lines = [f"| {' | '.join(line)} |" for line in [list(map(_markdown, table.head)), rules, *body]]
    return "\n".join([f"### {_markdown(table.title)}", "", *lines] if table.title else lines)


def latex(table: Table) -> str:
    """A tabular of the package booktabs, the best of a line in bold; the title is a comment above it."""
    head, *rows = (
        " & ".join(_bold(_latex(cell.text), r"\textbf{{{}}}", cell.best) for cell in row) + r" \\"
        if row
        else r"\midrule"
        for row in (list(map(Cell, table.head)), *table.rows)
    )
    begin, end = [rf"\begin{{tabular}}{{{table.columns}}}", r"\toprule"], [r"\bottomrule", r"\end{tabular}"]
    lines = [*begin, head, r"\midrule", *rows, *end]
    return "\n".join([f"% {visible(table.title)}", *lines] if table.title else lines)


def comma_separated(table: Table) -> str:
    """CSV with whole values, empty where there is none.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([table.head, *([_spreadsheet(cell.value) for cell in row] for row in table.lines)])
    return text.getvalue().rstrip("\n")


def render(document: Document, format: str) -> str:
    """The document in one of FORMATS. CSV has no place for remarks; JSON is one object: title, rows, notes."""
    if format == "csv":
        return comma_separated(document.records)
    if format == "json":
        rows = [dict(zip(document.records.head, (cell.value for cell in row), strict=True))
                for row in document.records.lines]  # fmt: skip
        return json.dumps({"title": document.title, "rows": rows, "notes": document.remarks}, allow_nan=False, indent=1)
    text, remark, heading, gap = _FOR_PEOPLE[format]
    parts = [heading.format(remark(document.title))] if document.title else []
    above, below = ([gap.join(map(remark, lines))] if lines else [] for lines in (document.lead, document.notes))
    return ("\n" if format == "terminal" and len(document.tables) == 1 else "\n\n").join(
        [*parts, *above, *map(text, document.tables), *below]
    )


def joined(documents: Sequence[Document]) -> Document:
    """Several documents of the same kind as one, in which each remark says whose it is."""
    if len(documents) == 1:
        return documents[0]
    flat = documents[0].records
    return Document(
        tables=[replace(table, title=document.title) for document in documents for table in document.tables],
        records=replace(flat, rows=[row for document in documents for row in document.records.rows]),
        notes=[f"{document.title}: {remark}" for document in documents for remark in document.remarks],
    )


def _bold(text: str, pattern: str, bold: bool) -> str:
    return pattern.format(text) if bold else text


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", visible(text))


_LATEX = {
    **{character: "\\" + character for character in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line's end it would begin an option
    "]": "{]}",
    "*": "{*}",
}


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in visible(text))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def _spreadsheet(value: Value) -> Value:
    if not isinstance(value, str):
        return value
    return ("'" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else "") + visible(value)


def _comment(text: str) -> str:
    return f"% {visible(text)}"


_FOR_PEOPLE: dict[str, tuple[Callable[[Table], str], Callable[[str], str], str, str]] = {
    "terminal": (terminal, visible, "{}", "\n"),
    "markdown": (markdown, _markdown, "## {}", "\n\n"),
    "latex": (latex, _comment, "{}", "\n"),
}
FORMATS = ("terminal", "markdown", "csv", "latex", "json")
