"""A run goes on where it was left, and never mixes with another."""

import shutil

import pytest

from sparsecache.longbench.records import PredictionFile
from sparsecache.synthetic.rows import make_rows
from sparsecache.testing.random_checkpoint import make_random_checkpoint

ROWS = 3  # as conftest.py asks for


def test_a_second_run_does_nothing_and_loads_no_weights(predict, folder, read_record, forbid_weights) -> None:
    assert predict().exit_code == 0
    before, record = (folder / "qasper.jsonl").read_bytes(), read_record(folder)
    forbid_weights()
    told = predict()
    assert told.exit_code == 0, told.output
    assert f"0 of {ROWS} to do" in told.stdout
    assert (folder / "qasper.jsonl").read_bytes() == before and read_record(folder) == record
    (folder / "qasper.jsonl").unlink()
    assert isinstance(predict().exception, AssertionError)  # and here it would have


def test_more_samples_extend_a_run_and_fewer_leave_it(
    predict, folder, tmp_path, read_rows, read_untimed, read_record
) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    first = read_rows(folder / "qasper.jsonl")
    assert len(first) == read_record(folder)["datasets"]["qasper"]["expected_rows"] == 1
    assert predict("--max_samples", "2").exit_code == 0
    assert predict().exit_code == 0
    rows = read_rows(folder / "qasper.jsonl")
    assert rows[0] == first[0] and [row["_id"] for row in rows] == [r["_id"] for r in make_rows("qasper", ROWS, 256, 0)]
    assert read_record(folder)["datasets"]["qasper"]["expected_rows"] == ROWS
    assert predict("--max_samples", "1").exit_code == 0
    assert read_rows(folder / "qasper.jsonl") == rows
    assert read_record(folder)["datasets"]["qasper"]["expected_rows"] == ROWS
    assert predict("--name", "whole").exit_code == 0
    assert read_untimed(folder.parent / "whole" / "qasper.jsonl") == read_untimed(folder / "qasper.jsonl")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--max_length", "200"], ["max_length: none, now 200"]),
        (["--window", "4000"], ["window: 8192, now 4000"]),
        (["--dtype", "bfloat16"], ["dtype: float32, now bfloat16"]),
        (["--engine", "transformers"], ["engine: sparsecache, now transformers"]),
        (["--sample_seed", "1"], ["the data of qasper: not the same"]),
    ],
    ids=lambda value: value[0],
)
def test_another_identity_is_refused_with_both_values(changes, parts, predict, folder, forbid_weights) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    forbid_weights()
    told = predict("--max_samples", "2", *changes)
    assert told.exit_code == 2
    assert all(part in told.stderr for part in (*parts, str(folder), "--name", "--overwrite"))
    assert (folder / "qasper.jsonl").read_bytes() == before


def test_another_checkpoint_under_the_same_name_is_refused(predict, folder, tiny, tmp_path) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    other = make_random_checkpoint(tmp_path / "other" / "tiny", seed=5, num_hidden_layers=1)
    told = predict("--model", str(other))
    assert told.exit_code == 2
    assert all(part in told.stderr for part in (str(folder), str(tiny), str(other), "--model_name"))


def test_batch_and_device_are_no_identity_and_the_batch_changes_no_text(predict, folder, read_untimed) -> None:
    arguments = ("--datasets", "qasper,samsum", "--sample_rows", "5")
    assert predict(*arguments, "--max_samples", "1").exit_code == 0
    assert predict(*arguments, "--batch_size", "3", "--device", "auto").exit_code == 0
    assert predict(*arguments, "--name", "alone").exit_code == 0
    for dataset in ("qasper", "samsum"):
        places = (folder, folder.parent / "alone")
        batched, alone = ({row["_id"]: row for row in read_untimed(place / f"{dataset}.jsonl")} for place in places)
        assert batched == alone and len(alone) == 5


def test_overwrite_starts_afresh(predict, folder, read_rows, read_record) -> None:
    assert predict("--datasets", "qasper,trec").exit_code == 0
    (folder / "result.json").write_text("{}")
    told = predict("--max_length", "200", "--overwrite")
    assert told.exit_code == 0
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"qasper.jsonl", "run.json"}
    assert read_record(folder)["identity"]["max_length"] == 200 and len(read_record(folder)["sessions"]) == 1
    assert all(row["truncated"] for row in read_rows(folder / "qasper.jsonl"))


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(predict, folder, tiny, tmp_path) -> None:
    assert predict().exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    pickled = shutil.copytree(tiny, tmp_path / "elsewhere" / "tiny")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for arguments in (["--window", "100"], ["--model", str(pickled)], ["--data", "nowhere"], ["--device", "cuda:99"]):
        assert predict(*arguments, "--overwrite").exit_code == 2
        assert (folder / "qasper.jsonl").read_bytes() == before


def test_a_dataset_that_is_being_written_is_refused_and_another_is_not(predict, folder, read_rows) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    with PredictionFile(folder / "qasper.jsonl"):
        told = predict()
        assert told.exit_code == 2
        assert "qasper.jsonl is being written by another process" in told.stderr
        assert predict("--overwrite").exit_code == 2
        assert predict("--datasets", "trec").exit_code == 0
    assert predict().exit_code == 0
    assert len(read_rows(folder / "qasper.jsonl")) == ROWS
