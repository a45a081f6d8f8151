"""The bundled checkpoint's scores, through the whole pipeline, against the committed ones.

baseline.json holds the command that makes them; when a change of the sample, the checkpoint or the protocol is wanted,
run that, score it, and put its result.json there.
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from longbench_pred import main
from sparsecache.longbench.scores import score_run

Scores = dict[str, float | None]

BASELINE: dict[str, Any] = json.loads(Path(__file__).with_name("baseline.json").read_text())
# In float32 another CPU or torch rounds other last digits, which can turn one of the closest decisions (a count, say),
# and with it the score of one dataset; it does not turn those of two.
MAY_DIFFER = 1


def _scores(pred_dir: Path, *further: str) -> Scores:
    """The scores of the baseline's command, with further arguments."""
    _, *arguments = shlex.split(BASELINE["command"])
    result = CliRunner().invoke(main, [*arguments, "--pred_dir", str(pred_dir), *further])
    assert result.exit_code == 0, result.output
    (run,) = pred_dir.glob("*/baseline")
    return {dataset.task.name: dataset.summary.score for dataset in score_run(run).datasets}


def _differing(scores: Scores) -> dict[str, tuple[float | None, float | None]]:
    """Dataset to expected and found score, where these are not the same."""
    expected = BASELINE["scores"]
    return {name: (expected[name], score) for name, score in scores.items() if score != expected[name]}


def test_the_scores_are_those_of_the_baseline(tmp_path: Path) -> None:
    scores = _scores(tmp_path)
    assert scores.keys() == BASELINE["scores"].keys() and len(scores) == 21
    assert len(_differing(scores)) <= MAY_DIFFER, _differing(scores)


def test_a_layer_without_attention_is_seen(tmp_path: Path, repo: Path) -> None:
    folder = shutil.copytree(repo / "sparsecache" / "demo" / "checkpoint", tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.5.self_attn.o_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scores = _scores(tmp_path / "pred", "--model", str(folder), "--datasets", "musique,trec,lcc")
    assert len(_differing(scores)) > MAY_DIFFER
