"""Real predictions of LongBench v2 against the figures of its own code."""

import shutil
from pathlib import Path

from sparsecache.longbench.report import write_results
from sparsecache.longbench.scores import ScoringOptions, score_run


def test_the_official_figures_are_reproduced(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qwen2.5-7b_first40"
    folder.mkdir()
    shutil.copy(fixtures_dir / "v2" / f"{folder.name}.jsonl", folder / "longbench_v2.jsonl")
    write_results(score_run(folder), ScoringOptions())
    assert (folder / "result.txt").read_text() == (fixtures_dir / "v2" / "expected_result.txt").read_text()
