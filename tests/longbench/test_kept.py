"""Statistics of kept shares: means over rows with a number, sums, and invalid values."""

from typing import Any

import pytest

from sparsecache.longbench.kept import KeptStats, aggregate_kept, count_undropped_rows, format_kept, format_percent


def row(kept: Any = 0.25, **more: Any) -> dict[str, Any]:
    return {"pred": "x", "kept": kept, "sparse_steps": 10, "capped_steps": 10, "dense_layers": 2, **more}


SHORT = row(None, sparse_steps=0, capped_steps=0)
ERROR = {"pred": "", "error": "OutOfMemoryError"}


def test_rows_without_a_number_are_counted_and_left_out_of_the_mean() -> None:
    assert aggregate_kept([row(0.1), row(0.3), SHORT, ERROR]) == KeptStats(
        share=0.2,
        rows=2,
        rows_without_sparse_step=1,
        invalid_rows=0,
        sparse_steps=20,
        capped_steps=20,
        capped_rows=2,
        dropping_rows=2,
        dense_layers=frozenset({2}),
        fetched_bytes=None,
        gpu_cache_hit=None,
    )


def test_full_cache_rows_have_no_statistics() -> None:
    assert aggregate_kept([{"pred": "x"}, ERROR]) is None
    assert aggregate_kept([]) is None
    assert aggregate_kept([{**ERROR, "kept": 0.5}]) is None


def test_rows_too_short_for_a_sparse_step_have_no_mean() -> None:
    found = aggregate_kept([SHORT, SHORT])
    assert found is not None
    assert (found.share, found.rows, found.rows_without_sparse_step, found.sparse_steps) == (None, 0, 2, 0)


def test_offload_values_are_aggregated_if_present() -> None:
    rows = [row(fetched_bytes=100, gpu_cache_hit=0.5), row(fetched_bytes=50, gpu_cache_hit=None)]
    found = aggregate_kept([*rows, row(fetched_bytes=2, gpu_cache_hit=1.0)])
    assert found is not None
    assert (found.fetched_bytes, found.gpu_cache_hit) == (152, 0.75)
    assert (found.as_json()["fetched_bytes"], found.as_json()["gpu_cache_hit"]) == (152, 0.75)
    plain = aggregate_kept([row()])
    assert plain is not None and not {"fetched_bytes", "gpu_cache_hit"} & plain.as_json().keys()


@pytest.mark.parametrize("kept", ["0.5", True, float("nan"), float("inf"), [1], {"x": 1}, -4, 1.01])
def test_invalid_shares_are_left_out_and_counted(kept: Any) -> None:
    found = aggregate_kept([row(kept), row(0.5)])
    assert found is not None
    assert (found.share, found.rows, found.rows_without_sparse_step, found.invalid_rows, found.dropping_rows) == (
        0.5,
        1,
        0,
        1,
        1,
    )
    (line,) = format_kept([found])
    assert "of 1 rows (1 more hold no share from 0 to 1 and are left out)" in line


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "-"),
        (1.0, "100.0%"),
        (0.2534, "25.3%"),
        (0.01, "1.0%"),
        (0.00987, "0.99%"),
        (0.0004, "0.04%"),
        (0, "0.00%"),
    ],
)
def test_shares_below_one_percent_have_two_decimals(share: float | None, text: str) -> None:
    assert format_percent(share) == text


def test_one_line_explains_the_share() -> None:
    (line,) = format_kept([aggregate_kept([row(), SHORT]), None, aggregate_kept([row()])])
    assert line == (
        "Kept: mean share of past tokens attended to, over 20 sparse steps of 2 rows (1 more had no sparse step); "
        "dense layers: 2."
    )
    (line,) = format_kept([aggregate_kept([row(dense_layers=0)])])
    assert line.endswith("over 10 sparse steps of 1 rows.")
    assert list(format_kept([None, None])) == []


WHOLE = row(1.0)
LOSSLESS = row(1.0, capped_steps=0)


@pytest.mark.parametrize(
    ("datasets", "rows"),
    [
        ([[WHOLE, WHOLE], [WHOLE]], 3),
        ([[WHOLE, LOSSLESS, SHORT, ERROR]], 1),
        ([[WHOLE, WHOLE], [row(0.999)]], 0),
        ([[LOSSLESS, SHORT]], 0),
        ([[WHOLE, row(0.5, capped_steps=0)]], 1),
        ([[{"pred": "x"}], []], 0),
    ],
)
def test_rows_over_the_budget_that_kept_everything_are_counted(datasets: list[list[dict[str, Any]]], rows: int) -> None:
    assert count_undropped_rows(map(aggregate_kept, datasets)) == rows
