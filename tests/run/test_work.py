"""In which order the rows of several datasets are done at once."""

from pathlib import Path

import pytest

from sparsecache.longbench.data import load_rows
from sparsecache.longbench.records import PredictionFile
from sparsecache.longbench.tasks import load_tasks
from sparsecache.synthetic.source import SampleSource
from sparsecache.work import Work, in_order, largest, longest_first

NAMES = ("qasper", "gov_report", "passage_count")  # caps of 128, 512 and 32 tokens


@pytest.fixture
def works(tmp_path: Path) -> list[Work]:
    source = SampleSource(6, 600, 3)
    made = []
    for name in NAMES:
        task = load_tasks()[name]
        rows = load_rows(source, task)
        made.append(Work(task, name, rows, PredictionFile(tmp_path / f"{name}.jsonl"), wanted=5))
    made[0].file.append(_finished(made[0].rows.dataset[2]))
    yield made
    for work in made:
        work.file.close()


def _finished(row: dict[str, object]) -> dict[str, object]:
    return {"pred": "", **{key: row[key] for key in ("answers", "all_classes", "length", "_id")}}


def _bytes(row: dict[str, object]) -> int:
    return len(f"{row['context']}".encode())


def test_the_longest_rows_of_all_datasets_come_first_and_each_comes_once(works) -> None:
    assert [work.missing for work in works] == [4, 5, 5]
    found = list(longest_first(works))
    key = [(work.stem, row["_id"]) for work, row in found]
    assert sorted(key) == sorted((work.stem, row["_id"]) for work, row in in_order(works)) and len(key) == 14
    assert [work.stem for work, _ in found[:5]] == ["gov_report"] * 5
    assert [work.stem for work, _ in found[-5:]] == ["passage_count"] * 5
    for name in NAMES:
        sizes = [_bytes(row) + len(row["input"]) for work, row in found if work.stem == name]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


def test_the_largest_row_of_each_dataset_is_a_pending_one(works) -> None:
    for work, row in largest(works):
        others = [_bytes(other) + len(other["input"]) for other in work.pending()]
        assert _bytes(row) + len(row["input"]) == max(others)
    assert [work.stem for work, _ in largest(works)] == list(NAMES)
    for row in list(works[2].pending()):
        works[2].file.append(_finished(row))
    assert [work.stem for work, _ in largest(works)] == list(NAMES[:2])
