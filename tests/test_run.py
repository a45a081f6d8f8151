"""Whole runs: rows in, prediction files and run.json out, whatever happens in between."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from longbench_pred import main
from sparsecache.configs import read_tables
from sparsecache.demo.checkpoint import make_random_checkpoint
from sparsecache.demo.sample import make_rows
from sparsecache.engine.loading import Checkpoint
from sparsecache.longbench.records import PredictionFile
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tasks import load_tasks, select_tasks
from sparsecache.methods.vanilla import Vanilla

SCHEMA = {
    "pred": str, "answers": list, "all_classes": list | None, "length": int, "_id": str, "prompt_tokens": int,
    "original_tokens": int, "truncated": bool, "recut_tokens": int, "prompt_sha256": str, "new_tokens": int,
    "finish_reason": str, "prefill_s": float, "decode_s": float,
}  # fmt: skip
TIMES = ("prefill_s", "decode_s")
ROWS = 3


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint that decodes fast and says various things."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny",
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )


@pytest.fixture
def command(tiny, tmp_path) -> Callable[..., list[str]]:
    """A command line over the sample; later options win."""

    def make(*arguments: str) -> list[str]:
        return [
            *("--model", str(tiny), "--datasets", "qasper", "--data", "sample", "--sample_rows", str(ROWS)),
            *("--sample_tokens", "256", "--device", "cpu", "--pred_dir", str(tmp_path / "pred"), *arguments),
        ]

    return make


@pytest.fixture
def predict(command) -> Callable[..., Result]:
    """Runs the command line in this process."""
    return lambda *arguments: CliRunner().invoke(main, command(*arguments))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the run lies."""
    return tmp_path / "pred" / "tiny" / "vanilla"


def _rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_text(encoding="utf-8")
    assert content.endswith("\n")
    return [json.loads(line) for line in content[:-1].split("\n")]


def _untimed(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in _rows(path)]


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def _no_weights(monkeypatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load", refuse)


def test_a_run_writes_rows_of_exactly_this_schema(predict, folder) -> None:
    told = predict("--datasets", "qasper,samsum,lsht")
    assert told.exit_code == 0, told.output
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["lsht.jsonl", "qasper.jsonl", "samsum.jsonl"]
    for dataset in ("qasper", "samsum", "lsht"):
        rows = _rows(folder / f"{dataset}.jsonl")
        sources = make_rows(dataset, ROWS, 256, 0)
        for row, source in zip(rows, sources, strict=True):
            assert row.keys() == SCHEMA.keys()
            assert all(isinstance(row[key], kind) for key, kind in SCHEMA.items())
            assert all(row[key] == source[key] for key in ("answers", "all_classes", "length", "_id"))
            assert row["finish_reason"] in ("stop", "length")
            assert 1 <= row["new_tokens"] <= load_tasks()[dataset].max_new_tokens
            assert row["prefill_s"] > 0 and row["decode_s"] >= 0
            assert len(row["prompt_sha256"]) == 64


@pytest.mark.parametrize("dataset", ["qasper", "samsum"])
def test_predictions_are_what_transformers_writes_after_the_filled_template(dataset, tiny, predict, folder) -> None:
    predict("--datasets", dataset)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    task = load_tasks()[dataset]
    stops = [tokenizer.eos_token_id]
    if dataset == "samsum":
        stops.append(tokenizer.encode("\n", add_special_tokens=False)[-1])
    texts = set()
    for row, source in zip(_rows(folder / f"{dataset}.jsonl"), make_rows(dataset, ROWS, 256, 0), strict=True):
        prompt = tokenizer(task.template.format(**source), return_tensors="pt").input_ids
        out = model.generate(
            prompt,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            min_new_tokens=1 if dataset == "samsum" else None,
            eos_token_id=stops,
        )[0, prompt.shape[1] :].tolist()
        assert row["pred"] == tokenizer.decode(out, skip_special_tokens=True)
        assert (row["new_tokens"], row["prompt_tokens"]) == (len(out), prompt.shape[1])
        assert row["finish_reason"] == ("stop" if out[-1] in stops else "length")
        texts.add(row["pred"])
    assert len(texts) == ROWS


def test_only_where_a_newline_stops_must_the_first_token_be_no_stop_id(predict, folder, tiny, tmp_path) -> None:
    eager = shutil.copytree(tiny, tmp_path / "eager" / "tiny")
    path, spared = eager / "generation_config.json", 700
    stops = [token for token in range(1024) if token != spared]
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stops}))
    assert predict("--model", str(eager), "--datasets", "qasper,samsum").exit_code == 0
    token = AutoTokenizer.from_pretrained(tiny).decode([spared])
    for row in _rows(folder / "qasper.jsonl"):
        assert (row["new_tokens"], row["finish_reason"]) == (1, "stop")
    for row in _rows(folder / "samsum.jsonl"):
        assert row["new_tokens"] > 1 and row["pred"].startswith(token)


def test_run_json_says_what_was_run(predict, folder, tiny) -> None:
    predict("--datasets", "qasper,trec", "--max_samples", "2", "--batch_size", "2")
    record = _record(folder)
    identity = record["identity"]
    assert identity["checkpoint"] == Checkpoint(tiny).fingerprint
    assert (identity["method"], identity["options"], identity["engine"]) == ("vanilla", {}, "sparsecache")
    assert (identity["dtype"], identity["window"], identity["max_length"]) == ("float32", 8192, None)
    assert (identity["chat"], identity["stop_ids"]) == ("none", [1])
    for table in ("templates", "protocol", "data"):
        assert identity[table].keys() == {"qasper", "trec"}
    assert identity["templates"]["trec"] == load_tasks()["trec"].template_sha256
    assert record["datasets"] == {"qasper": {"expected_rows": 2}, "trec": {"expected_rows": 2}}
    model = record["model"]
    assert (model["name"], model["path"], model["model_type"]) == ("tiny", str(tiny), "llama")
    assert model["stop_tokens"] == ["</s>"]
    (session,) = record["sessions"]
    assert session["argv"] == sys.argv
    assert {"python", "torch", "transformers", "sparsecache"} <= session["versions"].keys()
    assert session["versions"]["torch"] == torch.__version__ or "+" in torch.__version__
    assert session["started"] <= session["ended"]
    assert (session["device"], session["gpu"], session["batch_size"], session["max_samples"]) == ("cpu", None, 2, 2)
    assert session["data"] == {"source": "sample", "rows": ROWS, "tokens": 256, "seed": 0}
    rows = [row for dataset in ("qasper", "trec") for row in _rows(folder / f"{dataset}.jsonl")]
    assert session["clock"]["prefill_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)
    assert session["clock"]["decode_s"] > 0 and session["clock"]["peak_gpu_bytes"] is None


def test_the_start_and_the_end_are_told(predict, folder, tiny) -> None:
    told = predict()
    for part in (
        f"{tiny} (llama",
        "vanilla (no options), float32 on cpu",
        "window 8192",
        "1 </s>",
        f"{ROWS} of {ROWS}",
    ):
        assert part in told.stdout
    assert "qasper" in told.stdout and "tokens/s" in told.stdout


def test_a_second_run_does_nothing_and_loads_no_weights(predict, folder, monkeypatch) -> None:
    assert predict().exit_code == 0
    before, record = (folder / "qasper.jsonl").read_bytes(), _record(folder)
    _no_weights(monkeypatch)
    told = predict()
    assert told.exit_code == 0, told.output
    assert f"0 of {ROWS} to do" in told.stdout
    assert (folder / "qasper.jsonl").read_bytes() == before and _record(folder) == record
    (folder / "qasper.jsonl").unlink()
    assert isinstance(predict().exception, AssertionError)  # and here it would have


def test_more_samples_extend_a_run_and_fewer_leave_it(predict, folder, tmp_path) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    first = _rows(folder / "qasper.jsonl")
    assert len(first) == _record(folder)["datasets"]["qasper"]["expected_rows"] == 1
    assert predict("--max_samples", "2").exit_code == 0
    assert predict().exit_code == 0
    rows = _rows(folder / "qasper.jsonl")
    assert rows[0] == first[0] and [row["_id"] for row in rows] == [r["_id"] for r in make_rows("qasper", ROWS, 256, 0)]
    assert _record(folder)["datasets"]["qasper"]["expected_rows"] == ROWS
    assert predict("--max_samples", "1").exit_code == 0
    assert _rows(folder / "qasper.jsonl") == rows
    assert _record(folder)["datasets"]["qasper"]["expected_rows"] == ROWS
    assert predict("--name", "whole").exit_code == 0
    assert _untimed(folder.parent / "whole" / "qasper.jsonl") == _untimed(folder / "qasper.jsonl")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--max_length", "200"], ["max_length was null, now 200"]),
        (["--window", "4000"], ["window was 8192, now 4000"]),
        (["--dtype", "bfloat16"], ['dtype was "float32", now "bfloat16"']),
        (["--engine", "transformers"], ['engine was "sparsecache", now "transformers"']),
        (["--sample_seed", "1"], ["data of qasper was ", ", now "]),
    ],
    ids=lambda value: value[0],
)
def test_another_identity_is_refused_with_both_values(changes, parts, predict, folder, monkeypatch) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    _no_weights(monkeypatch)
    told = predict("--max_samples", "2", *changes)
    assert told.exit_code == 2
    assert all(part in told.stderr for part in (*parts, str(folder), "--name", "--overwrite"))
    assert (folder / "qasper.jsonl").read_bytes() == before


def test_another_checkpoint_under_the_same_name_is_refused(predict, folder, tiny, tmp_path) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    other = make_random_checkpoint(tmp_path / "other" / "tiny", seed=5, num_hidden_layers=1)
    told = predict("--model", str(other))
    assert told.exit_code == 2
    assert Checkpoint(tiny).fingerprint in told.stderr and Checkpoint(other).fingerprint in told.stderr


def test_batch_and_device_are_no_identity_and_the_batch_changes_no_text(predict, folder) -> None:
    arguments = ("--datasets", "qasper,samsum", "--sample_rows", "5")
    assert predict(*arguments, "--max_samples", "1").exit_code == 0
    assert predict(*arguments, "--batch_size", "3", "--device", "auto").exit_code == 0
    assert predict(*arguments, "--name", "alone").exit_code == 0
    for dataset in ("qasper", "samsum"):
        places = (folder, folder.parent / "alone")
        batched, alone = ({row["_id"]: row for row in _untimed(place / f"{dataset}.jsonl")} for place in places)
        assert batched == alone and len(alone) == 5


def test_overwrite_starts_afresh(predict, folder) -> None:
    assert predict("--datasets", "qasper,trec").exit_code == 0
    (folder / "result.json").write_text("{}")
    told = predict("--max_length", "200", "--overwrite")
    assert told.exit_code == 0
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"qasper.jsonl", "run.json"}
    assert _record(folder)["identity"]["max_length"] == 200 and len(_record(folder)["sessions"]) == 1
    assert all(row["truncated"] for row in _rows(folder / "qasper.jsonl"))


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(predict, folder, tiny, tmp_path) -> None:
    assert predict().exit_code == 0
    before = (folder / "qasper.jsonl").read_bytes()
    pickled = shutil.copytree(tiny, tmp_path / "elsewhere" / "tiny")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for arguments in (["--window", "100"], ["--model", str(pickled)], ["--data", "nowhere"], ["--device", "cuda:99"]):
        assert predict(*arguments, "--overwrite").exit_code == 2
        assert (folder / "qasper.jsonl").read_bytes() == before


def test_a_dataset_that_is_being_written_is_refused_and_another_is_not(predict, folder) -> None:
    assert predict("--max_samples", "1").exit_code == 0
    with PredictionFile(folder / "qasper.jsonl"):
        told = predict()
        assert told.exit_code == 2
        assert "qasper.jsonl is being written by another process" in told.stderr
        assert predict("--overwrite").exit_code == 2
        assert predict("--datasets", "trec").exit_code == 0
    assert predict().exit_code == 0
    assert len(_rows(folder / "qasper.jsonl")) == ROWS


DRIVER = """
import json, os, pathlib, sys, traceback
import torch
torch.set_num_threads(1)
import longbench_pred, sparsecache.demo.sample, sparsecache.run
from sparsecache.engine.loading import Checkpoint

args = json.loads(sys.argv[1])
Checkpoint(pathlib.Path(args[0])).tokenizer  # all is imported once; every child starts with it

def start(arguments):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 70
    try:
        longbench_pred.main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
"""


def _drive(script: str, model: Path, *arguments: Any, repo: Path) -> Any:
    """Runs DRIVER and then `script`, which prints one line of JSON; `args` are the model and the arguments."""
    told = subprocess.run(
        [sys.executable, "-c", DRIVER + script, json.dumps([str(model), *arguments])],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def test_two_processes_fill_one_run_at_once(command, folder, predict, tiny, repo) -> None:
    commands = [command("--datasets", dataset, "--sample_rows", "8") for dataset in ("qasper", "trec,lcc")]
    codes = _drive(
        """
children = [start(arguments) for arguments in args[1]]
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
""",
        tiny,
        commands,
        repo=repo,
    )
    assert codes == [0, 0]
    record = _record(folder)
    assert record["datasets"] == {name: {"expected_rows": 8} for name in ("qasper", "trec", "lcc")}
    assert record["identity"]["data"].keys() == {"qasper", "trec", "lcc"}
    first, second = sorted(record["sessions"], key=lambda session: session["started"])
    assert first["ended"] and second["ended"] and first["id"] != second["id"]
    assert predict("--datasets", "qasper,trec,lcc", "--sample_rows", "8", "--name", "alone").exit_code == 0
    for dataset in ("qasper", "trec", "lcc"):
        assert _untimed(folder / f"{dataset}.jsonl") == _untimed(folder.parent / "alone" / f"{dataset}.jsonl")


def test_a_run_killed_at_random_times_ends_in_the_file_of_an_uninterrupted_one(
    command, folder, predict, tiny, repo
) -> None:
    arguments = ("--datasets", "qasper,samsum,lcc", "--sample_rows", "20")
    seed = random.randrange(10**6)
    code, kills, seen = _drive(
        """
import random, signal, time
_, arguments, seed, folder = args
draw, kills, seen = random.Random(seed), 0, []
while True:
    child, began = start(arguments), time.monotonic()
    patience = draw.uniform(0.02, 0.4) * 1.05**kills
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() - began > patience:
            break
        time.sleep(0.002)
    if done:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    files = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    seen.append(sum(open(path, "rb").read().count(b"\\n") for path in files if path.endswith(".jsonl")))
print(json.dumps([os.waitstatus_to_exitcode(status), kills, seen]))
""",
        tiny,
        command(*arguments),
        seed,
        str(folder),
        repo=repo,
    )
    assert code == 0 and kills >= 3, (seed, seen)
    assert seen == sorted(seen) and any(0 < rows < 60 for rows in seen), (seed, seen)
    assert predict(*arguments, "--name", "whole").exit_code == 0
    for dataset in ("qasper", "samsum", "lcc"):
        assert _untimed(folder / f"{dataset}.jsonl") == _untimed(folder.parent / "whole" / f"{dataset}.jsonl"), seed
        assert len({row["_id"] for row in _rows(folder / f"{dataset}.jsonl")}) == 20
    record = _record(folder)
    assert record["identity"] == _record(folder.parent / "whole")["identity"]
    assert record["datasets"] == _record(folder.parent / "whole")["datasets"]
    assert len([session for session in record["sessions"] if session["ended"]]) <= 1  # the last, or it had no rows left


def test_an_interrupt_keeps_finished_rows_and_says_how_to_go_on(command, folder, predict, repo) -> None:
    arguments = ("--sample_rows", "400")
    path = folder / "qasper.jsonl"
    process = subprocess.Popen(
        [sys.executable, repo / "longbench_pred.py", *command(*arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (path.exists() and path.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Stopped. Finished rows are kept" in stderr and "Traceback" not in stderr
    kept = _rows(path)
    assert 2 < len(kept) < 400
    assert predict(*arguments, "--max_samples", str(len(kept) + 2)).exit_code == 0
    assert _rows(path)[: len(kept)] == kept and len(_rows(path)) == len(kept) + 2


@pytest.mark.parametrize("error", [RuntimeError("broken"), torch.OutOfMemoryError("out of memory")], ids=repr)
@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_failed_row_is_recorded_and_retried_by_the_next_run(error, batch_size, predict, folder, monkeypatch) -> None:
    whole = Vanilla.prefill
    calls = iter(range(100))

    def fail_second(self, *arguments: Any) -> None:
        if next(calls) == 1:
            raise error
        whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Vanilla, "prefill", fail_second)
        told = predict("--batch_size", batch_size)
    assert told.exit_code == 1
    ids = [row["_id"] for row in make_rows("qasper", ROWS, 256, 0)]
    rows = {row["_id"]: row for row in _rows(folder / "qasper.jsonl")}
    assert list(rows) != [] and rows.keys() == set(ids)
    failed = rows[ids[1]]
    assert failed["error"] == f"{type(error).__name__}: {error}"
    assert failed["pred"] == "" and failed["answers"] and "new_tokens" not in failed
    good = {key: row for key, row in rows.items() if key != ids[1]}
    assert not any("error" in row for row in good.values())

    told = predict("--batch_size", batch_size)
    assert told.exit_code == 0 and f"1 of {ROWS} to do" in told.stdout
    rows = {row["_id"]: row for row in _rows(folder / "qasper.jsonl")}
    assert len(_rows(folder / "qasper.jsonl")) == ROWS
    assert {key: rows[key] for key in good} == good
    assert "error" not in rows[ids[1]] and rows[ids[1]].keys() == SCHEMA.keys()


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, Exception])
@pytest.mark.parametrize("verify", ["0", "2"])
def test_a_row_that_makes_no_prompt_is_one_error_row(verify, error, predict, folder, monkeypatch) -> None:
    from sparsecache.longbench.prompts import Prompter

    whole = Prompter.build
    bad = make_rows("qasper", ROWS, 256, 0)[1]["_id"]

    def build(self: Prompter, task: Any, row: dict[str, Any]) -> Any:
        if row["_id"] == bad:
            raise error("no such character")
        return whole(self, task, row)

    monkeypatch.setattr(Prompter, "build", build)
    told = predict("--verify", verify)
    assert told.exit_code == 1
    rows = _rows(folder / "qasper.jsonl")
    assert sorted(row["_id"] for row in rows) == sorted(row["_id"] for row in make_rows("qasper", ROWS, 256, 0))
    (failed,) = (row["error"] for row in rows if "error" in row)
    assert failed.startswith(f"{error.__name__}: ") and "no such character" in failed
    assert "verify" not in told.stdout or "1 of 1 prompts" in told.stdout  # of the two it skips the bad one


def test_the_transformers_engine_gives_the_same_rows(predict, folder) -> None:
    arguments = ("--datasets", "qasper,samsum,vcsum", "--max_samples", "2")
    assert predict(*arguments).exit_code == 0
    assert predict(*arguments, "--engine", "transformers", "--name", "theirs").exit_code == 0
    for dataset in ("qasper", "samsum", "vcsum"):
        assert _untimed(folder / f"{dataset}.jsonl") == _untimed(folder.parent / "theirs" / f"{dataset}.jsonl")
    assert _record(folder.parent / "theirs")["identity"]["engine"] == "transformers"


def test_verify_compares_first_and_counts_only_the_runs_own_tokens(predict, folder) -> None:
    told = predict("--datasets", "qasper,trec", "--verify", "4")
    assert told.exit_code == 0
    assert "verify: 4 of 4 prompts give the text of transformers." in told.stdout
    (session,) = _record(folder)["sessions"]
    assert session["verify"] == {"prompts": 4, "differing": []}
    rows = [row for dataset in ("qasper", "trec") for row in _rows(folder / f"{dataset}.jsonl")]
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)


def test_verify_says_where_texts_part(predict, folder, monkeypatch) -> None:
    whole = Vanilla.attend
    steps = iter(range(10**6))

    def lie(self: Vanilla, *arguments: Any) -> torch.Tensor:
        return whole(self, *arguments) * (1 if next(steps) < 5 else -3)

    monkeypatch.setattr(Vanilla, "attend", lie)
    told = predict("--verify", "1")
    (session,) = _record(folder)["sessions"]
    (difference,) = session["verify"]["differing"]
    assert difference["_id"] == make_rows("qasper", 1, 256, 0)[0]["_id"] and difference["dataset"] == "qasper"
    assert difference["first_differing_token"] >= 6
    assert f"texts part at new token {difference['first_differing_token']}" in told.stdout
    assert "verify: 0 of 1 prompts" in told.stdout


def test_verify_takes_the_first_wanted_rows_also_of_a_finished_run(predict, folder, monkeypatch) -> None:
    assert predict("--datasets", "qasper,trec").exit_code == 0
    before = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("qasper", "trec")}
    asked = _record_generations(monkeypatch)
    told = predict("--datasets", "qasper,trec", "--max_samples", "2", "--verify", "3")
    assert told.exit_code == 0, told.output
    assert "verify: 3 of 3 prompts give the text of transformers." in told.stdout
    assert _record(folder)["sessions"][-1]["verify"] == {"prompts": 3, "differing": []}
    ids = [row["_id"] for name, rows in (("qasper", 2), ("trec", 1)) for row in make_rows(name, rows, 256, 0)]
    assert [(engine, row) for engine, rows in asked for row in rows] == [
        *(("TransformersEngine", row) for row in ids),
        *(("Generator", row) for row in ids),
    ]
    assert {name: (folder / f"{name}.jsonl").read_bytes() for name in before} == before
    clock = _record(folder)["sessions"][-1]["clock"]
    assert (clock["prefill_tokens"], clock["decode_tokens"]) == (0, 0)


def _record_generations(monkeypatch) -> list[tuple[str, list[str]]]:
    """Every call of an engine that was asked for something, as its class and the rows' ids."""
    from sparsecache.engine.generator import Generator
    from sparsecache.engine.reference import TransformersEngine

    asked: list[tuple[str, list[str]]] = []
    for kind in (TransformersEngine, Generator):

        def generate(self: Any, requests: Any, *arguments: Any, whole: Any = kind.generate) -> Any:
            if known := list(requests):
                asked.append((type(self).__name__, [request.key[0]["_id"] for request in known]))
            return whole(self, known, *arguments)

        monkeypatch.setattr(kind, "generate", generate)
    return asked


def test_a_condensed_rope_is_decoded_alike_by_both_engines(predict, tiny, tmp_path) -> None:
    longchat = shutil.copytree(tiny, tmp_path / "longchat")
    config = json.loads((longchat / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": parameters["rope_theta"], "rope_condense_ratio": 8}
    (longchat / "config.json").write_text(json.dumps(config))
    told = predict("--model", str(longchat), "--verify", "3")
    assert told.exit_code == 0, told.output
    assert "verify: 3 of 3 prompts" in told.stdout
    assert predict().exit_code == 0
    texts = [
        [row["pred"] for row in _rows(tmp_path / "pred" / name / "vanilla" / "qasper.jsonl")]
        for name in ("longchat", "tiny")
    ]
    assert texts[0] != texts[1]


def test_a_run_that_is_killed_has_its_clock_so_far_on_record(predict, folder, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.run._SAVE_EVERY_S", 0.0)
    whole = PredictionFile.append
    calls = iter(range(100))

    def append(self: PredictionFile, record: dict[str, Any]) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        whole(self, record)

    monkeypatch.setattr(PredictionFile, "append", append)
    assert predict().exit_code == 130
    rows = _rows(folder / "qasper.jsonl")
    (session,) = _record(folder)["sessions"]
    assert len(rows) == 2 and session["ended"] is None
    assert session["clock"]["prefill_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)


def test_beyond_the_checkpoints_window_is_warned_of(predict) -> None:
    told = predict("--window", "9000", "--max_samples", "1")
    assert told.exit_code == 0
    assert "Warning: --window 9000 is beyond the 8192 tokens" in told.stderr
    assert "beyond" not in predict("--window", "8000", "--max_samples", "1", "--name", "within").stderr


@pytest.fixture
def add_method(tmp_path, monkeypatch) -> Iterator[Callable[[str], Any]]:
    """Puts `mine.py` beside the methods for one test: a class Mine(Vanilla) with this body; returns the module."""
    import sparsecache.methods

    home = tmp_path / "methods"
    home.mkdir()
    monkeypatch.setattr(sparsecache.methods, "__path__", [*sparsecache.methods.__path__, str(home)])

    def add(body: str) -> Any:
        head = "from sparsecache.methods.vanilla import Vanilla as Base\n\n\nclass Mine(Base):\n"
        (home / "mine.py").write_text(head + textwrap.indent(textwrap.dedent(body), "    "))
        return importlib.import_module("sparsecache.methods.mine")

    yield add
    sys.modules.pop("sparsecache.methods.mine", None)


def test_a_method_of_ones_own_runs_by_its_file_name_and_its_options_are_recorded(predict, folder, add_method) -> None:
    add_method("""
        def __init__(self, budget: int = 64, share: float = 0.5):
            self.budget = budget

        def report(self, slot):
            return {"kept": self.budget}
    """)
    assert predict("--method", "mine", "-o", "budget=64").exit_code == 0
    assert _record(folder.parent / "mine")["identity"]["options"] == {"budget": 64, "share": 0.5}
    assert {row["kept"] for row in _rows(folder.parent / "mine" / "qasper.jsonl")} == {64}
    assert predict("--method", "mine").exit_code == 0  # the default, said or not, is the same run
    told = predict("--method", "mine", "-o", "budget=65")
    assert told.exit_code == 2
    assert '"budget": 64' in told.stderr and '"budget": 65' in told.stderr


@pytest.mark.parametrize(
    ("report", "error"),
    [
        ({"pred": "yes", "length": 3, "kept": 1}, "the method reports length, pred, which the record has already"),
        ({"new_tokens": 3}, "the method reports new_tokens"),
        ({"prompt_sha256": ""}, "the method reports prompt_sha256"),
        ({"kept": float("nan")}, "ValueError"),
        ({"kept": torch.tensor(3)}, "TypeError"),
        ({"kept": {1, 2}}, "TypeError"),
        ({("kept", 1): 2}, "TypeError"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_report_that_cannot_be_recorded_is_an_error_row_and_the_run_goes_on(
    report, error, batch_size, predict, folder, add_method
) -> None:
    kind = add_method("def report(self, slot):\n    return {}").Mine
    calls = iter(range(100))
    kind.report = lambda self, slot: report if next(calls) == 1 else {"kept": 1}
    assert predict("--method", "mine", "--batch_size", batch_size).exit_code == 1
    rows = _rows(folder.parent / "mine" / "qasper.jsonl")
    assert len(rows) == ROWS
    (failed,) = (row for row in rows if "error" in row)
    assert error in failed["error"] and "\n" not in failed["error"]
    source = next(row for row in make_rows("qasper", ROWS, 256, 0) if row["_id"] == failed["_id"])
    assert (failed["pred"], failed["length"], failed["answers"]) == ("", source["length"], source["answers"])
    assert "kept" not in failed and "new_tokens" not in failed
    kind.report = lambda self, slot: {"kept": 1}
    told = predict("--method", "mine", "--batch_size", batch_size)
    assert told.exit_code == 0 and f"1 of {ROWS} to do" in told.stdout
    rows = _rows(folder.parent / "mine" / "qasper.jsonl")
    assert len(rows) == ROWS and all(row.keys() == {*SCHEMA, "kept"} for row in rows)


def test_a_text_that_cannot_be_decoded_is_an_error_row_and_the_run_goes_on(predict, folder, monkeypatch) -> None:
    whole = PreTrainedTokenizerFast.decode
    calls = iter(range(100))

    def decode(self: Any, *arguments: Any, **options: Any) -> str:
        if next(calls) == 1:
            raise OverflowError("no such token")
        return whole(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "decode", decode)
        assert predict().exit_code == 1
    rows = _rows(folder / "qasper.jsonl")
    assert len(rows) == ROWS
    assert [row.get("error") for row in rows] == [None, "OverflowError: no such token", None]
    assert predict().exit_code == 0


def test_a_calibration_text_is_shown_to_the_method_before_the_first_prompt(predict, folder, tiny, add_method) -> None:
    module = add_method("""
        seen = []

        def calibration_text(self):
            return "The lighthouse keeper counted the ships."

        def calibrate(self, layer, q):
            self.seen.append(("calibrate", layer, tuple(q.shape)))

        def prefill(self, layer, *arguments):
            self.seen.append(("prefill", layer))
            super().prefill(layer, *arguments)
    """)
    assert predict("--method", "mine").exit_code == 0
    text = module.Mine().calibration_text()
    length = len(AutoTokenizer.from_pretrained(tiny)(text)["input_ids"])
    assert module.Mine.seen == [("calibrate", 0, (2, length, 16)), *[("prefill", 0)] * ROWS]
    assert predict().exit_code == 0
    assert _untimed(folder.parent / "mine" / "qasper.jsonl") == _untimed(folder / "qasper.jsonl")
    clocks = [_record(place)["sessions"][0]["clock"] for place in (folder, folder.parent / "mine")]
    assert clocks[0]["prefill_tokens"] == clocks[1]["prefill_tokens"]


@pytest.fixture
def own_dataset(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts a table [mine] into datasets.toml and makes a folder with its rows."""

    def make(**changes: Any) -> Path:
        rows = [{**row, "dataset": "mine"} for row in make_rows("qasper", ROWS, 256, 0)]
        table = {"template": "{context}\n{input}", "max_new_tokens": 8, "metric": "token_f1", **changes}
        tables = {**read_tables("datasets.toml"), "mine": {**table, "category": "few_shot", "language": "en"}}
        monkeypatch.setattr("sparsecache.longbench.tasks.read_tables", lambda name: tables)
        folder = tmp_path / "rows"
        folder.mkdir()
        (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


def test_a_dataset_of_ones_own_runs_and_is_scored_with_any_number_of_rows(predict, folder, own_dataset) -> None:
    arguments = ("--datasets", "mine", "--data", str(own_dataset()))
    told = predict(*arguments)
    assert told.exit_code == 0, told.output
    assert [row["_id"] for row in _rows(folder / "mine.jsonl")] == [
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
    changes, message, predict, folder, own_dataset, monkeypatch
) -> None:
    _no_weights(monkeypatch)
    told = predict("--datasets", "mine", "--data", str(own_dataset(**changes)))
    assert told.exit_code == 2
    assert told.stderr.startswith("Error: ") and message in told.stderr and "configs/datasets.toml" in told.stderr
    assert not list(folder.glob("*.jsonl"))


def _predict_real_rows(model: Path, raw: Path, pred_dir: Path, device: str, e: bool) -> None:
    where = ["--model", str(model), "--data", str(raw), "--pred_dir", str(pred_dir), "--device", device]
    what = ["--datasets", "all", "--window", "8192", "--dtype", "float32", *(["--e"] if e else [])]
    told = CliRunner().invoke(main, [*where, *what])
    assert told.exit_code == 0, told.output
    tasks = select_tasks("all", e)
    assert len(tasks) == (13 if e else 21)
    for task in tasks:
        rows = _rows(pred_dir / "tiny" / "vanilla" / f"{task.file_stem(e)}.jsonl")
        sources = [
            json.loads(line) for line in (raw / f"{task.file_stem(e)}.jsonl").read_bytes().split(b"\n") if line.strip()
        ]
        assert [row["_id"] for row in rows] == [source["_id"] for source in sources]
        for row in rows:
            assert row.keys() == SCHEMA.keys()
            assert row["prompt_tokens"] + task.max_new_tokens <= 8192
            assert row["truncated"] == (row["original_tokens"] + task.max_new_tokens > 8192)


@pytest.mark.parametrize("e", [False, True], ids=["LongBench", "LongBench-E"])
def test_all_real_rows_go_from_file_to_prediction_row(e, tiny, fixtures_dir, tmp_path) -> None:
    _predict_real_rows(tiny, fixtures_dir / "raw", tmp_path, "cpu", e)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("e", [False, True], ids=["LongBench", "LongBench-E"])
def test_all_real_rows_go_from_file_to_prediction_row_on_a_gpu(e, tiny, fixtures_dir, tmp_path) -> None:
    _predict_real_rows(tiny, fixtures_dir / "raw", tmp_path, "cuda", e)
