"""scripts/bench.py: the other modes, and arguments that are refused."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from sparsecache.bench import first_token, startup
from sparsecache.bench.models import SHAPES

WORKLOAD = "dataset,prompt_tokens,new_tokens\n" + "a,40,3\nb,9,2\n" * 4


@pytest.mark.parametrize("mode", ["prefill", "replay"])
def test_prefill_and_replay_save_what_they_print(mode, bench, tiny, tmp_path) -> None:
    (tmp_path / "w.csv").write_text(WORKLOAD)
    more = ["--workload", tmp_path / "w.csv", "--rows", "3"] if mode == "replay" else ["--tokens", "20,50"]
    done = bench(mode, "--model", tiny, "--device", "cpu", "--out", tmp_path, *more)
    assert done.exit_code == 0, done.output
    assert (tmp_path / f"{mode}-tiny.svg").read_bytes().startswith(b"<?xml")
    saved = json.loads((tmp_path / f"{mode}-tiny.json").read_text())
    assert len(saved["results"]) == (1 if mode == "replay" else 2)
    for result in saved["results"]:
        assert result["name"] in done.output and result["seconds"] > 0 and result["baselines"]["transformers"] > 0


def test_a_replay_with_a_method_is_compared_with_vanilla(bench, tiny, tmp_path) -> None:
    (tmp_path / "w.csv").write_text(WORKLOAD)
    more = ("--method", "snapkv", "-o", "budget=0.5", "--workload", tmp_path / "w.csv", "--baselines", "vanilla")
    done = bench("replay", "--model", tiny, "--device", "cpu", "--out", tmp_path, "--rows", "4", *more)
    assert done.exit_code == 0, done.output
    (result,) = json.loads((tmp_path / "replay-tiny.json").read_text())["results"]
    assert result["name"] == "replay of 4 prompts, up to 16 at once, snapkv budget=0.5"
    assert result["baselines"].keys() == {"vanilla"} and result["baselines"]["vanilla"] > 0


def test_a_start_is_measured_stage_by_stage(monkeypatch, capsys) -> None:
    """Over saved weights of a shape, which both engines load."""

    def start(engine: str, arguments: list[str], triton_cache: str) -> dict[str, float]:
        folder, device, dtype, tokens = arguments
        return first_token.stages(time.time(), engine, Path(folder), device, dtype, int(tokens))

    monkeypatch.setitem(SHAPES, "tiny", {"vocab_size": 5000, "hidden_size": 64, "num_hidden_layers": 2,
                                         "num_attention_heads": 4})  # fmt: skip
    monkeypatch.setattr(startup, "_start", start)
    results = list(startup.startup("tiny", "cpu", "float32", 200, ["transformers", "unknown"]))
    assert len(results) == 2 and "Could not measure unknown" in capsys.readouterr().err
    for result in results:
        assert list(result.notes["stages"]) == ["imports", "weights", "allocation", "first token"]
        assert list(result.notes["baseline_stages"]["transformers"]) == ["imports", "weights", "first token"]
        for stages in (result.notes["stages"], result.notes["baseline_stages"]["transformers"]):
            seconds = list(stages.values())
            assert seconds[0] > 0 and seconds == sorted(seconds)
        assert result.seconds == result.notes["stages"]["first token"]
        assert result.baselines.keys() == {"transformers"}


def test_a_start_is_a_process_of_its_own(tiny, tmp_path) -> None:
    stages = startup._start("sparsecache", [str(tiny), "cpu", "float32", "20"], str(tmp_path))
    assert list(stages) == ["imports", "weights", "allocation", "first token"] and stages["imports"] > 0.2
    with pytest.raises(RuntimeError, match="Could not start unknown: .*KeyError"):
        startup._start("unknown", [str(tiny), "cpu", "float32", "20"], str(tmp_path))


def test_a_replay_is_shared_by_workers(repo, tiny, tmp_path, run_python) -> None:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("psutil") is None:
        pytest.skip("workers need Ray and psutil")
    (tmp_path / "w.csv").write_text(WORKLOAD)
    done = run_python(
        repo / "scripts" / "bench.py", "replay", "--model", tiny, "--device", "cpu", "--out", tmp_path,
        "--workload", tmp_path / "w.csv", "--rows", "8", "--workers", "2", "--slots", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "replay-tiny-2.json").read_text())["results"]
    assert result["name"] == "replay of 8 prompts by 2 workers" and result["baselines"]["one worker"] > 0
    assert result["notes"]["prompt_tokens"] == 4 * 49


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("decode --method infinigen --vary budget=0.1,2.5", "budget=2.5"),
        ("decode --method infinigen --vary budget=0.1,", "budget=''"),
        ("decode --method infinigen --vary budget", "--vary 'budget' is not of the form KEY=VALUE"),
        ("decode --method infinigen --vary cap=1", "cap"),
        ("decode --method infinigen -o budget=1 --vary budget=1,2", "budget is given by -o and by --vary: leave one"),
        ("decode --method infinigen --vary budget=1,2 --vary budget=3", "--vary gives budget twice, 1,2 and 3: leave"),
        ("decode --method infinigen -o alpha=-1", "alpha=-1"),
        ("decode --method infinigen -o dense_layers=40", "refuses its options: dense_layers=40 must be"),
        ("decode --method loki -o calibration_file=/no", "refuses its options: calibration_file=/no"),
        ("decode --method quset", "There is no method 'quset'; did you mean 'quest'?"),
        ("decode --method ./no.py", "there is no such .py file"),
        ("decode -o alpha", "is not of the form KEY=VALUE"),
        ("prefill --vary budget=1", "--vary has no effect in mode prefill"),
        ("prefill --method infinigen", "has no effect in mode prefill: leave it out. It is for decode and replay."),
        ("startup -o offload=true", "-o has no effect in mode startup"),
        ("decode --workers 2", "--workers has no effect in mode decode"),
        ("replay --workload w.csv --tokens 9", "--tokens has no effect in mode replay: leave it out. It"),
        ("replay", "needs --workload"),
        ("replay --workload w.csv --workers 2 --peers static", "leave out --baselines"),
        ("replay --workload w.csv --workers 2 --method quest", "A replay with --workers is of vanilla: leave out --m"),
        ("startup --tokens 9,10", "A start-up has one prompt, not 2"),
        ("decode --tokens 8k", "--tokens '8k' must be whole numbers separated by commas"),
        (f"decode --tokens {2**31}", f"--tokens '{2**31}' is too large: at most {2**26}"),
        ("decode --batch " + "9" * 4000, "is too large: at most"),
        ("decode --tokens 131072 --batch 1024", f"--tokens times --batch is {2**27}: at most {2**26}"),
        (f"replay --workload w.csv --rows {2**31}", "--rows"),
        ("decode --tokens 0", "numbers of 1 or more"),
        ("decode --baselines sglang", "'sglang' is not a baseline of mode decode. Allowed: offloaded, static, "),
        ("startup --baselines vllm", "'vllm' is not a baseline of mode startup. Allowed: transformers, or none."),
        ("decode --vllm_python python3", "--vllm_python has no effect without --baselines vllm"),
        ("prefill --peers streamed", "'vanilla_offload' is not a baseline of mode prefill"),
        ("decode --baselines streamed,vanilla_offload", "names a baseline twice"),
        ("decode --device tpu", "--device 'tpu' cannot be decoded on"),
        ("decode --out /proc/x", "--out /proc/x cannot be written to"),
        ("decode --model nothing", "Shapes with random weights: llama-2-7b, "),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_with_the_way_out(arguments, problem, bench) -> None:
    done = bench(*arguments.split())
    assert done.exit_code == 2 and problem in done.output
