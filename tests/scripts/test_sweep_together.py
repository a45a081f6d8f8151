"""Runs that share one process and each prompt, against the command line that makes them one by one."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from longbench_pred import main as predict_command
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.runner import shared
from sparsecache.runner.shared_prompts import split_by_size

TIMES = ("prefill_s", "decode_s", "shared_prefill_s")
ROWS = ["--data", "sample", "--datasets", "qasper,lcc", "--sample_rows", "2", "--sample_tokens", "256"]
ROWS += ["--max_new_tokens", "9"]
METHODS = """
[[methods]]
method = ["vanilla"]
[[methods]]
method = ["h2o", "infinigen"]
budget = 20
"""
NAMES = ["vanilla", "h2o-budget=20", "infinigen-budget=20"]
BROKEN = """
from sparsecache.methods.vanilla import Vanilla
class Broken(Vanilla):
    def make_cache(self, layer, config):
        raise RuntimeError("no such cache")
"""


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of a run by file, by `_id`, without what differs from run to run."""
    found = {}
    for file in folder.glob("*.jsonl"):
        parsed = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        untimed = [{key: value for key, value in row.items() if key not in TIMES} for row in parsed]
        found[file.name] = sorted(untimed, key=lambda row: str(row["_id"]))
    return found


@pytest.fixture
def sweep(repo: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs scripts/sweep.py in this process over these [[methods]]."""
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("sweep")

    def run(methods: str, *arguments: str) -> Result:
        text = f"models = [{json.dumps(str(tiny))}]\narguments = {json.dumps(ROWS)}\n{methods}"
        Path("sweep.toml").write_text(text)
        return CliRunner().invoke(script.main, ["sweep.toml", *arguments])

    return run


@pytest.fixture
def alone(tiny: Path) -> Callable[..., Result]:
    """Makes a run by its own command."""

    def run(name: str, pred_dir: Path) -> Result:
        method, _, option = name.partition("-")
        arguments = ["--model", str(tiny), "--method", method, *(["-o", option] if option else []), "--name", name]
        return CliRunner().invoke(predict_command, [*arguments, *ROWS, "--pred_dir", str(pred_dir)])

    return run


@pytest.fixture
def prefilled_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts whose forward pass was computed, in order."""
    lengths: list[int] = []
    original = Decoder._forward_prompt

    def prompt(decoder: Decoder, token_ids: Any, *others: Any) -> Any:
        lengths.append(len(token_ids))
        return original(decoder, token_ids, *others)

    monkeypatch.setattr(Decoder, "_forward_prompt", prompt)
    return lengths


def test_every_run_has_the_rows_and_the_identity_of_its_own_command(
    sweep, alone, tmp_path: Path, prefilled_prompts, monkeypatch
) -> None:
    loads: list[Path] = []
    load = Checkpoint.load
    monkeypatch.setattr(
        Checkpoint, "load", lambda checkpoint, *more: loads.append(checkpoint.path) or load(checkpoint, *more)
    )
    done = sweep(METHODS, "--out", "out", "--limit_memory", "0.0018")
    assert done.exit_code == 0, done.output
    assert "2 runs, 4 prompts in 1 group;" in done.stderr and "0 queries of each" in done.stderr
    assert "1 runs, 4 prompts in 2 groups;" in done.stderr and "all queries" in done.stderr
    assert len(loads) == 1
    for prompts in (prefilled_prompts[:4], prefilled_prompts[4:]):  # h2o reads all queries
        assert len(prompts) == 4 and prompts == sorted(prompts, reverse=True)
    facts = json.loads((tmp_path / "out" / "tiny.json").read_text())
    means = [fact["run"] for fact in facts["rows"] if fact["name"] == "flat_mean"]
    assert means == NAMES and facts["title"] == "tiny on synthetic rows"
    for name in NAMES:
        assert alone(name, tmp_path / "alone").exit_code == 0
        folder, expected = tmp_path / "pred" / "tiny" / name, tmp_path / "alone" / "tiny" / name
        assert len(rows(expected)) == 2 and rows(folder) == rows(expected)
        ours, theirs = (json.loads((each / "run.json").read_text()) for each in (folder, expected))
        assert ours["identity"] == theirs["identity"] and ours["datasets"] == theirs["datasets"]
        (session,), (own,) = ours["sessions"], theirs["sessions"]
        assert session["shared_prompts"] and session["ended"] and session["cache"].keys() == own["cache"].keys()
        for key in ("prefill_tokens", "decode_tokens"):
            assert session["clock"][key] == own["clock"][key] > 0
        for file in folder.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                row = json.loads(line)
                assert 0 < row["shared_prefill_s"] < row["prefill_s"]
        for other in NAMES[: NAMES.index(name)]:
            assert rows(tmp_path / "alone" / "tiny" / other) != rows(expected)


def test_a_stopped_sweep_is_resumed_by_either_command(
    sweep, alone, tmp_path: Path, prefilled_prompts, monkeypatch
) -> None:
    """Stopped as by SIGKILL: nothing is written after the third row of the second run."""
    step, written = Generator.generate, []

    def stop(engine: Generator, *arguments: Any) -> Any:
        for completion in step(engine, *arguments):
            if len(written) == 4 + 3:
                raise KeyboardInterrupt
            written.append(completion)
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", stop)
        assert sweep(METHODS).exit_code == 130
    kept = [sum(map(len, rows(tmp_path / "pred" / "tiny" / name).values())) for name in NAMES]
    assert kept == [4, 3, 0]
    assert alone(NAMES[2], tmp_path / "pred").exit_code == 0
    prefilled_prompts.clear()
    done = sweep(METHODS)
    assert done.exit_code == 0, done.output
    assert len(prefilled_prompts) == 1
    assert [line.partition(": ")[2].partition(",")[0] for line in done.stdout.splitlines()[:3]] == [
        "finished before",
        "done",
        "finished before",
    ]
    assert alone(NAMES[1], tmp_path / "pred").exit_code == 0 and len(prefilled_prompts) == 1
    assert alone(NAMES[1], tmp_path / "alone").exit_code == 0
    assert rows(tmp_path / "pred" / "tiny" / NAMES[1]) == rows(tmp_path / "alone" / "tiny" / NAMES[1])


def test_a_run_that_fails_leaves_the_others_in_the_table(sweep, tmp_path: Path) -> None:
    Path("broken.py").write_text(BROKEN)
    methods = (
        METHODS.replace(', "infinigen"', "")
        + '[[methods]]\nmethod = "broken.py"\n[[methods]]\nmethod = "streaming"\ndense_layers = [0, 99]\n'
    )
    done = sweep(methods)
    assert done.exit_code == 1
    assert "tiny, streaming-dense_layers=99 failed: Method streaming refuses its options" in done.stderr
    assert "tiny, broken failed: RuntimeError: no such cache" in done.stderr
    assert "Traceback" not in done.output
    assert "RuntimeError: no such cache" in Path("pred/logs/tiny-broken.log").read_text()
    progress, table = done.stdout.split("\n\n", 1)
    assert "see pred/logs/tiny-broken.log. RuntimeError: no such cache" in progress.splitlines()[2]
    head, *lines = table.splitlines()
    assert head == "tiny on synthetic rows" and [line.split()[0] for line in lines[2:5]] == [
        *NAMES[:2],
        "streaming-dense_layers=0",
    ]
    missing = [line for line in lines if line.startswith("Not in the table: ")]
    assert len(missing) == 2 and "tiny broken, which failed" in missing[0] and "must be 0 to 3" in missing[1]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("OutOfMemoryError", "Out of memory. Pass a smaller --limit_memory or --batch_size"),
        ("AcceleratorError", "AcceleratorError: CUDA error: busy\n"),
    ],
)
def test_an_error_of_the_gpu_is_told_without_advice_for_debugging(error, told, sweep) -> None:
    raised = f'__import__("torch").{error}("CUDA error: busy\\nCompile with X")'
    Path("broken.py").write_text(
        BROKEN.replace('RuntimeError("no such cache")', raised)
        .replace("make_cache", "calibration_text")
        .replace("layer, config", "")
    )
    done = sweep('[[methods]]\nmethod = ["broken.py", "vanilla"]')
    assert done.exit_code == 1 and f"tiny, broken failed: {told}" in done.stderr
    assert "Compile" not in done.output and "Compile with X" in Path("pred/logs/tiny-broken.log").read_text()


@pytest.mark.parametrize(
    ("failing", "groups", "reads"),
    [
        (1, ["1 of 2: 0 of 1", "2 of 2: 3 of 3"], 1 + 2 + 3),  # two runs prefill the first prompt
        (2, ["1 of 4: 1 of 1", "4 of 4: 1 of 1"], 2 + 3),
        (4, ["1 of 4: 1 of 1", "4 of 4: 1 of 1"], 4 + 3),
    ],
)
def test_prompts_leave_room_for_the_runs_if_memory_is_short(
    failing, groups, reads, sweep, alone, tmp_path: Path, monkeypatch
) -> None:
    """Another program takes memory when the prompt of this number, of four, is prefilled."""
    original, read = Decoder._forward_prompt, []

    def prompt(decoder: Decoder, token_ids: Any, *others: Any) -> Any:
        read.append(len(token_ids))
        if len(read) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(decoder, token_ids, *others)

    monkeypatch.setattr(Decoder, "_forward_prompt", prompt)
    done = sweep(METHODS.replace(', "infinigen"', ""))
    assert done.exit_code == 0 and "1 of 4 prompts stay in this group" in done.stderr, done.output
    assert len(read) == reads, done.stderr
    assert all(f"group {line} prompts prefilled" in done.stderr for line in groups), done.stderr
    assert alone(NAMES[1], tmp_path / "alone").exit_code == 0
    assert rows(tmp_path / "pred" / "tiny" / NAMES[1]) == rows(tmp_path / "alone" / "tiny" / NAMES[1])


SHORT_SIGHTED = """
from dataclasses import dataclass
from sparsecache.methods.snapkv import SnapKV
@dataclass
class Mine(SnapKV):
    prompt_queries = 4  # its window has 32
"""


def test_what_a_method_of_the_users_states_of_its_queries_is_not_believed(sweep, tiny: Path, tmp_path: Path) -> None:
    Path("mine.py").write_text(SHORT_SIGHTED)
    done = sweep('[[methods]]\nmethod = ["vanilla", "mine.py"]\n', "--limit_memory", "0.0018")
    assert done.exit_code == 0 and "all queries" in done.stderr, done.output
    arguments = ["--model", str(tiny), "--method", "mine.py", "--name", "mine", *ROWS]
    assert CliRunner().invoke(predict_command, [*arguments, "--pred_dir", "alone"]).exit_code == 0
    assert rows(Path("pred/tiny/mine")) == rows(Path("alone/tiny/mine"))


def test_after_an_error_that_ends_the_gpu_no_further_run_starts(sweep, monkeypatch) -> None:
    Path("broken.py").write_text(BROKEN)
    monkeypatch.setattr(shared, "_gpu_works", lambda: False)
    done = sweep('[[methods]]\nmethod = ["broken.py", "vanilla"]')
    assert done.exit_code == 1 and "No run succeeded" in done.stderr
    assert "vanilla: failed, 0 s; see pred/logs/tiny-vanilla.log. The GPU cannot be used since broken" in done.stdout
    assert sweep('[[methods]]\nmethod = "vanilla"').exit_code == 0


def test_data_that_cannot_be_read_end_the_sweep_before_any_run(sweep, tmp_path: Path) -> None:
    done = sweep(METHODS, "--", "--data", str(tmp_path / "nowhere"))
    assert done.exit_code == 2 and done.stderr.startswith("Error: --data ") and not list(Path("pred").glob("*/*/*"))


def test_a_prompt_without_room_is_prefilled_by_every_run(sweep, alone, tmp_path: Path, prefilled_prompts) -> None:
    done = sweep(METHODS.replace(', "infinigen"', ""), "--limit_memory", "1e-6", "--", "--datasets", "lcc")
    assert done.exit_code == 0, done.output
    assert (
        len(prefilled_prompts) == 2 * 2
        and "0 of 1 prompts prefilled" in done.stderr
        and "each run prefills the other 1" in done.stderr
    )
    text = (tmp_path / "pred" / "tiny" / "vanilla" / "lcc.jsonl").read_text()
    assert "shared_prefill_s" not in text


def test_groups_keep_the_order_and_the_limit() -> None:
    assert list(split_by_size([5, 4, 3, 3, 1], lambda size: size, 8)) == [[5], [4, 3], [3, 1]]
    assert list(split_by_size([9, 2], lambda size: size, 8)) == [[9], [2]]
    assert list(split_by_size([], lambda size: size, 8)) == []
