"""Formats tables as terminal text, Markdown, LaTeX, CSV or JSON.

Independent of their content.

CSV and JSON hold unrounded values, the others rounded ones. Every format escapes text that comes from data.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sparsecache.longbench.terminal import display_width, escape_control_chars, pad

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Cell:
    """The text shown, the unrounded value, and whether the cell is the best of its row."""

    text: str
    value: Value = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A title, a header, and rows with one cell per column; an empty row is a rule.

    alignment: a letter per column, l or r; by default l for the first column and r for the others.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    alignment: str = ""

    @property
    def column_alignment(self) -> str:
        """The letter of every column."""
        return self.alignment or "l" + "r" * (len(self.header) - 1)

    @property
    def data_rows(self) -> list[Sequence[Cell]]:
        """The rows without the rules."""
        return [row for row in self.rows if row]


@dataclass(frozen=True)
class Document:
    """The output of a command: formatted tables, the same values as one flat table, and notes.

    details: tables that are shown on request. records: the flat table, for CSV and JSON. preamble: notes above the
    tables; notes: those below.
    """

    tables: Sequence[Table]
    records: Table
    title: str = ""
    preamble: Sequence[str] = ()
    notes: Sequence[str] = ()
    details: Sequence[Table] = ()

    def with_details(self) -> "Document":
        """Return the document with its details among the tables."""
        return replace(self, tables=[*self.tables, *self.details], details=())

    @property
    def all_notes(self) -> list[str]:
        """The notes above and below the tables."""
        return [*self.preamble, *self.notes]


def words(text: str) -> Cell:
    """Return a cell of text."""
    return Cell(text, text)


def number(value: float | None, digits: int, best: bool = False) -> Cell:
    """Return a cell of a number with `digits` decimals; - for None."""
    return Cell("-" if value is None else f"{value:.{digits}f}", value, best)


def records(title: str, rows: Iterable[dict[str, Value]]) -> Table:
    """Return a flat table of rows with the same keys."""
    rows = list(rows)
    header = list(rows[0]) if rows else []
    return Table(title, header, [[Cell(str(value), value) for value in row.values()] for row in rows])


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain texts for the terminal; an empty row is a rule."""
    return to_terminal(Table("", header, [[Cell(text) for text in row] for row in rows]))


def to_terminal(table: Table) -> str:
    """Return a table as text, with an asterisk after the best cell of a row."""
    marked = [any(row[at].best for row in table.data_rows) for at in range(len(table.header))]
    header = [escape_control_chars(text) + " " * mark for text, mark in zip(table.header, marked, strict=True)]
    body = [
        [
            escape_control_chars(cell.text) + ("*" if cell.best else " " * mark)
            for cell, mark in zip(row, marked, strict=bool(row))
        ]
        for row in table.rows
    ]
    widths = [max(display_width(line[at]) for line in [header, *filter(None, body)]) for at in range(len(header))]
    right = [letter == "r" for letter in table.column_alignment]
    rule = "  ".join("-" * columns for columns in widths)
    lines = ["  ".join(map(pad, line, widths, right)).rstrip() if line else rule for line in [header, [], *body]]
    return "\n".join([escape_control_chars(table.title), *lines] if table.title else lines)


def to_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown, the best of a row in bold. Rules are left out."""
    rules = ["---:" if letter == "r" else ":---" for letter in table.column_alignment]
    body = [[_bold(_markdown(cell.text), "**{}**", cell.best) for cell in row] for row in table.data_rows]
    lines = [f"| {' | '.join(line)} |" for line in [list(map(_markdown, table.header)), rules, *body]]
    return "\n".join([f"### {_markdown(table.title)}", "", *lines] if table.title else lines)


def to_latex(table: Table) -> str:
    """Return a tabular with booktabs rules, the best of a row in bold.

    The title becomes a comment.
    """
    header, *rows = (
        " & ".join(_bold(_latex(cell.text), r"\textbf{{{}}}", cell.best) for cell in row) + r" \\"
        if row
        else r"\midrule"
        for row in (list(map(Cell, table.header)), *table.rows)
    )
    begin, end = [rf"\begin{{tabular}}{{{table.column_alignment}}}", r"\toprule"], [r"\bottomrule", r"\end{tabular}"]
    lines = [*begin, header, r"\midrule", *rows, *end]
    return "\n".join([f"% {escape_control_chars(table.title)}", *lines] if table.title else lines)


def to_csv(table: Table) -> str:
    """Return a table as CSV with unrounded values; None is empty.

    Text that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([table.header, *([_spreadsheet(cell.value) for cell in row] for row in table.data_rows)])
    return text.getvalue().rstrip("\n")


def render(document: Document, format: str) -> str:
    """Return a document in one of FORMATS.

    CSV has no notes; JSON is one object: title, rows, notes.
    """
    if format == "csv":
        return to_csv(document.records)
    if format == "json":
        header, rows = document.records.header, document.records.data_rows
        objects = [dict(zip(header, (cell.value for cell in row), strict=True)) for row in rows]
        content = {"title": document.title, "rows": objects, "notes": document.all_notes}
        return json.dumps(content, allow_nan=False, indent=1)
    to_text, note, heading, gap = _TEXT_FORMATS[format]
    parts = [heading.format(note(document.title))] if document.title else []
    above, below = ([gap.join(map(note, lines))] if lines else [] for lines in (document.preamble, document.notes))
    return ("\n" if format == "terminal" and len(document.tables) == 1 else "\n\n").join(
        [*parts, *above, *map(to_text, document.tables), *below]
    )


def merge_documents(documents: Sequence[Document]) -> Document:
    """Return several documents of the same kind as one. Every note gets its document's title."""
    if len(documents) == 1:
        return documents[0]
    flat = documents[0].records
    return Document(
        tables=[replace(table, title=document.title) for document in documents for table in document.tables],
        records=replace(flat, rows=[row for document in documents for row in document.records.rows]),
        notes=[f"{document.title}: {note}" for document in documents for note in document.all_notes],
    )


def _bold(text: str, pattern: str, bold: bool) -> str:
    return pattern.format(text) if bold else text


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", escape_control_chars(text))


_LATEX = {
    **{character: "\\" + character for character in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after \\ it would begin an optional argument
    "]": "{]}",
    "*": "{*}",
}


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in escape_control_chars(text))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def _spreadsheet(value: Value) -> Value:
    if not isinstance(value, str):
        return value
    return ("'" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else "") + escape_control_chars(value)


def _comment(text: str) -> str:
    return f"% {escape_control_chars(text)}"


# Per format: formats a table, formats a note, the pattern of the title, what separates notes.
_TEXT_FORMATS: dict[str, tuple[Callable[[Table], str], Callable[[str], str], str, str]] = {
    "terminal": (to_terminal, escape_control_chars, "{}", "\n"),
    "markdown": (to_markdown, _markdown, "## {}", "\n\n"),
    "latex": (to_latex, _comment, "{}", "\n"),
}
FORMATS = ("terminal", "markdown", "csv", "latex", "json")
