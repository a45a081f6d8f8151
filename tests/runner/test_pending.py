"""In which order the rows of several datasets are done at once."""

from pathlib import Path

import pytest

from sparsecache.longbench.data import load_rows
from sparsecache.longbench.records import PredictionFile
from sparsecache.longbench.tasks import load_tasks
from sparsecache.runner.pending import PendingDataset, in_order, longest_first, longest_per_dataset
from sparsecache.synthetic.source import SampleSource

NAMES = ("qasper", "gov_report", "passage_count")  # caps of 128, 512 and 32 tokens


@pytest.fixture
def datasets(tmp_path: Path) -> list[PendingDataset]:
    source = SampleSource(6, 600, 3)
    made = []
    for name in NAMES:
        task = load_tasks()[name]
        rows = load_rows(source, task)
        made.append(PendingDataset(task, name, rows, 5, PredictionFile(tmp_path / f"{name}.jsonl")))
    made[0].file.append(_finished(made[0].rows.dataset[2]))
    yield made
    for dataset in made:
        dataset.file.close()


def _finished(row: dict[str, object]) -> dict[str, object]:
    return {"pred": "", **{key: row[key] for key in ("answers", "all_classes", "length", "_id")}}


def _bytes(row: dict[str, object]) -> int:
    return len(f"{row['context']}".encode())


def test_the_longest_rows_of_all_datasets_come_first_and_each_comes_once(datasets) -> None:
    assert [dataset.num_missing for dataset in datasets] == [4, 5, 5]
    found = list(longest_first(datasets))
    key = [(dataset.stem, row["_id"]) for dataset, row in found]
    assert sorted(key) == sorted((dataset.stem, row["_id"]) for dataset, row in in_order(datasets)) and len(key) == 14
    assert [dataset.stem for dataset, _ in found[:5]] == ["gov_report"] * 5
    assert [dataset.stem for dataset, _ in found[-5:]] == ["passage_count"] * 5
    for name in NAMES:
        sizes = [_bytes(row) + len(row["input"]) for dataset, row in found if dataset.stem == name]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


def test_the_largest_row_of_each_dataset_is_a_pending_one(datasets) -> None:
    for dataset, row in longest_per_dataset(datasets):
        others = [_bytes(other) + len(other["input"]) for other in dataset.pending()]
        assert _bytes(row) + len(row["input"]) == max(others)
    assert [dataset.stem for dataset, _ in longest_per_dataset(datasets)] == list(NAMES)
    for row in list(datasets[2].pending()):
        datasets[2].file.append(_finished(row))
    assert [dataset.stem for dataset, _ in longest_per_dataset(datasets)] == list(NAMES[:2])
