"""The parts of a page: sections, tables, pictures, rows, the records of runs, and the frame around them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sparsecache import __version__
from sparsecache.longbench.html.markup import Html, joined, lines, tag
from sparsecache.longbench.html.svg import inline
from sparsecache.longbench.show import ShownRow, heading, row_texts
from sparsecache.longbench.tables import Cell, Document, Table
from sparsecache.longbench.terminal import cut

if TYPE_CHECKING:
    from sparsecache.longbench.pictures._canvas import Picture

MOST_ROWS = 20  # shown of a run
_LONGEST = 2000  # columns of a text, whose middle is left out beyond that
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, about: str, *parts: Html) -> str:
    """A whole file that needs nothing else and may load nothing."""
    style = Html(files(__package__).joinpath("report.css").read_text(encoding="utf-8"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", style),
    ]
    top = [tag("h1", title), tag("p", about, class_="about")]
    body = [tag("main", joined(*top, *parts)), tag("footer", f"Made by sparsecache {__version__}.")]
    return f"<!doctype html>\n{tag('html', tag('head', joined(*head)), tag('body', joined(*body)), lang='en')}\n"


def section(title: str, *parts: str) -> Html:
    """Parts below a heading."""
    return tag("section", tag("h2", title), joined(*parts))


def fold(title: str, *parts: str) -> Html:
    """Parts that are seen, and printed, once their title is chosen."""
    return tag("details", tag("summary", title), joined(*parts))


def document(content: Document) -> Html:
    """What a command prints: remarks and tables."""
    around = [notes(content.lead), notes(content.notes)]
    return joined(around[0], *(table(each, content.title) for each in content.tables), around[1])


def notes(sentences: Sequence[str]) -> Html:
    """A list of remarks; nothing for none."""
    return tag("ul", *(tag("li", each) for each in sentences), class_="notes") if sentences else Html()


def facts(named: Iterable[tuple[str, str]]) -> Html:
    """A list of texts, each with its name before it."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in named))


def table(content: Table, title: str = "") -> Html:
    """A table in a frame that scrolls sideways where it is too wide, named `title` if it has no title of its own."""
    sides = ["left" if letter == "l" else False for letter in content.columns]
    head = [tag("th", text, scope="col", class_=side) for text, side in zip(content.head, sides, strict=True)]
    bodies = [tag("tbody", joined(*(_line(row, sides) for row in group))) for group in _groups(content.rows)]
    caption = [tag("caption", content.title)] if content.title else []
    whole = tag("table", joined(*caption, tag("thead", tag("tr", *head)), *bodies))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=content.title or title or "table")


def pictures(drawn: Sequence["Picture"], prefix: str) -> Html:
    """Pictures with their captions beside or below each other; `prefix` begins their ids, and is unique in the page."""
    figures = [
        tag(
            "figure",
            tag("h3", each.title),
            inline(each.svg(), f"{prefix}-{number}", each.title, each.caption),
            tag("figcaption", each.caption),
        )
        for number, each in enumerate(drawn, 1)
    ]
    return tag("div", joined(*figures), class_="pictures") if figures else Html()


def rows(found: Sequence[ShownRow], *names: str) -> Html:
    """The first of these rows with their texts; `names` of the run and of the other, if they are changes."""
    left = [tag("p", f"Only {MOST_ROWS} of {len(found)} rows.", class_="about")] if len(found) > MOST_ROWS else []
    return joined(*left, *(_row(row, names) for row in found[:MOST_ROWS]))


def run_records(records: Iterable[tuple[str, dict[str, Any]]]) -> Html:
    """run.json of each run that has one, by name, as it stands there."""
    parts = [fold(name, tag("pre", lines(json.dumps(record, ensure_ascii=False, indent=1)), tabindex="0"))
             for name, record in records if record]  # fmt: skip
    return section("How the runs were made", *parts) if parts else Html()


def _groups(rows: Sequence[Sequence[Cell]]) -> Iterator[list[Sequence[Cell]]]:
    """The rows between rules."""
    group: list[Sequence[Cell]] = []
    for row in [*rows, []]:
        if row:
            group.append(row)
        elif group:
            yield group
            group = []


def _line(row: Sequence[Cell], sides: Sequence[str | bool]) -> Html:
    texts = [tag("strong", cell.text) if cell.best else cell.text for cell in row]
    first, *others = zip(texts, sides, strict=True)
    return tag("tr", tag("th", first[0], scope="row"), *(tag("td", text, class_=side) for text, side in others))


def _row(row: ShownRow, names: Sequence[str]) -> Html:
    texts = [(name, tag("pre", lines(cut(text, _LONGEST)))) for name, text in row_texts(row, names)]
    return tag("article", tag("h3", heading(row)), facts(texts))
