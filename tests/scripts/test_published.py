"""The sweeps of docs/published.md, on small random checkpoints in folders of the real ones' names."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from sparsecache.longbench.tasks import load_tasks, select_tasks
from sparsecache.testing.random_checkpoint import make_random_checkpoint

LLAMA_31 = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LONGCHAT = {
    "num_key_value_heads": 4, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
}  # fmt: skip
LONGER_THAN = 900  # tokens, in place of 4,096


@pytest.fixture(scope="module")
def rows(load_script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    arguments = ["--out", str(folder), "--rows", "1", "--tokens", "512"]
    done = CliRunner().invoke(load_script("write_sample").main, arguments)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return stand_in(tmp_path_factory.mktemp("models"), "llama-3.1-8b-instruct", LLAMA_31)


def stand_in(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """A checkpoint of the real one's configuration with three narrow layers, and with a chat template."""
    checkpoint = make_random_checkpoint(folder / name, **{"num_hidden_layers": 3, "head_dim": 128, **config})
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m['content'] }}[/]{% endfor %}")
    return checkpoint


def run_sweep(sweep: ModuleType, file: Path, checkpoint: Path, rows: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run a sweep over the rows, three new tokens each; return the lines of the first dataset, by run."""
    arguments = [str(file), "--model", str(checkpoint), "--pred_dir", str(out / "pred"), "--out", str(out), "--"]
    arguments += ["--data", str(rows), "--max_new_tokens", "3", "--batch_size", "16", *more]
    done = CliRunner().invoke(sweep.main, arguments)
    assert done.exit_code == 0, done.output
    first, *others = json.loads((out / f"{checkpoint.name}.json").read_text())["rows"]
    lines = [first, *(line for line in others if line["name"] == first["name"])]
    assert [line["run"] for line in lines] == [run.name for run in sweep.read_sweep(file, [str(checkpoint)])[0]]
    return {line["run"]: line for line in lines}


def test_rows_longer_than_a_limit_are_those_that_tokenizers_counts(load_script, llama, rows, tmp_path) -> None:
    """Also of a family that only transformers runs."""
    chosen, glm = tmp_path / "chosen", tmp_path / "glm-4-9b-chat-1m-hf"
    shutil.copytree(llama, glm)
    config = json.loads((glm / "config.json").read_text())
    (glm / "config.json").write_text(json.dumps({**config, "model_type": "glm", "architectures": ["GlmForCausalLM"]}))
    arguments = ["--model", str(glm), "--data", str(rows), "--longer_than"]
    names = ["--datasets", "qasper,hotpotqa,dureader,trec,lcc"]
    done = CliRunner().invoke(
        load_script("select_rows").main, [*arguments, str(LONGER_THAN), "--out", str(chosen), *names]
    )
    assert done.exit_code == 0, done.output
    tokenizer = Tokenizer.from_file(str(glm / "tokenizer.json"))
    tasks, lengths = load_tasks(), {}
    for name in names[1].split(","):
        (row,) = map(json.loads, (rows / f"{name}.jsonl").read_text().splitlines())
        lengths[name] = len(tokenizer.encode(tasks[name].template.format(**row)).ids)
    longer = {name for name, length in lengths.items() if length > LONGER_THAN}
    assert {file.stem for file in chosen.iterdir()} == longer and 0 < len(longer) < len(lengths), lengths
    for name in longer:
        source, copied = (json.loads((folder / f"{name}.jsonl").read_text()) for folder in (rows, chosen))
        assert copied == source
    done = CliRunner().invoke(
        load_script("select_rows").main, [*arguments, "99999", "--out", str(tmp_path / "none"), *names]
    )
    assert done.exit_code == 2 and "No prompt is longer than 99999 tokens" in done.output
    assert not (tmp_path / "none").exists()


def test_shadowkv_with_the_chat_template(load_script, repo, llama, rows, tmp_path) -> None:
    sweep, file = load_script("sweep"), repo / "configs/sweeps/shadowkv-table1.toml"
    assert len(select_tasks(sweep.read_sweep(file)[1][1])) == 9
    lines = run_sweep(sweep, file, llama, rows, tmp_path, "--datasets", "hotpotqa,lcc")
    sparse = [line for line in lines.values() if line["method"] != "vanilla"]
    assert {line["kept"] for line in sparse} == {sparse[0]["kept"]} and 0 < sparse[0]["kept"] < 1
    ends = {json.loads(file.read_text())["prompt_end"][-3:] for file in tmp_path.glob("pred/*/vanilla/hotpotqa.jsonl")}
    assert ends == {"[/]"}, "the chat template wraps the prompt"


def test_starc_with_the_settings_of_longchat(load_script, repo, rows, tmp_path) -> None:
    checkpoint, file = stand_in(tmp_path, "longchat-v1.5-7b-32k", LONGCHAT), repo / "configs/sweeps/starc.toml"
    assert load_script("sweep").read_sweep(file)[1] == ["--datasets", "en"] and len(select_tasks("en")) == 16
    lines = run_sweep(load_script("sweep"), file, checkpoint, rows, tmp_path, "--datasets", "qasper")
    kept = [{lines[f"{name}-budget={at}"]["kept"] for name in ("infinigen", "quest", "sparq")} for at in (256, 512)]
    assert [len(of_methods) for of_methods in kept] == [1, 1] and 0 < min(kept[0]) < min(kept[1]) < 1
    (row,) = (json.loads(file.read_text()) for file in tmp_path.glob("pred/*/vanilla/qasper.jsonl"))
    assert row["prompt_end"].endswith(" ASSISTANT:"), "the conversation of the table wraps the prompt"
