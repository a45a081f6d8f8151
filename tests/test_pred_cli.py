"""The prediction command line: help, spellings, and every bad value in one sentence before weights are read.

In one file because every test calls the same command.
"""

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from longbench_pred import main
from sparsecache.methods import describe_methods
from sparsecache.runner.settings import Settings
from sparsecache.testing.random_checkpoint import make_random_checkpoint


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A checkpoint whose weights cannot be read: whoever reads them is found out."""
    folder = make_random_checkpoint(tmp_path_factory.mktemp("model") / "broken", num_hidden_layers=1)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.fixture
def invoke(broken, tmp_path):
    def run(*arguments: str, model: Path | str = broken) -> Result:
        base = ["--model", str(model), "--datasets", "qasper", "--data", "sample", "--pred_dir", str(tmp_path / "pred")]
        return CliRunner().invoke(main, [*base, "--sample_tokens", "256", "--device", "cpu", *arguments])

    return run


def test_help_names_every_option_without_torch_and_fast(run_python, repo) -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        told = run_python(repo / "longbench_pred.py", "--help")
        seconds.append(time.perf_counter() - began)
    assert told.returncode == 0
    for field in fields(Settings):
        assert f"--{field.name}" in told.stdout or field.name == "options"
    assert "--ruler_rows N " in told.stdout and "[default: 20; x>=1]" in told.stdout
    assert "[default: 0]" in told.stdout and "2147483647" not in told.stdout
    assert min(seconds) < 0.5
    code = "import sys, longbench_pred\ntry:\n    longbench_pred.main(%r)\nfinally:\n    print(*sys.modules)"
    for arguments in (["--help"], ["--model", "demo", "--method", "vanila"], ["--model", "demo", "--datasets", "x"]):
        modules = set(run_python("-c", code % arguments).stdout.splitlines()[-1].split())
        assert "longbench_pred" in modules
        assert not modules & {"torch", "transformers", "datasets", "numpy"}


def test_defaults_of_the_command_line_are_those_of_settings(monkeypatch) -> None:
    found = []
    monkeypatch.setattr("sparsecache.runner.run.run", lambda settings: found.append(settings) or 0)
    model = "llama-2-7b-inst-32k"
    assert CliRunner().invoke(main, ["--model", model]).exit_code == 0
    assert CliRunner().invoke(main, []).exit_code == 0
    assert found == [Settings(model=model), Settings()]


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        (Settings(), "sample"),
        (Settings(model="demo"), "sample"),
        (Settings(data="hub"), "hub"),
        (Settings(data=""), ""),
        (Settings(model="llama-2-7b-inst-32k"), "hub"),
        (Settings(model="owner/demo"), "hub"),
        (Settings(model="llama-2-7b-inst-32k", data="sample"), "sample"),
    ],
    ids=lambda value: f"{value.model} {value.data}" if isinstance(value, Settings) else value,
)
def test_a_model_brings_its_data_and_the_others_take_the_hubs(settings, source) -> None:
    assert settings.data_source == source


def test_the_data_that_is_taken_is_told(broken, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(broken, tmp_path / "folder" / "fed")
    monkeypatch.setattr(
        "sparsecache.engine.model_registry.read_tables", lambda name: {"fed": {"hub": "a/b", "data": "sample"}}
    )
    told = CliRunner().invoke(main, ["--model", str(folder), "--device", "cpu", "--pred_dir", str(tmp_path / "pred")])
    assert "data        sample\n" in told.stdout and "cannot be read" in told.stderr


@pytest.mark.parametrize("spelling", ["--list_methods", "--list-methods"])
def test_every_method_is_listed_with_its_options(spelling) -> None:
    told = CliRunner().invoke(main, [spelling, "--method", "vanila"])
    assert (told.exit_code, told.stderr) == (0, "")
    assert told.stdout.splitlines() == list(describe_methods())
    assert "vanilla: Vanilla: the full cache" in told.stdout


def test_dashes_and_underscores_are_the_same(monkeypatch) -> None:
    found = []
    monkeypatch.setattr("sparsecache.runner.run.run", lambda settings: found.append(settings) or 0)
    base = ["--model", "demo", "--name=n-m"]
    dashes = ["--max-samples", "3", "--pred-dir=a-b", "--allow-pickle", "-o", "my-key=x-y"]
    underscores = ["--max_samples", "3", "--pred_dir=a-b", "--allow_pickle", "-o", "my_key=x-y"]
    for spelling in (dashes, underscores):
        assert CliRunner().invoke(main, [*base, *spelling]).exit_code == 0
    assert found[0] == found[1]
    assert (found[0].pred_dir, found[0].options, found[0].name) == (Path("a-b"), {"my_key": "x-y"}, "n-m")


def test_the_exit_code_is_the_runs(monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.runner.run.run", lambda settings: 1)
    assert CliRunner().invoke(main, ["--model", "demo"]).exit_code == 1


def test_weights_that_cannot_be_read_are_found_when_they_are_read(invoke) -> None:
    """What the tests below rely on."""
    told = invoke()
    assert told.exit_code == 2
    assert "model.safetensors cannot be read" in told.stderr


BAD = {
    "dataset": (["--datasets", "qaspar"], ["'qaspar'", "narrativeqa", "single_doc_qa", "zh"]),
    "empty dataset": (["--datasets", ""], ["There is no dataset ''"]),
    "dataset not in E": (["--datasets", "narrativeqa", "--e"], ["'narrativeqa' is not part of LongBench-E", "qasper"]),
    "method": (["--method", "vanila"], ["'vanila'", "vanilla"]),
    "unknown option": (["-o", "budget=3"], ["no option 'budget'", "offload=false"]),
    "option without value": (["-o", "budget"], ["'budget'", "KEY=VALUE"]),
    "option given twice": (
        ["-o", "gpu_cache=1", "-o", "gpu-cache=2"],
        ["-o gives gpu_cache twice, 1 and 2"],
    ),
    "name with slash": (["--name", "a/b"], ["'a/b'", "without a slash"]),
    "name of dots": (["--name", ".."], ["'..'"]),
    "long name": (["--name", "x" * 300], ["--pred_dir or --name"]),
    "device": (["--device", "tpu"], ["'tpu'", "auto, cpu, cuda"]),
    "device that decodes nothing": (["--device", "meta"], ["'meta'", "auto, cpu, cuda"]),
    "absent GPU": (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
    "dtype": (["--dtype", "int8"], ["'int8'", "bfloat16"]),
    "engine": (["--engine", "vllm"], ["'vllm'", "transformers"]),
    "verify of transformers": (["--engine", "transformers", "--verify", "2"], ["--verify"]),
    "batch of a word": (["--batch_size", "many"], ["'many' is not a valid"]),
    "zero batch": (["--batch_size", "0"], ["0 is not in the range 1<=x<="]),
    "negative samples": (["--max_samples", "-1"], ["-1 is not in the range 1<=x<="]),
    "text for a number": (["--max_length", "long"], ["'long'"]),
    "model_type": (["--model_type", "mistral"], ["'llama', not 'mistral'", "--model_type llama"]),
    "data": (["--data", "nowhere"], ["'nowhere'", "hub, sample, a folder", "zip"]),
    "revision of a sample": (["--data_revision", "abc"], ["abc", "--data sample"]),
    "E of a sample": (["--e"], ["--data sample"]),
    "sample tokens": (["--sample_tokens", "1"], ["256<=x<=32768"]),
    "window without room": (["--window", "100"], ["window of 100", "128", "qasper"]),
    "window with room for one of two": (["--window", "400", "--datasets", "qasper,gov_report"], ["400", "gov_report"]),
    "absent GPUs": (["--gpus_per_worker", "2", "--device", "auto"], ["GPUs 0 to 1", "torch sees"]),
    "split on a CPU": (["--gpus_per_worker", "2"], ["--gpus_per_worker 2", "--device cpu"]),
    "one GPU of many workers": (["--workers", "2", "--device", "cuda:1"], ["'cuda:1'", "auto, cpu, cuda"]),
    "verify with workers": (["--workers", "2", "--verify", "1"], ["--verify", "without --workers"]),
    "Ray Client": (["--ray_address", "ray://head:10001"], ["'ray://head:10001'", "HOST:PORT", "auto"]),
    "address without a port": (["--ray_address", "head"], ["'head'", "HOST:PORT"]),
    "unknown flag": (["--max_sample_count", "3"], ["No such option '--max_sample_count'", "--max_sample"]),
    "unknown short flag": (["-x"], ["No such option '-x'"]),
    "extra argument": (["budget"], ["Got unexpected extra argument (budget)."]),
    "extra pair": (["--method", "infinigen", "budget=3"], ["argument (budget=3).", "given as -o budget=3."]),
    "option of the method": (
        ["--method", "infinigen", "--budget", "256"],
        ["No such option '--budget'. It is an option of the method: -o budget=256."],
    ),
    "option of the method with =": (
        ["--dense-layers=2", "--method", "infinigen"],
        ["No such option '--dense_layers'. It is an option of the method: -o dense_layers=2."],
    ),
    "option of another method": (["--method", "kivi", "--alpha", "4"], ["No such option '--alpha'"]),
    "option of some method": (
        ["--budget", "--alpha", "3"],
        ["It is an option of methods: --method NAME -o budget=VALUE."],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_one_sentence_with_the_choices_before_weights_are_read(case, invoke, tmp_path) -> None:
    arguments, parts = BAD[case]
    told = invoke(*arguments)
    assert told.exit_code == 2, told.output
    (error,) = (line for line in told.stderr.splitlines() if line.startswith("Error: "))
    for part in parts:
        assert part in error
    assert "cannot be read" not in told.output and "Traceback" not in told.output
    assert not list(tmp_path.glob("pred/*/*/*.jsonl"))


@pytest.mark.parametrize("text", ["no-such-model", "./nowhere/at/all", ""])
def test_an_unknown_model_is_refused_with_the_names(text, invoke) -> None:
    told = invoke(model=text)
    assert told.exit_code == 2
    assert repr(text) in told.stderr and "llama-2-7b-inst-32k" in told.stderr
    assert told.stderr.endswith("nor a hub id (owner/name).\n")


def test_a_model_to_download_is_named_with_the_command(invoke, run_python, repo) -> None:
    told = invoke(model="smollm2-135m-instruct")
    assert told.exit_code == 2
    assert told.stderr.endswith(" scripts/fetch_model.py smollm2-135m-instruct downloads it and prints its path.\n")
    assert "smollm2-135m-instruct" in run_python(repo / "scripts" / "fetch_model.py", "--help").stdout


def test_a_hub_model_that_is_not_there_offline(invoke, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    told = invoke("--offline", model="qwen3-8b")
    assert told.exit_code == 2
    assert "Error: Could not download the checkpoint Qwen/Qwen3-8B" in told.stderr and "--offline" in told.stderr


def test_a_pred_dir_that_is_a_file(invoke, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        told = invoke("--pred_dir", str(tmp_path / place))
        assert told.exit_code == 2
        assert f"{tmp_path / place}/broken/vanilla cannot be written to" in told.stderr


def _configured(broken: Path, tmp_path: Path, **changes: object) -> Path:
    folder = shutil.copytree(broken, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_checkpoint_with_a_sliding_window_is_refused_unless_within(broken, invoke, tmp_path) -> None:
    folder = _configured(broken, tmp_path, model_type="mistral", sliding_window=1000)
    told = invoke(model=folder)
    assert told.exit_code == 2
    assert "sliding-window attention over 1000 tokens" in told.stderr and "--window 1000" in told.stderr
    assert "sliding" in invoke("--window", "1001", model=folder).stderr
    told = invoke("--window", "1000", model=folder)
    assert "sliding" not in told.stderr and "cannot be read" in told.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' are not supported. Supported: llama"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "RoPE type 'spiral'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_is_not_decoded_here_is_refused(changes, message, broken, invoke, tmp_path) -> None:
    told = invoke(model=_configured(broken, tmp_path, **changes))
    assert told.exit_code == 2
    assert message in told.stderr and "cannot be read" not in told.stderr


def test_a_configuration_without_a_window_asks_for_one(broken, invoke, tmp_path) -> None:
    folder = _configured(broken, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 1024}))
    told = invoke("--engine", "transformers", model=folder)
    assert told.exit_code == 2
    assert "states no max_position_embeddings. Pass --window" in told.stderr


def test_pickles_are_refused_with_the_switch_named(broken, invoke, tmp_path) -> None:
    folder = _configured(broken, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    told = invoke(model=folder)
    assert told.exit_code == 2
    assert "--allow_pickle" in told.stderr


def test_an_interrupt_while_a_library_is_imported_is_no_bad_checkpoint(invoke, monkeypatch) -> None:
    def imported(*_, **__) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", imported)
    told = invoke()
    assert (told.exit_code, told.stderr) == (130, "Stopped.\n")


@pytest.mark.parametrize(("arguments", "way"), [([], "the same command"), (["--overwrite"], "without --overwrite")])
def test_an_interrupted_run_says_which_command_goes_on(arguments, way, monkeypatch) -> None:
    def stop(settings: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsecache.runner.run.run", stop)
    told = CliRunner().invoke(main, ["--model", "demo", *arguments])
    assert told.exit_code == 130
    assert told.stderr.startswith("Stopped. Finished rows are kept. Rerun the same command ") and way in told.stderr
    assert ("--overwrite" in told.stderr) == bool(arguments)


@pytest.fixture
def downloads(broken, monkeypatch) -> list[list[str]]:
    """The hub hands out `broken` under any name; the list has the patterns of every download."""
    asked: list[list[str]] = []

    def download(hub: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(broken)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def _weights_asked(downloads: list[list[str]]) -> list[bool]:
    return ["*.safetensors" in patterns for patterns in downloads]


@pytest.mark.parametrize(
    "case", ["data", "E of a sample", "model_type", "unknown option", "absent GPU", "window without room"]
)
def test_no_weights_are_fetched_for_a_run_that_cannot_start(case, invoke, downloads) -> None:
    arguments, parts = BAD[case]
    told = invoke(*arguments, model="owner/some-llama")
    assert told.exit_code == 2
    assert all(part in told.stderr for part in parts)
    assert not any(_weights_asked(downloads))


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "gpt2"}, {"hidden_act": "gelu"}, {"model_type": "mistral", "sliding_window": 1000}],
    ids=["family", "activation", "sliding window"],
)
def test_no_weights_are_fetched_of_a_checkpoint_that_is_not_decoded_here(
    changes, broken, invoke, tmp_path, monkeypatch
) -> None:
    folder, asked = _configured(broken, tmp_path, **changes), []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda hub, *, allow_patterns, **options: asked.append(allow_patterns) or str(folder),
    )
    assert invoke(model="owner/some-llama").exit_code == 2
    assert _weights_asked(asked) == [False]


def test_weights_are_fetched_once_all_else_is_settled(invoke, downloads) -> None:
    told = invoke(model="owner/some-llama")
    assert "model.safetensors cannot be read" in told.stderr
    assert _weights_asked(downloads) == [False, True]
    assert not any("*.bin" in patterns for patterns in downloads)
    invoke("--allow_pickle", model="owner/some-llama")
    assert "*.bin" in downloads[-1] and "*.bin" not in downloads[-2]


def test_a_chat_template_that_the_tokenizer_lacks_is_refused(broken, invoke, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(broken, tmp_path / "folder" / "own-chat")
    tables = {"own-chat": {"hub": "owner/own-chat", "chat": "template"}}
    monkeypatch.setattr("sparsecache.engine.model_registry.read_tables", lambda name: tables)
    told = invoke(model=folder)
    assert told.exit_code == 2
    for part in ("has no chat template", "[own-chat]", "configs/models.toml", "--chat none"):
        assert part in told.stderr
    assert "cannot be read" not in told.stderr
    tables["own-chat"]["chat"] = "none"
    assert "cannot be read" in invoke(model=folder).stderr


def test_the_window_of_a_table_comes_before_the_checkpoints_own(broken, invoke, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(broken, tmp_path / "folder" / "wide")
    tables = {"wide": {"hub": "owner/wide", "window": 9000}}
    monkeypatch.setattr("sparsecache.engine.model_registry.read_tables", lambda name: tables)
    told = invoke(model=folder)
    assert "window 9000" in told.stdout and "beyond" not in told.stderr
    assert "window 9000" in invoke("--window", "9000", model=folder).stdout
    told = invoke("--window", "9001", "--name", "wider", model=folder)
    assert told.exit_code == 2 and "--window 9001 is beyond the 9000 tokens" in told.stderr
    tables["wide"]["windows"] = tables["wide"].pop("window")
    told = invoke(model=folder)
    assert told.exit_code == 2 and "Table [wide] of configs/models.toml has unknown fields: windows" in told.stderr
