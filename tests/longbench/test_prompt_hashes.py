"""Prompts are compared by the hashes of their token ids if both rows have one, else of their texts."""

import pytest

from sparsecache.errors import UsageError
from sparsecache.longbench.compare import compare
from sparsecache.longbench.gate import gate
from sparsecache.longbench.gate_checks import Limits
from sparsecache.longbench.scores import score_run

IDS, OTHER_IDS, TEXT, OTHER_TEXT = (digit * 64 for digit in "1234")
CASES = [
    ({}, {}, True),
    ({"prompt_ids_sha256": IDS}, {"prompt_ids_sha256": IDS}, True),
    ({"prompt_ids_sha256": IDS}, {"prompt_ids_sha256": OTHER_IDS}, False),
    ({"prompt_sha256": TEXT, "prompt_ids_sha256": IDS}, {"prompt_sha256": TEXT, "prompt_ids_sha256": OTHER_IDS}, False),
    ({"prompt_sha256": TEXT, "prompt_ids_sha256": IDS}, {"prompt_sha256": TEXT}, True),
    ({"prompt_sha256": TEXT, "prompt_ids_sha256": IDS}, {"prompt_sha256": OTHER_TEXT}, False),
]


@pytest.mark.parametrize(("mine", "theirs", "same"), CASES)
def test_compare_and_gate_agree(mine, theirs, same, make_run, row, score_to_baseline, tmp_path) -> None:
    folders = [make_run(name, {"qasper": [row(0, **hashes)]}) for name, hashes in (("a", mine), ("b", theirs))]
    notes = compare([score_run(folder) for folder in folders]).notes
    assert any("different prompts" in note for note in notes) == (not same)
    before, after = map(score_to_baseline, folders)
    if same:
        assert gate(after, before, Limits()).passed
    else:
        with pytest.raises(UsageError, match="the prompts of 1 rows of qasper"):
            gate(after, before, Limits())


def test_different_versions_alone_are_allowed(make_run, row, score_to_baseline) -> None:
    known = {"chat_wrapper": "{prompt}", "chat_clock": "2024-07-26"}
    mine = {"transformers": "5.10.1", "tokenizers": "0.22.2", "probe_ids_sha256": "1", **known}
    theirs = {"transformers": "5.24.0", "tokenizers": "0.23.3", "probe_ids_sha256": "2", **known}
    runs = [
        score_to_baseline(make_run(name, {"qasper": [row(0)]}, identity=identity))
        for name, identity in (("a", mine), ("b", theirs), ("c", {}), ("d", {**theirs, "chat_wrapper": "<{prompt}>"}))
    ]
    verdict = gate(runs[0], runs[1], Limits())
    assert verdict.passed
    assert any("transformers" in warning and "5.10.1" in warning for warning in verdict.warnings)
    assert gate(runs[0], runs[2], Limits()).passed  # a run of before these were recorded
    with pytest.raises(UsageError, match="the rendered chat wrapper"):
        gate(runs[0], runs[3], Limits())
