"""Whole runs: prompts in, rows and run.json out, and what is told on the way."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsecache.engine.loading import Checkpoint
from sparsecache.longbench.tasks import load_tasks
from sparsecache.runner.settings import Settings
from sparsecache.synthetic.rows import make_rows

ROWS = 3  # as conftest.py asks for


def test_a_run_writes_rows_of_exactly_this_schema(predict, folder, read_rows, schema) -> None:
    told = predict("--datasets", "qasper,samsum,lsht")
    assert told.exit_code == 0, told.output
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["lsht.jsonl", "qasper.jsonl", "samsum.jsonl"]
    for dataset in ("qasper", "samsum", "lsht"):
        rows = read_rows(folder / f"{dataset}.jsonl")
        sources = make_rows(dataset, ROWS, 256, 0)
        for row, source in zip(rows, sources, strict=True):
            assert row.keys() == schema.keys()
            assert all(isinstance(row[key], kind) for key, kind in schema.items())
            assert all(row[key] == source[key] for key in ("answers", "all_classes", "length", "_id"))
            assert row["finish_reason"] in ("stop", "length")
            assert 1 <= row["new_tokens"] <= load_tasks()[dataset].max_new_tokens
            assert row["prefill_s"] > 0 and row["decode_s"] >= 0
            assert len(row["prompt_sha256"]) == 64
            assert row["prompt_end"] == load_tasks()[dataset].template.format(**source)[-200:]


@pytest.fixture(scope="session")
def tiny(endless) -> Path:
    """The answers end as the limits of the datasets say."""
    return endless


@pytest.mark.parametrize("dataset", ["qasper", "samsum"])
def test_predictions_are_what_transformers_writes_after_the_filled_template(
    dataset, tiny, predict, folder, read_rows
) -> None:
    predict("--datasets", dataset)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    task = load_tasks()[dataset]
    stops = [tokenizer.eos_token_id]
    if dataset == "samsum":
        stops.append(tokenizer.encode("\n", add_special_tokens=False)[-1])
    texts = set()
    for row, source in zip(read_rows(folder / f"{dataset}.jsonl"), make_rows(dataset, ROWS, 256, 0), strict=True):
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


def test_only_where_a_newline_stops_must_the_first_token_be_no_stop_id(
    predict, folder, tiny, tmp_path, read_rows
) -> None:
    eager = shutil.copytree(tiny, tmp_path / "eager" / "tiny")
    path, spared = eager / "generation_config.json", 700
    stops = [token for token in range(1024) if token != spared]
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stops}))
    assert predict("--model", str(eager), "--datasets", "qasper,samsum").exit_code == 0
    token = AutoTokenizer.from_pretrained(tiny).decode([spared])
    for row in read_rows(folder / "qasper.jsonl"):
        assert (row["new_tokens"], row["finish_reason"]) == (1, "stop")
    for row in read_rows(folder / "samsum.jsonl"):
        assert row["new_tokens"] > 1 and row["pred"].startswith(token)


def test_run_json_says_what_was_run(predict, folder, tiny, read_rows, read_record) -> None:
    predict("--datasets", "qasper,trec", "--max_samples", "2", "--batch_size", "2")
    record = read_record(folder)
    identity = record["identity"]
    assert identity["checkpoint"] == Checkpoint(tiny).fingerprint
    assert (identity["method"], identity["options"], identity["engine"]) == (
        "vanilla",
        {"offload": False},
        "sparsecache",
    )
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
    rows = [row for dataset in ("qasper", "trec") for row in read_rows(folder / f"{dataset}.jsonl")]
    assert session["clock"]["prefill_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert session["clock"]["decode_tokens"] == sum(row["new_tokens"] - 1 for row in rows)
    assert session["clock"]["decode_s"] > 0 and session["clock"]["peak_gpu_bytes"] is None


def test_the_start_and_the_end_are_told(predict, folder, tiny) -> None:
    told = predict()
    for part in (
        f"{tiny} (llama",
        "vanilla (offload=false), float32 on cpu",
        "window 8192",
        "stop tokens: </s> (1)",
        f"{ROWS} of {ROWS}",
    ):
        assert part in told.stdout
    assert "qasper" in told.stdout and "tokens/s" in told.stdout


@pytest.mark.parametrize("engine", ["sparsecache", "transformers"])
def test_a_window_beyond_the_checkpoints_is_refused(engine, predict, forbid_weights) -> None:
    forbid_weights()
    told = predict("--window", "8193", "--engine", engine)
    assert told.exit_code == 2
    assert "Error: --window 8193 is beyond the 8192 tokens that " in told.stderr and "models.toml" in told.stderr


def test_a_max_length_that_the_window_cannot_hold_is_refused(predict, forbid_weights, read_record, folder) -> None:
    longest = 1000 - 128 - 12  # the new tokens of qasper, and the wrapper's
    wrapped = ("--window", "1000", "--chat", "0123456789{prompt}ab", "--max_samples", "1")
    assert predict(*wrapped, "--max_length", str(longest)).exit_code == 0
    forbid_weights()
    for length in (longest + 1, 1000, 10**6):
        told = predict(*wrapped, "--max_length", str(length), "--name", "longer")
        assert told.exit_code == 2
        assert (
            f"--max_length {length} is too long: of the window of 1000 tokens, qasper leaves {longest}" in told.stderr
        )


@pytest.mark.parametrize(("given", "on_gpu", "on_cpu"), [(None, 16, 1), (3, 3, 3)])
def test_how_many_are_decoded_together(given, on_gpu, on_cpu) -> None:
    settings = Settings(batch_size=given)
    assert (settings.slots("cuda"), settings.slots("cpu")) == (on_gpu, on_cpu)
    assert given or Settings(engine="transformers").slots("cuda") == on_gpu


def test_auto_is_a_batch_size(predict, folder, read_record) -> None:
    assert predict("--max_samples", "1", "--batch_size", "auto").exit_code == 0
    assert read_record(folder)["sessions"][0]["batch_size"] == 1
