"""The bench: both engines over the same weights and prompts, a fair subset, lines that say what was measured."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import sparsecache.kernels
from sparsecache.bench.lines import Line, table
from sparsecache.bench.models import SHAPES, Subject, load_subject
from sparsecache.bench.modes import Job, stratified
from sparsecache.bench.stages import _STAGES, profiled, stage_of
from sparsecache.errors import UsageError
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.random_checkpoint import MODEL_TYPES, make_random_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def main(repo):
    spec = importlib.util.spec_from_file_location("bench", repo / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_reference_shares_our_weights_and_writes_our_text(model_type, tmp_path) -> None:
    folder = make_random_checkpoint(tmp_path / model_type, model_type=model_type, initializer_range=0.25)
    subject = load_subject(str(folder), [CPU], torch.float32)
    requests = Job(30, 20, 2).requests(1024)
    theirs, ours = (
        {done.key: done.token_ids for done in engine.generate(requests)}
        for engine in (subject.reference(), subject.engine(slots=2))
    )
    assert ours == theirs
    model = subject.reference()._model
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == subject.weights.layers[0].qkv.data_ptr()


def test_shapes_are_those_of_the_published_checkpoints() -> None:
    """Sizes in parameters as their cards give them, here counted without making any weights."""
    from transformers import LlamaConfig

    from sparsecache.engine.families import load_family

    for name, billions in (("llama-2-7b", 6.74), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55)):
        tensors = load_family("llama").architecture(LlamaConfig(**SHAPES[name])).tensors()
        assert sum(torch.Size(shape).numel() for shape in tensors.values()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_subset_has_of_each_dataset_its_share_evenly_over_its_lengths(tmp_path) -> None:
    file = tmp_path / "workload.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("dataset", "prompt_tokens", "new_tokens", "max_new_tokens"))
        writer.writerows(("long", 1000 + at, 7, 9) for at in range(300))
        writer.writerows(("short", at, 0, 9) for at in range(1, 101))
        writer.writerow(("rare", 5, 1, 9))
    jobs = stratified(file, 40)
    lengths = [job.tokens for job in jobs]
    assert lengths == sorted(lengths, reverse=True) and min(job.new_tokens for job in jobs) == 1
    long, short = ([n for n in lengths if low <= n < high] for low, high in ((1000, 2000), (6, 1000)))
    assert (len(long), len(short), len(jobs)) == (30, 10, 41)
    assert sum(long) / len(long) == pytest.approx(1149.5, abs=2) and min(long) < 1010 < 1290 < max(long)


@pytest.mark.parametrize("rows", ["", "x,-4,0\n", "x,4,-1\n", f"x,{10**12},3\n", f"x,3,{10**12}\n"], ids=repr)
def test_a_workload_without_prompts_or_beyond_reason_is_refused(rows, tmp_path) -> None:
    (tmp_path / "w.csv").write_text(f"dataset,prompt_tokens,new_tokens\n{rows}")
    with pytest.raises(UsageError, match="needs rows, and in each prompt_tokens from 1 and new_tokens from 0 on"):
        stratified(tmp_path / "w.csv", 10)


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", "dataset,prompt_tokens,new_tokens\nx,many,3\n", f"dataset\n{'x' * 200_000}\n"],
    ids=["none", "other columns", "no number", "a field too long"],
)
def test_what_is_no_workload_is_refused(text, tmp_path) -> None:
    (tmp_path / "w.csv").write_text(text or "\0")
    if not text:
        (tmp_path / "w.csv").unlink()
    with pytest.raises(UsageError, match="dataset, prompt_tokens, new_tokens"):
        stratified(tmp_path / "w.csv", 10)


def test_what_may_be_answered_at_length_comes_first(tmp_path) -> None:
    rows = "long,900,1,2\nshort,30,3,512\nshort,40,4,512\nlong,800,5,2\n"
    (tmp_path / "w.csv").write_text(f"dataset,prompt_tokens,new_tokens,max_new_tokens\n{rows}")
    assert [job.tokens for job in stratified(tmp_path / "w.csv", 4)] == [40, 30, 900, 800]


def test_a_workload_saved_by_a_spreadsheet_is_read(tmp_path) -> None:
    (tmp_path / "w.csv").write_text("dataset,prompt_tokens,new_tokens\r\na,7,2\r\n", encoding="utf-8-sig")
    assert stratified(tmp_path / "w.csv", 10) == [Job(7, 2)]


def test_a_line_is_told_as_time_share_of_limit_and_ratios() -> None:
    told = table([Line("decode", 0.004, 0.003, {"transformers": 0.01}), Line("replay", 1.5)])
    assert ["decode", "4.00", "3.00", "75.0", "2.50"] in [line.split() for line in told.splitlines()]
    assert ["replay", "1500.00", "-", "-", "-"] in [line.split() for line in told.splitlines()]


@pytest.mark.parametrize("mode", ["decode", "prefill", "replay"])
def test_every_mode_runs_and_saves_what_it_printed(mode, main, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.limits._SECONDS", 0.01)
    folder = make_random_checkpoint(tmp_path / "tiny")
    (tmp_path / "w.csv").write_text("dataset,prompt_tokens,new_tokens\n" + "a,40,3\nb,9,2\n" * 4)
    more = ["--workload", str(tmp_path / "w.csv"), "--rows", "3"] if mode == "replay" else ["--tokens", "20,50"]
    more += ["--new_tokens", "4"] if mode == "decode" else []
    told = CliRunner().invoke(main, [mode, "--model", str(folder), "--device", "cpu", "--out", str(tmp_path), *more])
    assert told.exit_code == 0, told.output
    assert (tmp_path / f"{mode}-tiny.svg").read_bytes().startswith(b"<?xml")
    saved = json.loads((tmp_path / f"{mode}-tiny.json").read_text())
    assert len(saved["lines"]) == (1 if mode == "replay" else 2)
    for line in saved["lines"]:
        assert line["what"] in told.output and line["seconds"] > 0 and line["peers"]["transformers"] > 0


def test_a_start_is_told_stage_by_stage(run_python) -> None:
    """A shape whose weights are saved first, so that what is written can be loaded by both engines."""
    program = (
        "from sparsecache.bench import models, startup\n"
        "models.SHAPES['tiny'] = dict(vocab_size=5000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)\n"
        "for line in startup.startup('tiny', 'cpu', 'float32', 200, ['transformers', 'nobody']):\n"
        "    print(line.notes['stages'], line.notes['peers_stages'], line.peers)"
    )
    told = run_python("-c", program)
    assert told.returncode == 0, told.stderr
    stages = ("imports", "weights", "room", "first token")
    for line in told.stdout.splitlines():
        seconds = [float(re.search(rf"'{stage}': ([0-9.]+)", line)[1]) for stage in stages]
        assert seconds[0] > 0 and seconds == sorted(seconds)
        assert line.count("'first token'") == 2 and "{'transformers': " in line
    assert len(told.stdout.splitlines()) == 2 and "nobody was not measured" in told.stderr


def test_a_profile_tells_what_a_step_takes_and_leaves_the_prompt_out(tmp_path) -> None:
    def decode(new_tokens: int) -> None:
        torch.ones(300, 300) @ torch.ones(300, 300)  # a prompt
        for _ in range(new_tokens - 1):
            with torch.profiler.record_function("x" * 300):
                torch.ones(40).cumsum(0).cumsum(0)

    told = profiled(decode, 300, False, tmp_path / "profile.txt")  # so many that a slow moment does not matter
    rows = [line.split() for line in told.splitlines()]
    operations = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row and row[0].startswith("aten::")}
    microseconds, count, each = operations["aten::cumsum"]
    assert count == 2 and each == pytest.approx(microseconds / 2, abs=0.1) and microseconds > 0
    written = {line.split()[0] for line in (tmp_path / "profile.txt").read_text().splitlines() if line}
    assert written >= set(operations) and "aten::mm" not in written
    assert "x" * 97 + "..." in written  # templates' names would push the numbers aside


def test_kernels_belong_to_the_stages_that_launch_them() -> None:
    assert [stage_of(name) for name in ("_attend", "_take", "_gather", "void at::native::reduce_kernel")] == [
        "attention", "the cut", "fetching rows", "all else",
    ]  # fmt: skip
    kernels = {name for stage in _STAGES.values() for name in stage}
    written = "".join(path.read_text() for path in Path(sparsecache.kernels.__file__).parent.glob("*.py"))
    assert all(f"def {name}(" in written for name in kernels)


def test_what_a_step_moved_is_said() -> None:
    notes = {"kept": [0.05, 0.15], "fetched_bytes_per_step": 2e6, "gpu_cache_hit": [0.5, None, 0.7]}
    told = table([Line("decode", 0.004, notes={**notes, "cache_host_bytes": 3 * 2**30})])
    assert "attended to 10.0 % of the past in sparse layers; fetched 2.0 MB a step; found 60.0 % in gpu_cache; " in told
    assert "cache in pinned host memory 3.00 GiB" in told and "GPU memory" not in told
    shares = {"prompts_per_s": 2.5, "prefill_share": 0.75, "decode_share": 0.2}
    assert "2.50 prompts a second; 75.0 % prefill; 20.0 % decode" in table([Line("replay", 0.4, notes=shares)])
    assert "imports 1.0 s; weights 0.5 s" in table([Line("start", 2, notes={"stages": {"imports": 1, "weights": 1.5}})])


def test_a_replay_is_shared_by_workers(repo, tmp_path, run_python) -> None:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("psutil") is None:
        pytest.skip("workers need Ray and psutil")
    folder = make_random_checkpoint(tmp_path / "tiny")
    (tmp_path / "w.csv").write_text("dataset,prompt_tokens,new_tokens\n" + "a,40,3\nb,9,2\n" * 4)
    told = run_python(
        repo / "scripts" / "bench.py", "replay", "--model", folder, "--device", "cpu", "--out", tmp_path,
        "--workload", tmp_path / "w.csv", "--rows", "8", "--workers", "2", "--slots", "2",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    (line,) = json.loads((tmp_path / "replay-tiny-2.json").read_text())["lines"]
    assert line["what"] == "replay of 8 prompts by 2 workers" and line["peers"]["one worker"] > 0
    assert line["notes"]["prompt_tokens"] == 4 * 49


def test_a_replay_in_which_a_worker_died_is_no_measurement(tmp_path, run_python) -> None:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("psutil") is None:
        pytest.skip("workers need Ray and psutil")
    (tmp_path / "w.csv").write_text("dataset,prompt_tokens,new_tokens\na,4,3\n")
    program = f"""
import pathlib
from contextlib import nullcontext
from types import SimpleNamespace
from sparsecache.bench import many
many.timed = lambda *arguments: (1.0, None)
many._working = lambda *arguments: nullcontext(
    SimpleNamespace(scale_down=int, wait=int, session=lambda: dict(workers=[dict(died=False), dict(died=True)])))
list(many.replay_by_many(many.Crew(2, "demo", "float32", "cpu", 1), pathlib.Path({str(tmp_path / "w.csv")!r}), 1))
"""
    told = run_python("-c", program)  # a process that may import Ray
    assert "RuntimeError: of 2 workers one died and was replaced" in told.stderr


def test_a_peer_that_fails_is_told_and_the_rest_is_measured(main, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.limits._SECONDS", 0.01)
    folder = make_random_checkpoint(tmp_path / "tiny")

    def reference(self, **generation):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(Subject, "reference", reference)
    told = CliRunner().invoke(main, ["decode", "--model", str(folder), "--device", "cpu", "--tokens", "20,30", "--out",
                                     str(tmp_path), "--new_tokens", "3"])  # fmt: skip
    assert told.exit_code == 0, told.output
    lines = json.loads((tmp_path / "decode-tiny.json").read_text())["lines"]
    assert [line["peers"] for line in lines] == [{}, {}] and "transformers was not measured" in told.output


def test_what_was_measured_before_a_stop_stays(main, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.limits._SECONDS", 0.01)
    folder, engine, made = make_random_checkpoint(tmp_path / "tiny"), Subject.engine, []

    def stopped(self, *arguments):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return engine(self, *arguments)

    monkeypatch.setattr(Subject, "engine", stopped)
    arguments = ["--model", str(folder), "--device", "cpu", "--tokens", "20,30", "--new_tokens", "3", "--peers", "none"]
    told = CliRunner().invoke(main, ["decode", *arguments, "--out", str(tmp_path)])
    assert (told.exit_code, told.stderr) == (130, "Stopped.\n")
    (line,) = json.loads((tmp_path / "decode-tiny.json").read_text())["lines"]
    assert line["what"].startswith("20 tokens")


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_batch_that_does_not_fit_is_no_measurement(when, main, tmp_path, monkeypatch) -> None:
    """Fewer sequences at once than asked for: their time would be told as the batch's."""
    monkeypatch.setattr("sparsecache.bench.limits._SECONDS", 0.01)
    folder, attend = make_random_checkpoint(tmp_path / "tiny"), Vanilla.attend

    def crowded(*_) -> None:
        raise torch.OutOfMemoryError("no room")

    def allocate(self, shape, slots, max_tokens, device, dtype) -> None:
        if slots > 2 and when == "before":
            crowded()
        room(self, shape, slots, max_tokens, device, dtype)

    room = Vanilla.allocate
    monkeypatch.setattr(Vanilla, "allocate", allocate)
    if when != "before":
        monkeypatch.setattr(Vanilla, "attend", lambda self, *a: crowded() if len(a[4]) > 2 else attend(self, *a))
    arguments = ["--model", str(folder), "--device", "cpu", "--tokens", "20", "--batch", "3,2", "--new_tokens", "3"]
    told = CliRunner().invoke(main, ["decode", *arguments, "--peers", "none", "--out", str(tmp_path)])
    assert told.exit_code == 1
    fits = 2 if when == "before" else 1
    assert f"does not suffice for 3 sequences of 23 tokens at once, but for {fits}" in told.stderr
    (line,) = json.loads((tmp_path / "decode-tiny.json").read_text())["lines"]
    assert line["what"].startswith("20 tokens, batch 2")


def test_a_method_is_measured_beside_our_own_vanilla(main, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.limits._SECONDS", 0.01)
    folder = make_random_checkpoint(tmp_path / "tiny")
    arguments = ["decode", "--model", str(folder), "--device", "cpu", "--tokens", "60", "--batch", "2"]
    way = ["--method", "infinigen", "-o", "budget=0.1", "-o", "alpha=inf", "-o", "offload=true"]
    more = ["--peers", "vanilla,streamed,transformers", "--new_tokens", "5", "--out", str(tmp_path)]
    told = CliRunner().invoke(main, [*arguments, *way, *more])
    assert told.exit_code == 0, told.output
    (line,) = json.loads((tmp_path / "decode-tiny.json").read_text())["lines"]
    assert "Not measured with 2 sequences at a time, but with one: transformers." in told.stderr
    assert line["what"].startswith("60 tokens, batch 2, infinigen budget=0.1 alpha=inf") and line["peers"].keys() == {
        "vanilla",
        "streamed",
    }
    assert all(0.07 < kept <= 0.1 for kept in line["notes"]["kept"])
    assert line["notes"]["fetched_bytes_per_step"] == pytest.approx(2 * 6 * 2 * 2 * 2 * 16 * 4, rel=0.01)


def test_options_that_vary_stand_beside_one_measurement_of_a_peer(main, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.limits._SECONDS", 0.01)
    folder, made, reference = make_random_checkpoint(tmp_path / "tiny"), [], Subject.reference
    monkeypatch.setattr(Subject, "reference", lambda self: made.append(1) or reference(self))
    arguments = ["decode", "--model", str(folder), "--device", "cpu", "--tokens", "30,40", "--new_tokens", "3"]
    way = ["--method", "infinigen", "-o", "alpha=inf", "--vary", "budget=3,0.5", "--vary", "skew=true,false"]
    told = CliRunner().invoke(main, [*arguments, *way, "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    lines = json.loads((tmp_path / "decode-tiny.json").read_text())["lines"]
    ways = [f"infinigen alpha=inf budget={budget} skew={skew}" for budget in ("3", "0.5") for skew in ("true", "false")]
    assert [line["what"] for line in lines] == [f"{n} tokens, batch 1, {way}" for n in (30, 40) for way in ways]
    assert [line["notes"]["kept"][0] for line in lines[:4:2]] == pytest.approx([3 / 31, 0.5], rel=0.05)
    for of_job in (lines[:4], lines[4:]):
        assert len({line["peers"]["transformers"] for line in of_job}) == 1
    assert len(made) == 2 and lines[0]["peers"] != lines[4]["peers"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["decode", "--method", "infinigen", "--vary", "budget=0.1,2.5"], "budget=2.5"),
        (["decode", "--method", "infinigen", "--vary", "budget=0.1,"], "budget=''"),
        (["decode", "--method", "infinigen", "--vary", "budget"], "--vary 'budget' is not of the form KEY=VALUE"),
        (["decode", "--method", "infinigen", "--vary", "cap=1"], "cap"),
        (
            ["decode", "--method", "infinigen", "-o", "budget=1", "--vary", "budget=1,2"],
            "budget is given by -o and by --vary: leave one of them out",
        ),
        (["prefill", "--vary", "budget=1"], "--vary says nothing in mode prefill"),
        (["decode", "--tokens", "8k"], "--tokens '8k' is no comma list of whole numbers"),
        (["decode", "--tokens", "0"], "numbers from 1 on"),
        (["decode", "--tokens", str(2**31)], f"--tokens '{2**31}' is too large: at most {2**26}"),
        (["decode", "--batch", "9" * 4000], "is too large: at most"),
        (["decode", "--tokens", "131072", "--batch", "1024"], f"--tokens times --batch is {2**27}: at most {2**26}"),
        (["replay", "--workload", "w.csv", "--rows", str(2**31)], "--rows"),
        (
            ["decode", "--peers", "vllm"],
            "'vllm' is no peer in decode. Peers: offloaded, static, streamed, transformers, vanilla",
        ),
        (["prefill", "--peers", "streamed"], "'streamed' is no peer in prefill"),
        (["decode", "--method", "infinigen", "-o", "alpha=-1"], "alpha=-1"),
        (["decode", "-o", "alpha"], "is not of the form KEY=VALUE"),
        (
            ["decode", "--method", "infinigen", "--vary", "budget=1,2", "--vary", "budget=3"],
            "--vary gives budget twice, 1,2 and 3: leave one of them out",
        ),
        (["decode", "--peers", "static,static"], "--peers 'static,static' names one twice"),
        (["replay"], "needs --workload"),
        (["replay", "--workload", "w.csv", "--tokens", "9"], "--tokens says nothing in mode replay: leave it out. It"),
        (["replay", "--workload", "w.csv", "--workers", "2", "--peers", "static"], "leave out --peers"),
        (
            ["prefill", "--method", "infinigen"],
            "--method says nothing in mode prefill: leave it out. It is for decode.",
        ),
        (["startup", "-o", "offload=true"], "-o says nothing in mode startup"),
        (["startup", "--tokens", "9,10"], "A start-up ends with one prompt, not 2"),
        (["decode", "--workers", "2"], "--workers says nothing in mode decode"),
        (["decode", "--device", "tpu"], "--device 'tpu' is no device to decode on"),
        (["decode", "--out", "/proc/x"], "--out /proc/x is no folder to write to"),
        (["decode", "--model", "nothing"], "neither a folder"),
        (["decode", "--model", "nothing"], "Shapes with random weights are llama-2-7b, "),
        (["decode", "--method", "infinigen", "-o", "dense_layers=40"], "refuses its options: dense_layers=40 must be"),
        (
            ["decode", "--method", "infinigen", "-o", "calibration_file=/no"],
            "refuses its options: calibration_file=/no",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_with_the_way_out(arguments, problem, main) -> None:
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 2 and problem in told.output
