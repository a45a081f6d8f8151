"""The tables of the documents have the numbers of docs/data."""

import csv
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BUDGETS = {"64 tokens": "64", "256 tokens": "256", "256": "256", "1,024 tokens": "1024", "1,024": "1024",
           "4,096": "4096", "2 %": "0.02", "5 %": "0.05", "10 %": "0.1", "20 %": "0.2"}  # fmt: skip
STUDIES = {
    "Qwen": "qwen2.5-coder-1.5b-instruct-study.csv",
    "SmolLM2": "smollm2-135m-instruct-study.csv",
    "Gemma": "gemma-3-270m-study.csv",
}

Row = dict[str, str]


def _read(name: str) -> list[Row]:
    with open(DOCS / "data" / name, newline="") as file:
        return list(csv.DictReader(file))


def _table(page: str, header: str) -> tuple[list[str], list[list[str]]]:
    """Return the cells of the header that begins with `header`, and of the lines below it."""
    lines = (DOCS / page).read_text().splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0], rows[2:]


def _signed(value: str, decimals: int = 1) -> str:
    number = f"{float(value):+.{decimals}f}"
    return number[1:] if float(number) == 0 else number


def _difference(run: Row, part: str = "without_code") -> str:
    return _signed(run[f"{part}_difference"])


def _with_interval(run: Row) -> str:
    low, high = (_signed(run[f"without_code_{end}"]) for end in ("low", "high"))
    return f"{_difference(run)} ({low} to {high})"


def test_all_methods_have_the_differences_of_the_study() -> None:
    study = {row["run"]: row for row in _read(STUDIES["Qwen"])}
    titles, rows = _table("accuracy.md", "| method | 256 tokens | all | 1,024 tokens | all |")
    checked = 0
    for method, *cells in rows[1:]:
        for title, next_title, cell, of_all in zip(titles[1::2], titles[2::2], cells[::2], cells[1::2], strict=False):
            assert next_title == "all"
            run = study[f"{method.strip('`')}-budget={BUDGETS[title]}"]
            assert (cell, of_all) == (_with_interval(run), _difference(run, "all")), (method, title)
            checked += 1
        kib = float(study[f"{method.strip('`')}-budget=0.05"]["cache_bytes_per_token"]) / 1024
        assert cells[-1] == f"{kib:.1f}", method
    assert checked == 4 * 24


@pytest.mark.parametrize(
    ("header", "model", "suffix", "expected"),
    [
        ("| Qwen | 64 tokens |", "Qwen", "", 24 * 9),
        ("| SmolLM2 | 64 tokens |", "SmolLM2", "", 24 * 9),
        ("| method | 256 tokens | 1,024 | 5 % | 20 % |", "SmolLM2", "", 24 * 4),
        ("| Gemma | 64 tokens |", "Gemma", "-dense_layers=1", 5 * 8),
        ("| Gemma, other methods | 256 tokens |", "Gemma", "-dense_layers=1", 4 * 2),
    ],
)
def test_budgets_have_the_differences_of_the_study(header: str, model: str, suffix: str, expected: int) -> None:
    titles, rows = _table("accuracy.md", header)
    study = {row["run"]: row for row in _read(STUDIES[model])}
    checkpoint = STUDIES[model].removesuffix("-study.csv")
    means = {
        row["run"]: [row[key] for key in ("difference", "low", "high")]
        for row in _read("paired-differences.csv")
        if (row["model"], row["baseline"], row["part"]) == (checkpoint, "vanilla", "without_code")
    }
    checked = 0
    for name, *cells in rows:
        method = name.strip("`")
        for title, cell in zip(titles[1:], cells, strict=True):
            if title == "mean":
                mean, low, high = map(_signed, means[f"{method}, mean of eight budgets"])
                assert cell == f"{mean} ({low} to {high})", name
            else:
                run = study[f"{method}-budget={BUDGETS[title]}{suffix}"]
                assert cell == (_with_interval(run) if "(" in cell else _difference(run)), (name, title)
            checked += 1
    assert checked == expected


def test_the_readme_has_the_differences_of_the_study() -> None:
    study = {row["run"]: row for row in _read(STUDIES["Qwen"])}
    measured = [row for row in _read("llama-3.1-8b-methods.csv") if (row["tokens"], row["batch"]) == ("32768", "8")]
    speeds = {row["method"]: float(row["x_vanilla"]) for row in measured}
    titles, rows = _table("../README.md", "| method | 256 tokens | 1,024 tokens | 5 % | 20 % |")
    for method, *cells in rows:
        runs = [study[f"{method.strip('`')}-budget={BUDGETS[title]}"] for title in titles[1:5]]
        assert cells[:4] == [_difference(run) for run in runs], method
        assert cells[4] == f"{float(runs[2]['cache_bytes_per_token']) / 1024:.1f}", method
        assert cells[5] == f"{speeds[method.strip('`')]:.2f}", method
    assert len(rows) == 9


def test_all_methods_have_the_speeds_that_were_measured() -> None:
    measured = {(row["method"], row["tokens"], row["batch"]): row for row in _read("llama-3.1-8b-methods.csv")}
    titles, rows = _table("performance.md", "| method | 8k, 1 |")
    tokens = {"8k": "8192", "32k": "32768"}
    for method, *cells in rows:
        for title, cell in zip(titles[1:-1], cells, strict=False):
            length, batch = title.split(", ")
            row = measured[method.strip("`"), tokens[length], batch]
            rate, ratio, share = (float(row[key]) for key in ("tokens_per_s", "x_vanilla", "of_limit"))
            found = re.fullmatch(r"([\d,]+) \(([\d.]+); (\d+) %\)", cell)
            assert found, cell
            assert float(found[1].replace(",", "")) == pytest.approx(rate, abs=0.6)
            assert float(found[2]) == pytest.approx(ratio, abs=0.0051)
            assert float(found[3]) == pytest.approx(100 * share, abs=0.51)
        gib = int(measured[method.strip("`"), "32768", "8"]["gpu_cache_bytes"]) / 8 / 2**30
        assert cells[-1] == f"{gib:.2f}"
    assert {row[0].strip("`") for row in rows} == {method for method, *_ in measured}


def test_codes_have_the_times_that_were_measured() -> None:
    """A line without a commit has the times of the latest run in the data."""
    measured = {(row["run"], row["batch"], row["commit"]): row for row in _read("llama-3.1-8b-codes.csv")}
    latest = {(run, batch): commit for run, batch, commit in measured}
    _, rows = _table("performance.md", "| | batch 1, ms | of the limit |")
    for name, *cells, cache in rows:
        method = name.split("`")[1]
        bits = re.search(r"(\d) bits", name)
        options = {"kivi": f" bits={bits[1]}" if bits else "", "infinigen": " budget=0.05"}
        run = method + options.get(method, "" if method == "vanilla" else " budget=0.05 storage=int4")
        of_line = re.search(r"\((\w{7})\)", name)
        commit = of_line[1] if of_line else latest[run, "1"]
        one, eight = (measured.get((run, batch, commit)) for batch in "18")
        vanilla = measured["vanilla", "1", commit]
        assert one is not None
        step, limit = float(one["step_ms"]), float(one["limit_ms"])
        assert float(cells[0]) == pytest.approx(step, abs=0.0056)  # some data has three decimals
        assert cells[1] == f"{limit / step:.0%}".replace("%", " %"), name
        assert cells[2] == f"{float(vanilla['step_ms']) / step:.2f}", name
        if eight is None or eight["error"]:
            assert cells[3:] == ["does not fit", ""], name
            assert cache == f"{8 * int(one['gpu_cache_bytes']) / 2**30:.1f}", name
        else:
            step, limit = float(eight["step_ms"]), float(eight["limit_ms"])
            assert float(cells[3]) == pytest.approx(step, abs=0.0056)
            assert cells[4] == f"{limit / step:.0%}".replace("%", " %"), name
            assert cache == f"{int(eight['gpu_cache_bytes']) / 2**30:.1f}", name
    assert len(rows) == 7
