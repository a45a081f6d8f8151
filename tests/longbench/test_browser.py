"""Reports in a real browser: wide, narrow and printed, light and dark, without any request.

Skipped where there is no Chromium; CONTRIBUTING.md says how to have it run.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from sparsecache.longbench.baseline import make_baseline
from sparsecache.longbench.compare import compare
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.html import compare_page, gate_page, score_page
from sparsecache.longbench.paired import common_rows_or_all
from sparsecache.longbench.plots import draw_all
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import ScoringOptions, score_run
from sparsecache.longbench.terminal import escape_control_chars

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
KINDS = ("compare", "score", "gate")
ATTACK = (
    "</pre></title><script>attacked=1</script><svg onload=attacked=1><img src=http://192.0.2.1/x onerror=attacked=1>"
)
ATTACK += "<a href='javascript:attacked=1'>x</a>&lt;b&gt;" + "x" * 300
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def reports(
    write_run: Callable[..., Path], row: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Write a report of each kind, of eight datasets and three runs. Every text is an attack."""
    folder = tmp_path_factory.mktemp("reports")
    stems = "narrativeqa qasper hotpotqa gov_report samsum lsht passage_retrieval_en lcc".split()
    attack = {"prompt_end": ATTACK, "finish_reason": ATTACK, "answers": [ATTACK], "all_classes": [ATTACK]}

    def run(name: str, pred: str, method: str, **more: Any) -> RunScore:
        rows = {stem: [row(f"{at}{ATTACK}", pred, **attack, **more) for at in range(3)] for stem in stems}
        identity = {"method": method, "options": {"budget": ATTACK}}
        return score_run(write_run(folder, name, rows, identity, {"gpu": ATTACK}))

    name = ATTACK.replace("/", "")[:90]
    runs = [run("vanilla", ATTACK, "vanilla"), run(name, "no", ATTACK, kept=0.1), run("z" * 90, "x", "h2o", kept=0.02)]
    first, other = (make_baseline(each, ScoringOptions()) for each in runs[:2])
    drawn = draw_all(common_rows_or_all(runs).runs)
    pages = {
        "compare": compare_page(compare(runs, resamples=9), runs, drawn),
        "score": score_page(runs[:2], [drawn, drawn]),
        "gate": gate_page([gate(other, first, Limits(max_drop_dataset=0), allow_unlike=True)]),
    }
    paths = {kind: folder / f"{kind}.html" for kind in pages}
    for kind, path in paths.items():
        path.write_text(pages[kind], encoding="utf-8")
    return paths


def opened(browser: Browser, path: Path, **context: Any) -> tuple[Page, list[str]]:
    """Open a page with all details expanded. Returns it with its requests and error messages."""
    page = browser.new_context(**context).new_page()
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("dialog", lambda dialog: seen.append(dialog.message))
    page.goto(path.as_uri())
    assert seen == [path.as_uri()], "the page itself is all that is loaded"
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    return page, seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_opens_from_a_file_and_runs_nothing(browser: Browser, reports: dict[str, Path], kind: str) -> None:
    page, seen = opened(browser, reports[kind])
    assert page.evaluate("typeof attacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('script, img, a, [onload], [onerror]').length") == 0
    assert escape_control_chars(ATTACK)[:80] in page.inner_text("body")
    assert page.title() == page.inner_text("h1")
    assert seen == [reports[kind].as_uri()]
    refused = """() => new Promise(done => {
        document.addEventListener('securitypolicyviolation', event => done(event.blockedURI))
        setTimeout(() => done('nothing'), 5000)
        new Image().src = 'http://192.0.2.1/x'
    })"""
    assert page.evaluate(refused) == "http://192.0.2.1/x"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wider_than_a_phone(browser: Browser, reports: dict[str, Path], kind: str) -> None:
    page, _ = opened(browser, reports[kind], viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = """[...document.querySelectorAll('main *')].filter(each =>
        !each.closest('.scroll > *') && each.getBoundingClientRect().right > 390.5).map(each => each.tagName)"""
    assert page.evaluate(wide) == []
    for frame in page.query_selector_all(".scroll"):
        assert frame.evaluate("each => getComputedStyle(each).overflowX") == "auto"
    sizes = page.evaluate(
        "[...document.querySelectorAll('td, dd, pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes, default=13) >= 13


def test_first_columns_stay_visible_when_tables_scroll(browser: Browser, reports: dict[str, Path]) -> None:
    page, _ = opened(browser, reports["compare"], viewport=PHONE)
    frame = page.locator(".scroll").nth(1)
    assert frame.evaluate("each => each.scrollWidth > each.clientWidth")
    head = frame.locator("tbody th").first
    before = head.bounding_box()
    frame.evaluate("each => { each.scrollLeft = 100 }")
    assert frame.evaluate("each => each.scrollLeft") > 0
    assert head.bounding_box() == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_plots_have_contrast(browser: Browser, reports: dict[str, Path], scheme: Any) -> None:
    page, _ = opened(browser, reports["compare"], color_scheme=scheme)
    ratios = page.evaluate(
        """() => {
            const light = colour => {
                const values = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                const [r, g, b] = values.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05
            }
            const ground = element => {
                const colour = getComputedStyle(element).backgroundColor
                return colour === 'rgba(0, 0, 0, 0)' && element.parentElement ? ground(element.parentElement) : colour
            }
            const texts = [...document.querySelectorAll('h1, p, th, td, li, dt, pre, summary, figcaption, svg text')]
            return texts.map(each => {
                const style = getComputedStyle(each)
                const pair = [light(each.closest('svg') ? style.fill : style.color), light(ground(each))]
                return Math.max(...pair) / Math.min(...pair)
            })
        }"""
    )
    assert len(ratios) > 100 and min(ratios) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_the_texts_of_plots_stay_inside(browser: Browser, reports: dict[str, Path]) -> None:
    page, _ = opened(browser, reports["score"])
    outside = page.evaluate(
        """[...document.querySelectorAll('svg text')].filter(text => {
            const [box, frame] = [text, text.ownerSVGElement].map(each => each.getBoundingClientRect())
            return box.left < frame.left - 2 || box.right > frame.right + 2
        }).map(text => text.textContent)"""
    )
    assert outside == []


def test_a_report_prints_on_white_paper(browser: Browser, reports: dict[str, Path]) -> None:
    page, _ = opened(browser, reports["compare"], color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert page.pdf(format="A4").startswith(b"%PDF-")
