"""What recall.py measures, against transformers' attention and against speculation that cannot be wrong."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsecache.engine.loading import Checkpoint
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import load_tasks
from sparsecache.synthetic.rows import make_rows

ALL = {"method": "infinigen", "budget": 1.0, "alpha": math.inf, "dense_layers": 1}
FEW = {"method": "infinigen", "budget": 16, "alpha": math.inf, "dense_layers": 1, "offload": True, "gpu_cache": 16}
FEW |= {"group": "max"}  # as the reference below


def recorded(folder: Path, beginning: str) -> list[dict[str, Any]]:
    """Rows of the one run whose name begins so."""
    (run,) = (folder / "pred").glob(f"*/{beginning}*")
    return [json.loads(line) for file in sorted(run.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(sweep, tiny: Path) -> Path:
    done, folder = sweep("recall", tiny, ALL, FEW)
    assert done.exit_code == 0, done.output
    return folder


def test_a_selection_of_everything_finds_everything(folder: Path):
    for row in recorded(folder, "infinigen-budget=1.0"):
        last = row["prompt_tokens"] + row["new_tokens"] - 1
        lengths = range(row["prompt_tokens"], last)  # past tokens of each step
        for layer in range(2):
            of = {name: values[layer] for name, values in row["selection_measures"].items()}
            assert [of[name] for name in ("recall", "attention", "best", "kept")] == pytest.approx([1, 1, 1, 1])
            assert of["tokens"] == pytest.approx(sum(lengths) / len(lengths))
            # All but the newest past token were there to be selected the step before.
            later = list(lengths)[1:]
            assert of["overlap"] == pytest.approx(sum(length - 1 for length in later) / sum(later))


def test_all_options_see_the_steps_of_the_full_cache_and_say_so_in_their_identity(folder: Path):
    texts = [[row["pred"] for row in recorded(folder, f"infinigen-budget={budget}")] for budget in ("1.0", "16")]
    assert texts[0] == texts[1] and any(texts[0])
    (record, _) = (json.loads(file.read_text()) for file in (folder / "pred").glob("*/*/run.json"))
    assert record["identity"]["method"] == "infinigen, recorded"


def test_the_best_tokens_have_the_attention_that_transformers_gives_them(folder: Path, tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    prompter = Prompter(Checkpoint(tiny).tokenizer, window=4096)
    tasks = load_tasks()
    rows = {row["_id"]: row for row in recorded(folder, "infinigen-budget=16")}
    for source in (row for name in ("lcc", "qasper") for row in make_rows(name, 2, 256, 0)):
        row, prompt = rows[source["_id"]], prompter.build(tasks[source["dataset"]], source)
        with torch.inference_mode():
            length, steps = len(prompt.token_ids), row["new_tokens"] - 1
            ids = torch.tensor([prompt.token_ids])
            ids = model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
            layers = model(ids, output_attentions=True).attentions[1:]
        for layer, weights in enumerate(layers):
            shares = []
            for at in range(length, length + steps):
                weight = weights[0, :, at, : at + 1]  # [4, at + 1], two heads a KV head
                nearness = (weight[:, :-1] / weight[:, :-1].amax(-1, keepdim=True)).view(2, 2, -1).amax(1)
                best = nearness.topk(16).indices.repeat_interleave(2, 0)
                shares.append(weight.gather(1, best).sum(1).mean() + weight[:, -1].mean())
            assert row["selection_measures"]["best"][layer] == pytest.approx(
                float(torch.stack(shares).mean()), abs=1e-4
            )
            assert row["selection_measures"]["attention"][layer] <= row["selection_measures"]["best"][layer]
            assert 0 < row["selection_measures"]["recall"][layer] < 1


def test_hits_are_those_of_the_gpu_cache_itself(folder: Path):
    """With as many tokens as are selected a step; which of equally recent ones a fuller cache drops is its own."""
    for row in recorded(folder, "infinigen-budget=16"):
        hits = row["selection_measures"]["hit 16"]
        assert sum(hits) / len(hits) == pytest.approx(row["gpu_cache_hit"]) and 0 < row["gpu_cache_hit"] < 1
        assert row["selection_measures"]["tokens"] == [16, 16]
        assert all(few < more for few, more in zip(hits, row["selection_measures"]["hit 128"], strict=True))


def test_an_exact_speculation_selects_what_the_oracle_would(sweep, tiny: Path, tmp_path: Path):
    """Layers that add nothing to the residual stream leave the next layer's query to be speculated exactly."""
    silent = tmp_path / "silent"
    shutil.copytree(tiny, silent)
    weights = load_file(silent / "model.safetensors")
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, silent / "model.safetensors", metadata={"format": "pt"})
    few = {key: value for key, value in FEW.items() if key not in ("offload", "gpu_cache")}
    few |= {"guess": "residual", "partial_bits": 16}
    done, folder = sweep("recall", silent, few | {"partial_weight_ratio": [1.0, 0.125]})
    assert done.exit_code == 0, done.output
    name = "infinigen-budget=16-alpha=inf-dense_layers=1-group=max-guess=residual-partial_bits=16"
    for row in recorded(folder, f"{name}-partial_weight_ratio=1.0"):
        assert row["selection_measures"]["recall"] == pytest.approx([1, 1], abs=0.02)  # ties apart
        assert row["selection_measures"]["attention"] == pytest.approx(row["selection_measures"]["best"], abs=1e-3)
    facts = list(csv.DictReader((folder / "out" / "recall.csv").open()))
    full, partial = (fact for fact in facts if fact["measure"] == "recall")
    assert float(full["layer 1"]) > 98 > float(partial["layer 1"]) > 0 and full["rows"] == "4"


def test_model_and_further_arguments_may_come_from_the_command_line(load_script, sweep_file, tiny: Path, tmp_path):
    file = sweep_file(tmp_path / "missing", {"method": "infinigen", "budget": 16, "skew": False, "dense_layers": 1})
    more = ["--model_name", "renamed", "--datasets", "lcc", "--sample_rows", "1", "--max_new_tokens", "3"]
    arguments = [str(file), "--model", str(tiny), "--pred_dir", str(tmp_path / "pred"), "--", *more]
    done = CliRunner().invoke(load_script("recall").main, arguments)
    assert done.exit_code == 0, done.output
    assert "1 prompts, 2 decode steps" in done.output and (tmp_path / "pred" / "renamed").is_dir()


def test_only_infinigen_can_be_recorded(run_python, repo: Path, sweep_file, tiny: Path):
    file = sweep_file(tiny, {"method": "oracle", "budget": [0.1, 0.2]})
    done = run_python(repo / "scripts" / "recall.py", file, "--pred_dir", file.parent / "pred")
    assert done.returncode == 2 and "oracle: only infinigen" in done.stderr and not (file.parent / "pred").exists()


@pytest.mark.parametrize(("new_tokens", "code"), [("1", 2), ("2", 0)])
def test_measures_that_need_more_steps_are_left_out(load_script, sweep_file, tiny: Path, tmp_path, new_tokens, code):
    """Overlap needs two steps, all measures need one. A warning of numpy would fail this test."""
    file = sweep_file(tiny, {"method": "infinigen", "budget": 16, "skew": False, "dense_layers": 1})
    more = ["--datasets", "lcc", "--sample_rows", "1", "--max_new_tokens", new_tokens]
    done = CliRunner().invoke(
        load_script("recall").main, [str(file), "--pred_dir", str(tmp_path / "pred"), "--", *more]
    )
    assert done.exit_code == code and "nan" not in done.output, done.output
    assert code == 0 or "has no row with a decode step. Give rows with longer answers." in done.stderr
