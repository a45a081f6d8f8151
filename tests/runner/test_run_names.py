"""Folders of runs: named for the method and its options, and one checkpoint per model folder."""

import shutil

import pytest

from sparsecache.errors import UsageError
from sparsecache.runner.settings import Settings, default_run_name
from sparsecache.testing.random_checkpoint import make_random_checkpoint


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "infinigen"),
        ({"budget": "256"}, "infinigen-budget=256"),
        ({"budget": "0.20", "alpha": "inf"}, "infinigen-alpha=inf-budget=0.20"),
        ({"calibration_file": "../my texts/a.txt"}, "infinigen-calibration_file=.._my_texts_a.txt"),
        ({"calibration_file": "中\x00\udc80"}, "infinigen-calibration_file=___"),
    ],
)
def test_the_default_name_holds_the_options_that_were_given(options: dict[str, str], name: str) -> None:
    assert default_run_name("infinigen", options) == name
    settings = Settings(method="infinigen", options=options, data="sample")
    assert settings.run_name == name
    settings.check()
    assert Settings(method="infinigen", options=options, name="mine").run_name == "mine"


def test_long_names_fit_a_file_system_and_stay_apart() -> None:
    names = {default_run_name("quest", {"page": end.rjust(5000, "9")}) for end in "12"}
    assert len(names) == 2 and all(len(name.encode()) < 200 for name in names)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "\udc80"])
@pytest.mark.parametrize("option", ["name", "model_name"])
def test_a_name_that_is_no_folder_is_refused(option: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} .* must be the name of one folder"):
        Settings(data="sample", **{option: name}).check()


def test_two_budgets_are_two_runs(predict, folder) -> None:
    for budget in ("20", "30"):
        told = predict("--method", "h2o", "-o", f"budget={budget}", "-o", "dense_layers=0", "--max_samples", "1")
        assert told.exit_code == 0, told.output
    assert {path.name for path in folder.parent.iterdir()} == {f"h2o-budget={n}-dense_layers=0" for n in (20, 30)}


def test_another_checkpoint_of_the_same_name_is_refused_beside_it_too(predict, folder, tiny, tmp_path) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    other = make_random_checkpoint(tmp_path / "other" / "tiny", seed=5, num_hidden_layers=1)
    before = (folder / "qasper.jsonl").read_bytes()
    h2o = ("--method", "h2o", "-o", "dense_layers=0")
    for more in ((), ("--name", "second"), ("--name", "second", "--overwrite"), h2o):
        told = predict("--model", str(other), *more)
        assert told.exit_code == 2, more
        assert all(part in told.stderr for part in (str(folder), str(tiny), str(other), "--model_name"))
        assert [path.name for path in folder.parent.iterdir()] == ["vanilla"]
    assert (folder / "qasper.jsonl").read_bytes() == before
    assert predict("--model", str(other), "--model_name", "other", "--max_samples", "1").exit_code == 0
    assert (tmp_path / "pred" / "other" / "vanilla" / "qasper.jsonl").exists()


def test_a_checkpoint_that_was_moved_or_that_overwrites_its_only_run_is_taken(predict, folder, tiny, tmp_path) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    moved = shutil.copytree(tiny, tmp_path / "moved" / "tiny")
    assert predict("--model", str(moved), "--max_samples", "1").exit_code == 0
    other = make_random_checkpoint(tmp_path / "other" / "tiny", seed=5, num_hidden_layers=1)
    assert predict("--model", str(other), "--max_samples", "1", "--overwrite").exit_code == 0
    assert predict("--name", "second", "--max_samples", "1").exit_code == 2  # the record is not the one read before
