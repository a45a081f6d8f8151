"""Edited files: any value in any place is accepted or refused with its field."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecache.errors import UsageError
from sparsecache.longbench.baseline import load_baseline, make_baseline
from sparsecache.longbench.compare import compare
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.html import compare_page
from sparsecache.longbench.report import write_results
from sparsecache.longbench.schema import Count, Number, SchemaError, parse
from sparsecache.longbench.score_tables import score_document
from sparsecache.longbench.scores import ScoringOptions, score_run
from sparsecache.longbench.show import format_rows, worst_rows
from sparsecache.longbench.tables import FORMATS, render

MakeRun = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**99, -(10**99), 1e308, 5e-324, "", "x", "NaN", "\ud83d", "x" * 5000, [], [[]],
    [1], ["x"], {}, {"x": 1}, {"": {}}, [{"clock": {"decode_s": 1e15, "decode_tokens": 1}}],
]  # fmt: skip
RAW = ["NaN", "Infinity", "1e999", "9" * 400, "9" * 5000, "[" * 60 + "]" * 60, "[" * 5000 + "]" * 5000]


@dataclass(frozen=True)
class Inner:
    count: Count
    name: str | None = None


class Open(TypedDict, total=False):
    inner: Inner


@dataclass(frozen=True)
class Outer:
    inner: Inner
    numbers: list[Number] = field(default_factory=list)
    table: dict[str, bool] = field(default_factory=dict)
    either: str | Count | None = ""


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "the value is []; it must be an object"),
        ({}, "lacks inner"),
        ({"inner": {}}, "lacks inner.count"),
        ({"inner": {"count": True}}, "inner.count is true; it must be a whole number"),
        ({"inner": {"count": 1.0}}, "inner.count is 1.0; it must be a whole number"),
        ({"inner": {"count": -1}}, "inner.count is -1; it must be a number from 0 to 9.0072e+15"),
        ({"inner": {"count": 1, "name": 5}}, "inner.name is 5; it must be a text"),
        ({"inner": {"count": 1}, "numbers": {}}, "numbers is {}; it must be a list"),
        ({"inner": {"count": 1}, "numbers": [1, "x" * 99]}, f"numbers[1] is {'x' * 40}...; it must be a number"),
        ({"inner": {"count": 1}, "table": {"a": None}}, "table.a is null; it must be true or false"),
        ({"inner": {"count": 1}, "either": []}, "either is []; it must be a text or a whole number"),
        ({"inner": {"count": 1}, "either": -1}, "either is -1; it must be a text or a number from 0 to 9.0072e+15"),
    ],
)
def test_errors_name_the_field_the_value_and_what_is_allowed(value: Any, problem: str) -> None:
    with pytest.raises(SchemaError) as refused:
        parse(Outer, value)
    assert str(refused.value) == problem


def test_valid_values_become_objects_and_unknown_keys_are_ignored() -> None:
    value = {"inner": {"count": 3, "more": 1}, "numbers": [1, 2.5], "table": {"a": True}, "either": 4, "x": None}
    assert parse(Outer, value) == Outer(Inner(3), [1, 2.5], {"a": True}, 4)
    assert parse(Open, {"inner": {"count": 1}, "x": 2}) == {"inner": {"count": 1}, "x": 2}


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*at, key))


def _changed(content: Any, draw: Any) -> str:
    """Return `content` as JSON with one value replaced, removed, or written as invalid JSON."""
    place = draw(st.sampled_from(list(_places(content))))
    mark, content = "@@mark@@", deepcopy(content)
    raw = draw(st.sampled_from(RAW) | st.sampled_from(VALUES).map(json.dumps))
    if not place:
        return str(raw)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if draw(st.integers(0, 5)):
        parent[place[-1]] = mark
    else:
        del parent[place[-1]]
    return json.dumps(content).replace(f'"{mark}"', raw)


SESSION = {
    "id": "1-host", "device": "cpu", "gpu": None, "batch_size": 2, "seconds": 3.0,
    "clock": {"prefill_s": 1.0, "prefill_tokens": 9, "decode_s": 2.0, "decode_tokens": 9, "peak_gpu_bytes": 5},
    "workers": [{"worker": 1, "rows": 2, "seconds": 2.0, "died": False}],
}  # fmt: skip
FEW = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def folder(make_run: MakeRun, row: Row) -> Path:
    measured = {"kept": 0.5, "sparse_steps": 3, "capped_steps": 2, "dense_layers": 1, "new_tokens": 4, "decode_s": 0.5}
    rows = [row(at, **measured, prompt_sha256="ab", prompt_end="end", finish_reason="stop") for at in range(3)]
    path = make_run("a", {"qasper": rows})
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "sessions": [SESSION]}))
    return path


def _use(path: Path) -> None:
    """Do everything that the commands do with one run."""
    run = score_run(path)
    found = compare([run, run], resamples=2)
    for document in (score_document(run), compare_document(found)):
        for format in FORMATS:
            render(document, format)
    list(format_rows(worst_rows(run), [run], 5, 80))
    write_results(run, ScoringOptions())
    compare_page(found, [run, run], [])
    baseline = make_baseline(run, ScoringOptions())
    baseline.save(path / "saved.json")
    gate(baseline, load_baseline(path / "saved.json"), Limits(min_speedup=0.1), allow_unlike=True)


def test_an_unchanged_run_works(folder: Path) -> None:
    _use(folder)


@pytest.mark.parametrize("name", ["run.json", "qasper.jsonl", "saved.json"])
@FEW
@given(data=st.data())
def test_any_change_is_accepted_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    whole = {path: path.read_text() for path in sorted(folder.glob("*.json*"))}
    if name == "saved.json":
        make_baseline(score_run(folder), ScoringOptions()).save(folder / name)
    first, *others = (folder / name).read_text().splitlines(keepends=True) if name == "qasper.jsonl" else (
        (folder / name).read_text(), )  # fmt: skip
    text = _changed(json.loads(first), data.draw)
    (folder / name).write_text(text.rstrip("\n") + "\n" + "".join(others))
    try:
        load_baseline(folder / name) if name == "saved.json" else _use(folder)
    except UsageError as error:
        message = str(error)
        assert len(message) < 1500 and (name in message or "a" in message)
    finally:
        for path in folder.glob("*.json*"):
            path.unlink()
        for path, content in whole.items():
            path.write_text(content)
