"""The baseline vLLM, with a stand-in for vLLM whose times are known."""

from pathlib import Path

import pytest
import torch

from sparsecache.bench.models import load_bench_model
from sparsecache.bench.vllm_baseline import Vllm
from sparsecache.bench.workload import Workload

STAND_IN = """
import json, os, time
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0"
SamplingParams = SimpleNamespace

class LLM:
    def __init__(self, **arguments):
        folder = Path(arguments["model"])
        assert json.loads((folder / "config.json").read_text())["architectures"] and any(folder.glob("*.safetensors"))
        with open(Path(__file__).with_name("arguments.jsonl"), "a") as file:
            file.write(json.dumps(arguments) + "\\n")
        if os.environ.get("NO_FP8") and arguments.get("quantization"):
            raise ValueError("fp8 needs another GPU")
        self.longest = arguments["max_model_len"]

    def generate(self, prompts, parameters, use_tqdm):
        lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
        made = [each.min_tokens for each in parameters]
        assert max(a + b for a, b in zip(lengths, made)) <= self.longest
        time.sleep(0.0002 * max(lengths) + 0.001 * max(made))  # a prompt token and a step
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * count)]) for count in made]
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module vllm, on PYTHONPATH: 0.2 ms per prompt token and 1 ms per step."""
    folder = tmp_path / "vllm site"
    folder.mkdir()
    (folder / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tiny: Path):
    return load_bench_model(str(tiny), [torch.device("cpu")], torch.float32)


def test_times_are_those_of_vllm_in_both_dtypes(model, vllm) -> None:
    workloads = [Workload(20, 40), Workload(60, 40, 2)]
    for seconds in Vllm().decode_step_s(model, workloads).values():
        assert seconds == {"vllm fp32": pytest.approx(0.001, rel=0.5), "vllm fp8": pytest.approx(0.001, rel=0.5)}
    first = Vllm().first_token_s(model, workloads)
    assert all(first[each]["vllm fp8"] >= 0.0002 * each.tokens + 0.001 for each in workloads)
    requests = Workload(20, 10, 3).requests(model.vocab_size)
    assert all(0.014 <= seconds < 1 for seconds in Vllm().replay_s(model, requests).values())
    lines = (vllm / "arguments.jsonl").read_text().splitlines()
    assert ['"quantization": "fp8"' in line for line in lines] == [False, True] * 3
    assert all('"dtype": "float32"' in line and '"enable_prefix_caching": false' in line for line in lines)


def test_vllm_stands_beside_the_methods_and_in_every_mode(bench, tiny, vllm, tmp_path) -> None:
    (tmp_path / "w.csv").write_text("dataset,prompt_tokens,new_tokens\na,9,3\na,30,3\n")
    short = ("--model", tiny, "--device", "cpu", "--baselines", "vllm")
    for arguments in (("prefill", "--tokens", "20"), ("replay", "--workload", tmp_path / "w.csv", "--rows", "2")):
        done = bench(*arguments, *short)
        assert done.exit_code == 0 and "x vllm fp32  x vllm fp8" in done.stdout, done.output
    done = bench("decode", *short, "--tokens", "20", "--new_tokens", "3", "--methods", "quest")
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("vllm")]
    assert done.exit_code == 0 and rows == [["vllm", "fp32"], ["vllm", "fp8"]]


def test_a_failure_of_vllm_leaves_the_rest(model, vllm, monkeypatch, capfd) -> None:
    monkeypatch.setenv("NO_FP8", "1")
    workload = Workload(20, 3)
    assert Vllm().first_token_s(model, [workload])[workload].keys() == {"vllm fp32"}
    printed = capfd.readouterr().err
    assert "Could not measure vllm: the process of vllm fp8 failed: " in printed and "fp8 needs another GPU" in printed


def test_without_vllm_one_line_says_so_with_the_way_out(model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    workload = Workload(20, 3)
    assert Vllm().decode_step_s(model, [workload]) == {workload: {}}
    assert capsys.readouterr().err.endswith("no module vllm. Put its folder on PYTHONPATH, or give --vllm_python.\n")
    assert Vllm(str(tmp_path / "no python")).replay_s(model, workload.requests(100)) == {}
    assert "Could not measure vllm: " in capsys.readouterr().err
