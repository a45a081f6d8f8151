"""Reports are valid HTML with the numbers of the tables, load nothing, and escape all data."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecache.longbench.baseline import make_baseline
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.html import compare_page, gate_page, score_page
from sparsecache.longbench.html.markup import Html, escape, escape_lines, join, tag
from sparsecache.longbench.html.parts import MAX_ROWS, figures
from sparsecache.longbench.html.parts import page as page_of
from sparsecache.longbench.html.svg import inline
from sparsecache.longbench.paired import common_rows_or_all
from sparsecache.longbench.plots import _figure, draw_all, get_plot
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import ScoringOptions, score_run
from sparsecache.longbench.tables import Document
from sparsecache.longbench.terminal import escape_control_chars

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
Page = Callable[[str], str]
ANY_TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("<>&\"'/=`-!\n"))
ATTACK = "</pre></title><script>attacked=1</script><img src=x onerror=attacked=1>&lt;\"'\x1b[2J\u202e\ud800\ufffe]]>-->"


def parse(page: str) -> Element:
    """Parse a page. Raises for invalid HTML."""
    parsed: Element = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    return parsed


def text_of(element: Element) -> str:
    return "".join(element.itertext())


@pytest.fixture
def runs(make_run: MakeRun, row: Row) -> list[RunScore]:
    """Return two runs in which every text is an attack; some texts differ."""
    attack = {"prompt_end": ATTACK, "finish_reason": ATTACK, "answers": [ATTACK, "yes"], "new_tokens": 3}
    first = {"qasper": [row(at, "yes", **attack) for at in range(3)], "trec": [row(ATTACK, ATTACK, answers=[ATTACK])]}
    other = {
        "qasper": [row(at, ATTACK, kept=0.1, **attack) for at in range(3)],
        "trec": [row(ATTACK, "", error=ATTACK)],
    }
    other["trec"][0]["answers"] = [ATTACK]
    name = ATTACK.replace("/", "").replace("\ud800", "")
    identity = {"method": ATTACK, "options": {ATTACK: ATTACK}}
    return [score_run(make_run("first", first)), score_run(make_run(name, other, identity, {"gpu": ATTACK}))]


@pytest.fixture
def page(runs: list[RunScore]) -> Page:
    """Return a function that makes a page: compare, score or gate."""

    def make(kind: str) -> str:
        if kind == "compare":
            return compare_page(compare(runs, resamples=99), runs, draw_all(common_rows_or_all(runs).runs))
        if kind == "score":
            return score_page(runs, [draw_all([run]) for run in runs])
        first, other = (make_baseline(run, ScoringOptions()) for run in runs)
        return gate_page([gate(other, first, Limits(max_kept=0.05), allow_partial=True, allow_unlike=True)])

    return make


# Markup


@given(ANY_TEXT, ANY_TEXT)
def test_text_never_becomes_markup(content: str, other: str) -> None:
    element = tag("div", tag("p", content, title=other), tag("pre", escape_lines(content)), join(content, Html("<hr>")))
    page = f"<!doctype html><title>t</title>{element}"
    page.encode()
    body = parse(page).find("body")
    assert body is not None
    assert [each.tag for each in body.iter()] == ["body", "div", "p", "pre", "hr"]
    assert all(not each.attrib or each.tag == "p" for each in body.iter())
    paragraph, kept = body.findall("div/*")[:2]
    assert (paragraph.text or "", paragraph.attrib) == (
        escape_control_chars(content),
        {"title": escape_control_chars(other)},
    )
    assert (kept.text or "") == "\n".join(map(escape_control_chars, content.split("\n")))


def test_string_operations_on_markup_give_text() -> None:
    bold = tag("b", "x")
    assert bold == "<b>x</b>"
    assert tag("p", bold + "<i>") == "<p>&lt;b&gt;x&lt;/b&gt;&lt;i&gt;</p>"
    assert tag("p", f"{bold}") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"
    assert tag("p", bold, hidden=True, class_="c", data_x=False) == '<p hidden class="c"><b>x</b></p>'
    assert tag("meta", name="a", http_equiv="b") == '<meta name="a" http-equiv="b">'
    assert escape("a\u202eb\n") == "a\\u202eb⏎"


# Pages


@pytest.mark.parametrize("kind", ["compare", "score", "gate"])
def test_pages_are_valid_load_nothing_and_escape_attacks(page: Page, kind: str) -> None:
    whole = page(kind)
    whole.encode()
    tree = parse(whole)
    tags = {each.tag for each in tree.iter() if isinstance(each.tag, str)}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "form", "base", "a", "image"}
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not str(name).startswith("on")
            assert str(name).split("}")[-1] not in ("src", "href", "srcset", "action") or value.startswith("#")
            assert re.search(r"url\((?!#)", value) is None
    assert "url(" not in text_of(tree.find("head/style")) and "@import" not in text_of(tree.find("head/style"))  # type: ignore[arg-type]
    assert escape_control_chars(ATTACK) in text_of(tree)
    assert "attacked=1</script>" not in whole


@pytest.mark.parametrize("kind", ["compare", "score", "gate"])
def test_ids_are_unique_and_references_resolve(page: Page, kind: str) -> None:
    tree = parse(page(kind))
    ids = [each.attrib["id"] for each in tree.iter() if "id" in each.attrib]
    assert len(ids) == len(set(ids))
    whole = " ".join(value for each in tree.iter() for value in each.attrib.values())
    used = set(re.findall(r"(?<!var\()#([a-z][\w-]*-[\w-]+)", whole))
    for element in tree.iter():
        used |= set(element.attrib.get("aria-labelledby", "").split())
    assert used <= set(ids)
    assert tree.attrib["lang"] == "en" and text_of(tree.find("head/title")) == text_of(tree.find("body/main/h1"))  # type: ignore[arg-type]
    levels = [int(each.tag[1]) for each in tree.iter() if re.fullmatch(r"h[1-6]", str(each.tag))]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))


def cells(tree: Element) -> Iterator[list[list[str]]]:
    for each in tree.iter("table"):
        yield [[text_of(cell) for cell in row] for row in each.iter("tr")]


def printed(*documents: Document) -> list[list[list[str]]]:
    return [
        [
            [escape_control_chars(name) for name in table.header],
            *([escape_control_chars(cell.text) for cell in row] for row in table.data_rows),
        ]
        for document in documents
        for table in document.tables
    ]


def test_tables_equal_those_of_the_terminal(page: Page, runs: list[RunScore]) -> None:
    document = compare_document(compare(runs, resamples=99)).with_details()
    tree = parse(page("compare"))
    assert list(cells(tree)) == printed(document)
    assert [text_of(each) for each in tree.iter("strong")] == [
        cell.text for table in document.tables for row in table.rows for cell in row if cell.best
    ]
    notes = [text_of(each) for each in tree.iter("li")]
    assert notes == [escape_control_chars(note) for note in document.all_notes]
    assert list(cells(parse(page("score")))) == printed(*map(score_document, runs))


def test_plots_have_title_description_and_caption(page: Page, runs: list[RunScore]) -> None:
    drawn = draw_all(common_rows_or_all(runs).runs)
    figures = list(parse(page("compare")).iter("figure"))
    assert len(figures) == len(drawn) == 3
    for figure, plot in zip(figures, drawn, strict=True):
        svg = next(each for each in figure if str(each.tag).endswith("svg"))
        names = {each.attrib.get("id"): text_of(each) for each in svg}
        assert [names[key] for key in svg.attrib["aria-labelledby"].split()] == [plot.title, plot.caption]
        assert text_of(figure[0]) == plot.title and text_of(figure[-1]) == plot.caption


def test_svgs_use_the_colors_and_fonts_of_the_page(runs: list[RunScore], page: Page) -> None:
    svg = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt"
        height="9pt" viewBox="0 0 9 9" version="1.1"><defs><style>*{}</style></defs>
        <g id="unused" clip-path="url(#clip)">
        <use xlink:href="#m" style="fill: #0077bb; font-family: 'A', 'B'; font-size: 7px; clip-path: url(#clip)"/></g>
        <defs><clipPath id="clip"/><path id="m" d=""/></defs></svg>"""
    tree = inline(svg, "p", "t<", "d&")
    assert re.sub(r"\s+", " ", tree) == (
        '<svg viewBox="0 0 9 9" role="img" aria-labelledby="p-title p-text"><title id="p-title">t&lt;</title>'
        '<desc id="p-text">d&amp;</desc><defs /><g clip-path="url(#p-clip)"> <use href="#p-m" '
        'style="fill: var(--c-0077bb, #0077bb); font-size: 7px; clip-path: url(#p-clip)" /></g> <defs>'
        '<clipPath id="p-clip" /><path id="p-m" d="" /></defs></svg>'
    )
    dark = page("compare")
    for color in (_figure.INK, _figure.MUTED, _figure.RULE, _figure.REFERENCE, *_figure.SERIES):
        assert f"--c-{color[1:]}: #" in dark, "the dark page has no color for it"


def test_changed_rows_show_both_texts(make_run: MakeRun, row: Row) -> None:
    before = [row(at, prompt_end=f"Who\nis {at}?") for at in range(MAX_ROWS + 3)]
    after = [{**each, "pred": "no"} for each in before]
    scored = [score_run(make_run(name, {"qasper": rows})) for name, rows in (("a", before), ("b", after))]
    tree = parse(compare_page(compare(scored, resamples=9), scored, []))
    assert text_of(list(tree.iter("summary"))[1]) == f"b against a: {MAX_ROWS + 3} rows"
    assert text_of(list(tree.iter("details"))[1]).count("Only 20 of 23 rows.") == 1
    articles = list(tree.iter("article"))
    assert len(articles) == MAX_ROWS
    pairs = [(text_of(each[0]), text_of(each[1])) for each in articles[0].iter("div")]
    assert pairs == [("prompt ends", "Who\nis 0?"), ("a", "yes"), ("b", "no"), ("answers", "yes")]
    assert text_of(next(articles[0].iter("h3"))).startswith("qasper 0, score 0.00, was 100.00 (-100.00)")


def test_runs_without_changed_rows_are_named_together(make_run: MakeRun, row: Row) -> None:
    texts = {"a": "yes", "b": "no", "c": "yes"}
    scored = [score_run(make_run(name, {"qasper": [row(0, pred)]})) for name, pred in texts.items()]
    tree = parse(compare_page(compare(scored, resamples=9), scored, []))
    assert "b against a: 1 row" in [text_of(each) for each in tree.iter("summary")]
    assert "No text changed: c." in [text_of(each) for each in tree.iter("p")]


def test_a_plot_as_wide_as_a_page_is_last_and_scrolls(make_run: MakeRun, row: Row) -> None:
    methods = {"vanilla": {}, "h2o": {"kept": 0.1}, "tova": {"kept": 0.1}, "quest": {"kept": 0.2}}
    scored = [
        score_run(make_run(name, {"qasper": [row(0, **more)]}, {"method": name})) for name, more in methods.items()
    ]
    wide, narrow = get_plot("methods")(scored), get_plot("bars")(scored)
    first, last = parse(page_of("t", "s", figures([wide, narrow], "plot"))).iter("figure")
    assert (text_of(first[0]), text_of(last[0])) == (narrow.title, wide.title)
    assert last.attrib["class"] == "wide" and last[1].attrib["class"] == "scroll" and "class" not in first.attrib


def test_run_records_are_complete(page: Page, runs: list[RunScore]) -> None:
    texts = [text_of(each) for each in parse(page("compare")).iter("pre")][-2:]
    assert json.loads(texts[0]) == runs[0].run.json  # of the other, what is hidden in its texts is spelled out
    assert [line.split('"')[1] for line in texts[1].splitlines() if line.startswith(' "')] == list(runs[1].run.json)
    identities = [text_of(each) for each in parse(page("gate")).iter("pre")]
    assert json.loads(identities[1]) == runs[0].run.json["identity"]


def test_a_gate_page_begins_with_failed_checks(page: Page) -> None:
    tree = parse(page("gate"))
    assert text_of(next(tree.iter("h1"))) == "Failed: 1 of 2 checks"
    checks = [(text_of(each[0]), text_of(each[1])) for each in tree.find("body/main/dl")]  # type: ignore[union-attr]
    assert checks[0] == ("FAILED", "kept 10.00%, allowed 5%: 5 points over the limit")
    assert checks[1][0] == "passed" and checks[1][1].startswith("mean of 2 datasets: ")
    assert "trec 0 of 1 rows, 1 failed" in text_of(tree)


def test_pages_are_reproducible(runs: list[RunScore], page: Page) -> None:
    assert score_page(runs, [draw_all([run]) for run in runs]) == page("score")
