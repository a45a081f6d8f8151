"""A run is resumed while the files that its options name have the same content, wherever they lie."""

import json
from pathlib import Path

import pytest

EVICT = """
from dataclasses import dataclass
from sparsecache.cache import EvictionMethod

@dataclass
class First(EvictionMethod):
    def score(self, q, k, v):
        return {sign}k.float().norm(dim=2)
"""
SELECT = """
from sparsecache.methods.oracle import Oracle

class Mine(Oracle):
    margin = {sign}1
"""


@pytest.mark.parametrize(
    ("method", "option", "value", "name", "source"),
    [
        ("duoattention", "gates", "{}", "gates.tsv", "{sign}0.001\n"),
        ("composed", "evict", "{},budget=0.5,dense_layers=0", "mine.py", EVICT),
        ("composed", "select", "{},budget=20,dense_layers=0", "mine.py", SELECT),
    ],
)
def test_a_changed_file_is_refused_and_a_moved_one_is_the_same(
    method, option, value, name, source, predict, folder, tmp_path, forbid_weights
) -> None:
    def rerun(path: Path):
        others = {"duoattention": ["sinks=4", "recent=16", "sparsity=1"], "composed": ["evict=snapkv,dense_layers=0"]}
        given = [f"{option}={value.format(path)}", *(each for each in others[method] if not each.startswith(option))]
        if option == "evict":
            given.append("select=quest,budget=20,dense_layers=0")
        options = [part for each in given for part in ("-o", each)]
        return predict("--method", method, *options, "--max_samples", "1", "--name", "vanilla")

    first, moved = tmp_path / "first" / name, tmp_path / "moved" / name
    for path in (first, moved):
        path.parent.mkdir()
    first.write_text(source.format(sign=""))
    told = rerun(first)
    assert told.exit_code == 0, told.output
    rows = (folder / "qasper.jsonl").read_bytes()
    forbid_weights()
    first.rename(moved)
    told = rerun(moved)
    assert told.exit_code == 0 and "0 of 1 to do" in told.stdout, told.output
    moved.write_text(source.format(sign="-"))
    told = rerun(moved)
    assert told.exit_code == 2 and f"the content of the file that {option} names: not the same" in told.stderr
    record = json.loads((folder / "run.json").read_text())
    record["identity"]["options"][option] = value.format(moved)  # as earlier versions recorded it
    (folder / "run.json").write_text(json.dumps(record))
    told = rerun(moved)
    assert told.exit_code == 2 and f"file that {option} names: not recorded by an earlier version" in told.stderr
    assert (folder / "qasper.jsonl").read_bytes() == rows


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("gates=", "gates='' is not the path of a file or none. gates: file of gates"),
        ("gates=no.tsv", "gates=no.tsv cannot be read (Could not read no.tsv: No such file or directory). Give a file"),
    ],
)
def test_a_file_that_is_not_there_is_refused_in_two_sentences(option, message, predict) -> None:
    told = predict("--method", "duoattention", "-o", option)
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count(". ") == 1
