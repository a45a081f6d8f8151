"""Saved baselines equal the run and are small; broken files are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import Baseline, load_baseline
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
Make = ScoreToBaseline = Callable[..., Baseline]


def test_a_saved_baseline_equals_the_run(make_baseline_run: Make, tmp_path: Path) -> None:
    run = make_baseline_run("a", {"qasper": "yhn", "lcc": "yy"}, {"kept": 0.25})
    path = tmp_path / "baseline.json"
    run.save(path)
    run.save(path)  # again, over itself
    saved = load_baseline(path)
    assert saved == Baseline(**{**vars(run), "name": str(path)})
    assert gate(run, saved, Limits(0, 0, 0.25, 1)).passed
    worse = make_baseline_run("b", {"qasper": "yhn", "lcc": "yn"})
    assert not gate(worse, saved, Limits()).passed
    text = path.read_text()
    assert text.count("\n") < 100 and '   "1": 0.6666666666666666,\n' in text


def test_a_full_baseline_is_small(
    make_run: MakeRun, row: Row, tmp_path: Path, score_to_baseline: ScoreToBaseline
) -> None:
    rows = [row(at, _id=f"{at:048x}", prompt_sha256=f"{at:064x}") for at in range(200)]
    score_to_baseline(make_run("a", {"qasper": rows})).save(tmp_path / "b.json")
    assert (tmp_path / "b.json").stat().st_size < 200 * 150  # 4,750 rows: 700 KB


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda record: [], "it lacks the key sparsecache_baseline"),
    (lambda record: {"a": 1}, "it lacks the key sparsecache_baseline"),
    (lambda record: record | {"sparsecache_baseline": 2}, "its format version is 2, not 1"),
    (lambda record: {key: value for key, value in record.items() if key != "identity"}, "lacks identity"),
    (lambda record: record | {"datasets": []}, r"datasets is \[\]; it must be an object"),
    (lambda record: record | {"e": 0}, "e is 0; it must be true or false"),
    (lambda record: record | {"identity": {"data": 1}}, r"identity\.data is 1; it must be an object"),
    (lambda record: record | {"datasets": {"qasper": 1}}, r"datasets\.qasper is 1; it must be an object"),
    (
        lambda record: record | {"datasets": {"qasper": record["datasets"]["qasper"] | {"scores": {"0": "1"}}}},
        r"datasets\.qasper\.scores\.0 is '1'; it must be a number",
    ),
    (
        lambda record: record | {"datasets": {"qasper": record["datasets"]["qasper"] | {"kept": "x"}}},
        r"datasets\.qasper\.kept is 'x'; it must be a number",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_baseline_is_refused(
    make_baseline_run: Make, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tmp_path / "baseline.json"
    make_baseline_run("a", {"qasper": "y"}).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UsageError, match=rf"baseline\.json is not a baseline: {message}"):
        load_baseline(path)


@pytest.mark.parametrize("text", ["", "{", "NaN", '{"sparsecache_baseline": 1, "e": NaN}', "[" * 10**5, "\ud800"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=r"b\.json is not a baseline: it is not valid JSON"):
        load_baseline(tmp_path / "b.json")


def test_no_other_file_is_overwritten(make_baseline_run: Make, tmp_path: Path) -> None:
    run = make_baseline_run("a", {"qasper": "y"})
    for name, text in (("README.md", "# Title"), ("summary.json", '{"complete": true}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=f"{name} is not a baseline: .*under another name"):
            run.save(tmp_path / name)
        assert (tmp_path / name).read_text() == text
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        run.save(tmp_path / "nowhere" / "b.json")
