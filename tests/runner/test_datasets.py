"""Datasets of one's own, and all real rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from longbench_pred import main
from sparsecache.configs import read_tables
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tasks import select_tasks
from sparsecache.synthetic.rows import make_rows

ROWS = 3  # as conftest.py asks for


@pytest.fixture
def own_dataset(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts a table [mine] into datasets.toml and makes a folder with its rows."""

    def make(**changes: Any) -> Path:
        rows = [{**row, "dataset": "mine"} for row in make_rows("qasper", ROWS, 256, 0)]
        table = {"template": "{context}\n{input}", "max_new_tokens": 8, "metric": "token_f1", **changes}
        tables = {**read_tables("datasets.toml"), "mine": {**table, "category": "few_shot", "language": "en"}}
        monkeypatch.setattr(
            "sparsecache.longbench.tasks.read_tables",
            lambda name: tables if name == "datasets.toml" else read_tables(name),
        )
        folder = tmp_path / "rows"
        folder.mkdir()
        (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


def test_a_dataset_of_ones_own_runs_and_is_scored_with_any_number_of_rows(
    predict, folder, own_dataset, read_rows
) -> None:
    arguments = ("--datasets", "mine", "--data", str(own_dataset()))
    told = predict(*arguments)
    assert told.exit_code == 0, told.output
    assert [row["_id"] for row in read_rows(folder / "mine.jsonl")] == [
        row["_id"] for row in make_rows("qasper", ROWS, 256, 0)
    ]
    result = score_run(folder)
    assert result.complete and [score.expected for score in result.datasets] == [ROWS]
    assert result.averages["flat_mean"].datasets == 0
    assert predict(*arguments, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "bleu"}, "There is no metric 'bleu'"),
        ({"metrics": "token_f1"}, "[mine] has unknown fields metrics"),
        ({"template": "{text}"}, "[mine]: the template uses text"),
    ],
    ids=["metric", "field", "template"],
)
def test_a_mistake_in_a_datasets_table_is_told_before_weights_are_read(
    changes, message, predict, folder, own_dataset, forbid_weights
) -> None:
    forbid_weights()
    told = predict("--datasets", "mine", "--data", str(own_dataset(**changes)))
    assert told.exit_code == 2
    assert told.stderr.startswith("Error: ") and message in told.stderr and "configs/datasets.toml" in told.stderr
    assert not list(folder.glob("*.jsonl"))


@pytest.fixture
def predict_real_rows(tiny, fixtures_dir, tmp_path, read_rows, schema) -> Callable[[str, bool], None]:
    """Predicts every real row there is on a device and compares the rows written with their sources."""

    def run(device: str, e: bool) -> None:
        raw = fixtures_dir / "raw"
        where = ["--model", str(tiny), "--data", str(raw), "--pred_dir", str(tmp_path), "--device", device]
        what = ["--datasets", "all", "--window", "8192", "--dtype", "float32", *(["--e"] if e else [])]
        told = CliRunner().invoke(main, [*where, *what])
        assert told.exit_code == 0, told.output
        tasks = select_tasks("all", e)
        assert len(tasks) == (13 if e else 21)
        for task in tasks:
            rows = read_rows(tmp_path / "tiny" / "vanilla" / f"{task.file_stem(e)}.jsonl")
            lines = (raw / f"{task.file_stem(e)}.jsonl").read_bytes().split(b"\n")
            assert [row["_id"] for row in rows] == [json.loads(line)["_id"] for line in lines if line.strip()]
            for row in rows:
                assert row.keys() == schema.keys()
                assert row["prompt_tokens"] + task.max_new_tokens <= 8192
                assert row["truncated"] == (row["original_tokens"] + task.max_new_tokens > 8192)

    return run


@pytest.mark.parametrize("e", [False, True], ids=["LongBench", "LongBench-E"])
def test_all_real_rows_go_from_file_to_prediction_row(e, predict_real_rows) -> None:
    predict_real_rows("cpu", e)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("e", [False, True], ids=["LongBench", "LongBench-E"])
def test_all_real_rows_go_from_file_to_prediction_row_on_a_gpu(e, predict_real_rows) -> None:
    predict_real_rows("cuda", e)
