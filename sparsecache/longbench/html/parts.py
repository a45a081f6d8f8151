"""The parts of a report page: sections, tables, plots, rows and run records."""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sparsecache import __version__
from sparsecache.longbench.html.markup import Html, escape_lines, join, tag
from sparsecache.longbench.html.svg import inline
from sparsecache.longbench.show import ShownRow, row_heading, row_texts
from sparsecache.longbench.tables import Cell, Document, Table
from sparsecache.longbench.terminal import truncate_middle

if TYPE_CHECKING:
    from sparsecache.longbench.plots._figure import Plot

MAX_ROWS = 20  # shown per run
_MAX_COLUMNS = 2000  # longer texts are shown without their middle
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, summary: str, *parts: Html) -> str:
    """Return a whole HTML file. It is self-contained, and its policy forbids loading anything."""
    style = Html(files(__package__).joinpath("report.css").read_text(encoding="utf-8"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", style),
    ]
    top = [tag("h1", title), tag("p", summary, class_="about")]
    body = [tag("main", join(*top, *parts)), tag("footer", f"Made by sparsecache {__version__}.")]
    return f"<!doctype html>\n{tag('html', tag('head', join(*head)), tag('body', join(*body)), lang='en')}\n"


def section(title: str, *parts: str) -> Html:
    """Return the parts below a heading."""
    return tag("section", tag("h2", title), join(*parts))


def details(title: str, *parts: str) -> Html:
    """Return parts that are collapsed until the reader opens them."""
    return tag("details", tag("summary", title), join(*parts))


def document(content: Document) -> Html:
    """Return the notes and tables that a command prints."""
    tables = [table(each, content.title) for each in content.tables]
    return join(note_list(content.preamble), *tables, note_list(content.notes))


def note_list(sentences: Sequence[str]) -> Html:
    """Return a list of sentences; empty if there are none."""
    return tag("ul", *(tag("li", each) for each in sentences), class_="notes") if sentences else Html()


def definitions(named: Iterable[tuple[str, str]]) -> Html:
    """Return a list of (name, text) pairs."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in named))


def table(content: Table, title: str = "") -> Html:
    """Return a table in a frame that scrolls sideways.

    `title` labels a table without its own title.
    """
    sides = ["left" if letter == "l" else False for letter in content.column_alignment]
    head = [tag("th", text, scope="col", class_=side) for text, side in zip(content.header, sides, strict=True)]
    bodies = [tag("tbody", join(*(_table_row(row, sides) for row in group))) for group in _groups(content.rows)]
    caption = [tag("caption", content.title)] if content.title else []
    whole = tag("table", join(*caption, tag("thead", tag("tr", *head)), *bodies))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=content.title or title or "table")


def figures(plots: Sequence["Plot"], prefix: str) -> Html:
    """Return plots with their captions. Wide ones are last, and scroll sideways on a narrow screen.

    `prefix` begins their ids and must be unique in the page.
    """
    parts = []
    for number, each in enumerate(sorted(plots, key=lambda plot: plot.is_wide), 1):
        plot = inline(each.svg(), f"{prefix}-{number}", each.title, each.caption)
        if each.is_wide:
            plot = tag("div", plot, class_="scroll", tabindex="0", role="region", aria_label=each.title)
        texts = (tag("h3", each.title), plot, tag("figcaption", each.caption))
        parts.append(tag("figure", *texts, class_="wide" if each.is_wide else False))
    return tag("div", join(*parts), class_="plots") if parts else Html()


def row_list(rows: Sequence[ShownRow], *names: str) -> Html:
    """Return the first MAX_ROWS rows with their texts.

    `names`: the run, and the other run for changed rows.
    """
    note = [tag("p", f"Only {MAX_ROWS} of {len(rows)} rows.", class_="about")] if len(rows) > MAX_ROWS else []
    return join(*note, *(_row(row, names) for row in rows[:MAX_ROWS]))


def run_records(records: Iterable[tuple[str, dict[str, Any]]]) -> Html:
    """Return the run.json of every run that has one, from (name, record) pairs."""
    parts = [
        details(name, tag("pre", escape_lines(json.dumps(record, ensure_ascii=False, indent=1)), tabindex="0"))
        for name, record in records
        if record
    ]
    return section("How the runs were made", *parts) if parts else Html()


def _groups(rows: Sequence[Sequence[Cell]]) -> Iterator[list[Sequence[Cell]]]:
    """Yield the rows between two rules."""
    group: list[Sequence[Cell]] = []
    for row in [*rows, []]:
        if row:
            group.append(row)
        elif group:
            yield group
            group = []


def _table_row(row: Sequence[Cell], sides: Sequence[str | bool]) -> Html:
    texts = [tag("strong", cell.text) if cell.best else cell.text for cell in row]
    first, *others = zip(texts, sides, strict=True)
    return tag("tr", tag("th", first[0], scope="row"), *(tag("td", text, class_=side) for text, side in others))


def _row(row: ShownRow, names: Sequence[str]) -> Html:
    texts = [
        (name, tag("pre", escape_lines(truncate_middle(text, _MAX_COLUMNS)))) for name, text in row_texts(row, names)
    ]
    return tag("article", tag("h3", row_heading(row)), definitions(texts))
