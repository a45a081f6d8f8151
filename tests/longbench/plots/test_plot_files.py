"""Files of plots are reproducible, and names in them are plain text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from click.testing import CliRunner

import longbench_eval
from sparsecache.errors import UsageError
from sparsecache.longbench.plots._axes import shorten
from sparsecache.longbench.score_types import RunScore
from tests.longbench.plots.drawing import draw

NAMES = ["_hidden", "$x$ & <b>", "一个很长的名字", "a\nb\x1b[0m", "not\ufffexml\uffff", "n" * 90]


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_files_are_reproducible(sweep: list[RunScore], tmp_path: Path, suffix: str) -> None:
    starts = {".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}
    for kind in ("bars", "frontier", "time"):
        draw(kind, *sweep).save(tmp_path / f"a{suffix}")
        with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "text.parse_math": True}):
            draw(kind, *sweep).save(tmp_path / f"b{suffix}")
        content = (tmp_path / f"a{suffix}").read_bytes()
        assert content == (tmp_path / f"b{suffix}").read_bytes()
        assert content.startswith(starts[suffix])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [f"a{suffix}", f"b{suffix}"]


def test_an_unknown_suffix_or_an_unwritable_file_is_refused(scored: Callable[..., RunScore], tmp_path: Path) -> None:
    plot = draw("bars", scored("a", qasper="yn"))
    for name in ("a.jpg", "a", "svg"):
        with pytest.raises(UsageError, match=rf"{name} has no suffix of an image format.*\.svg, \.pdf or \.png\.$"):
            plot.save(tmp_path / name)
    with pytest.raises(UsageError, match=r"a\.svg cannot be written: No such file or directory"):
        plot.save(tmp_path / "missing" / "a.svg")


def test_a_run_whose_rows_all_failed_does_not_reduce_the_rows_of_others(
    make_run: Callable[..., Path], row: Callable[..., Any], tmp_path: Path
) -> None:
    for name, kept in (("full", {}), ("sparse", {"kept": 0.1})):
        make_run(name, {"qasper": [row(at, "yes", **kept) for at in range(4)]}, {"method": name})
    failed = make_run("failed", {"qasper": [row(0, "", error="out of memory")]}, {"method": "failed"})
    arguments = [*(str(failed.with_name(name)) for name in ("full", "sparse", "failed")), "--kind", "frontier", "--out"]
    done = CliRunner().invoke(longbench_eval.main, ["plot", *arguments, str(tmp_path / "a.svg")])
    assert done.exit_code == 0, done.output
    assert "(4 rows)" in done.output and "Left out, since all rows failed: failed." in done.output


@pytest.mark.parametrize("name", NAMES)
def test_names_are_plain_text(scored: Callable[..., RunScore], name: str) -> None:
    one, two = scored(name, name, 0.1, qasper="yn"), scored("plain", qasper="yy")
    for kind in ("bars", "frontier", "time"):
        plot = draw(kind, one, two)
        svg = ElementTree.fromstring(plot.svg())
        texts = ["".join(each.itertext()) for each in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert shorten(name, {"bars": 44, "frontier": 40, "time": 24}[kind]) in texts
        assert shorten(name) in plot.caption or kind != "bars"


def test_long_names_lose_their_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk" and len(shorten("a" * 99, 24)) == 24
    assert shorten("") == "-"
