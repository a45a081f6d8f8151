"""scripts/bench.py decode --methods: one table over shared prompts, and failures that lose nothing."""

import json
from pathlib import Path

import pytest
import torch

from sparsecache.bench import several_methods
from sparsecache.bench.methods_table import MethodRow, methods_table
from sparsecache.bench.models import BenchModel, load_bench_model
from sparsecache.bench.several_methods import measure_methods
from sparsecache.bench.specs import MethodSpec, specs_of_methods
from sparsecache.bench.workload import Workload
from sparsecache.cache import FullCache
from sparsecache.engine.decoder import Decoder
from sparsecache.errors import UsageError
from sparsecache.methods import method_names


@pytest.fixture
def table(bench, tiny, tmp_path):
    """Runs decode --methods over the tiny checkpoint on the CPU; returns what it printed and the saved rows."""

    def run(methods, *arguments):
        done = bench("decode", "--model", tiny, "--device", "cpu", "--out", tmp_path, "--methods", methods, *arguments)
        file = tmp_path / "methods-tiny.json"
        return done, json.loads(file.read_text())["results"] if file.exists() else []

    return run


def test_every_method_is_a_line_beside_vanilla_with_the_common_budget(table, tmp_path) -> None:
    done, rows = table("all", "--tokens", "40", "--new_tokens", "3", "-o", "budget=0.1")
    assert done.exit_code == 0, done.output
    assert [row["name"].split()[0] for row in rows] == ["vanilla", *(m for m in method_names() if m != "vanilla")]
    printed = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    markdown = (tmp_path / "methods-tiny.md").read_text()
    for row in rows:
        assert row["step_s"] > 0 and row["roofline_s"] > 0 and row["graph"] is False and row["error"] is None
        assert row["vanilla_step_s"] == rows[0]["step_s"] and row["prompt_s"] == rows[0]["prompt_s"]
        assert row["name"] in printed[row["name"].split()[0]]
        assert "| {} |".format(row["name"].replace("_", r"\_")) in markdown
    by_name = {row["name"]: row for row in rows}
    assert by_name["quest budget=0.1"]["kept"] == pytest.approx(0.1, abs=0.01)
    assert by_name["vanilla"]["kept"] is None and by_name["vanilla"]["prefill_overhead_s"] == 0
    assert "duoattention" in by_name  # it has no budget


@pytest.mark.usefixtures("bench")
def test_a_prompt_is_computed_once_per_length_and_shared_by_methods_and_batches(tiny, monkeypatch) -> None:
    lengths, prompt = [], Decoder._forward_prompt
    monkeypatch.setattr(
        Decoder, "_forward_prompt", lambda self, ids, *to: lengths.append(len(ids)) or prompt(self, ids, *to)
    )
    monkeypatch.setattr(several_methods, "_MOST_REPEATS", 2)
    model = load_bench_model(str(tiny), [torch.device("cpu")], torch.float32)
    workloads = [Workload(tokens, 3, batch) for batch in (1, 2) for tokens in (20, 30)]
    sizes = [list(rows) for rows in measure_methods(model, workloads, [], specs_of_methods("snapkv,loki", {}, {}))]
    assert [[(row.tokens, row.batch) for row in rows] for rows in sizes] == [
        [(tokens, batch)] * 3 for tokens in (20, 30) for batch in (1, 2)
    ]
    assert not [row.error for rows in sizes for row in rows if row.error]
    # Once per length for all slots, and by each method once to compile and twice for its time; and loki's calibration.
    assert sorted(lengths) == [20] * 10 + [30] * 10 + [1024]


@pytest.mark.parametrize(
    ("times", "counted", "found"),
    [([9, 0.4, 0.3, 0.5, 0.1], 2, 0.3), ([9, 1.2, 0.1], 1, 1.2), ([0.1] + [0.05] * 12, 10, 0.05)],
)
def test_the_shortest_time_of_a_prompt_counts_after_the_one_that_compiles(
    times, counted, found, tiny, monkeypatch
) -> None:
    """Repeated for half a second, at most ten times."""
    prompt = several_methods.Prompt(load_bench_model(str(tiny), [torch.device("cpu")], torch.float32), 20)
    left = list(times)
    monkeypatch.setattr(several_methods.Prompt, "_prefill", lambda self, decoder: left.pop(0))
    assert prompt.seconds(MethodSpec("h2o")) == found and len(times) - len(left) == 1 + counted
    assert prompt.seconds(MethodSpec("h2o")) == found  # not measured again


def test_the_text_of_a_shared_prompt_is_that_of_a_computed_one(tiny) -> None:
    """Caches are filled with the same queries, keys and values."""
    from sparsecache.bench.several_methods import Prompt
    from sparsecache.engine.generator import Generator

    model = load_bench_model(str(tiny), [torch.device("cpu")], torch.float32)
    workload = Workload(30, 12, 2)
    prompt = Prompt(model, 30)
    for method in ("vanilla", "snapkv", "infinigen"):
        shared = Generator(model.decoder(method, prompts=prompt.computed), 2).generate(prompt.requests(workload))
        (first,) = model.engine(method).generate(Workload(30, 12).requests(model.vocab_size))
        assert [each.token_ids for each in shared] == [first.token_ids] * 2


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize(("methods", "kept"), [("kivi,quest", 0), ("snapkv,kivi", 32), ("h2o,snapkv", 50)])
def test_a_shared_prompt_keeps_the_queries_that_a_method_reads(methods, kept, tiny, monkeypatch) -> None:
    """More methods and longer prompts fit into memory. The measured steps are those of the computed prompt."""
    prompts, init = [], several_methods.Prompt.__init__

    def keep(self, *arguments) -> None:
        init(self, *arguments)
        prompts.append(self.computed)

    monkeypatch.setattr(several_methods.Prompt, "__init__", keep)
    model = load_bench_model(str(tiny), [torch.device("cpu")], torch.float32)
    (rows,) = ([*rows] for rows in measure_methods(model, [Workload(50, 3)], [], specs_of_methods(methods, {}, {})))
    assert [row.error for row in rows] == [None] * 3
    (prompt,) = prompts
    computed = prompt.get(torch.tensor(Workload(50, 2).requests(model.vocab_size)[0].token_ids))
    assert {q.shape[1] for q, _, _ in computed.layers} == {kept}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
def test_steps_are_graphs_on_a_gpu_and_caches_take_memory_there(tiny) -> None:
    model = load_bench_model(str(tiny), [torch.device("cuda")], torch.bfloat16)
    specs = specs_of_methods("snapkv,quest,infinigen", {"budget": "0.1", "offload": "true"}, {})
    (rows,) = ([*rows] for rows in measure_methods(model, [Workload(600, 8, 2)], [], specs))
    assert [(row.error, row.graph) for row in rows] == [(None, True)] * 4
    vanilla, snapkv, quest, infinigen = rows  # -o offload is an option of vanilla and infinigen
    assert vanilla.cache_host_bytes > 0 and infinigen.cache_host_bytes > 0
    assert quest.cache_gpu_bytes > snapkv.cache_gpu_bytes > 0 and quest.cache_host_bytes == 0


def test_a_method_that_cannot_be_made_is_a_line(table, tmp_path) -> None:
    source = """
from dataclasses import dataclass
from sparsecache.methods.random import Random

@dataclass
class Bad(Random):
    def __post_init__(self):
        raise RuntimeError("no method")
"""
    (tmp_path / "bad.py").write_text(source)
    done, rows = table(f"{tmp_path / 'bad.py'},quest", "--tokens", "20", "--new_tokens", "3")
    assert done.exit_code == 1 and f"bad, 20 tokens, batch 1: Method {tmp_path / 'bad.py'} fails" in done.stdout
    assert "RuntimeError: no method. The error is in " in done.stdout
    assert [row["name"] for row in rows] == ["vanilla", "bad", "quest"] and rows[2]["step_s"] > 0


def test_files_of_one_name_have_prompt_times_of_their_own(table, tmp_path) -> None:
    files = []
    for folder, pause in (("fast", 0.0), ("slow", 0.3)):
        file = tmp_path / folder / "own.py"
        file.parent.mkdir()
        file.write_text(f"""
import time
from dataclasses import dataclass
from sparsecache.methods.streaming import Streaming

@dataclass
class Own(Streaming):
    def check(self, shape):
        super().check(shape)

    def make_cache(self, layer, config):
        cache = super().make_cache(layer, config)
        prefill = cache.prefill
        cache.prefill = lambda *arguments: (time.sleep({pause}), prefill(*arguments))
        return cache
""")
        files.append(str(file))
    _, rows = table(",".join(files), "--tokens", "20", "--new_tokens", "3")
    vanilla, fast, slow = (row["prefill_overhead_s"] for row in rows)
    assert vanilla == 0 and slow - fast > 0.2


def test_a_method_that_fails_is_a_line_with_its_error(table, tmp_path) -> None:
    source = """
from dataclasses import dataclass
from sparsecache.methods.random import Random

@dataclass
class Bad(Random):
    def select(self, q, cache, slots):
        raise RuntimeError("no selection")
"""
    (tmp_path / "bad.py").write_text(source)
    done, rows = table(f"{tmp_path / 'bad.py'},quest", "--tokens", "20", "--new_tokens", "3")
    assert done.exit_code == 1
    assert [row["name"] for row in rows] == ["vanilla", "bad", "quest"]
    assert "no selection" in rows[1]["error"] and rows[1]["step_s"] is None and rows[2]["step_s"] > 0
    assert "bad, 20 tokens, batch 1: RuntimeError: 1 of 1 prompts failed: RuntimeError: no selection" in done.stdout


def test_a_size_that_does_not_fit_is_an_error_and_other_sizes_are_measured(table, monkeypatch) -> None:
    init = FullCache.__init__

    def limited(self, config, *arguments, **options) -> None:
        if config.slots > 2:
            raise torch.OutOfMemoryError("out of memory")
        init(self, config, *arguments, **options)

    monkeypatch.setattr(FullCache, "__init__", limited)
    done, rows = table("quest", "--tokens", "20", "--new_tokens", "3", "--batch", "3,2")
    assert done.exit_code == 1
    assert ["memory suffices for 2 of 3" in (row["error"] or "") for row in rows] == [True, True, False, False]


def test_prompts_that_take_too_long_are_not_waited_for(table, monkeypatch) -> None:
    monkeypatch.setattr("sparsecache.bench.timing._MAX_PROMPTS_SECONDS", 0.0)
    done, rows = table("vanilla", "--tokens", "20", "--new_tokens", "3")
    assert done.exit_code == 1 and "1 of them more than 0 s. Measure this method with --method." in rows[0]["error"]


def test_baselines_and_values_that_vary_are_lines_too(table) -> None:
    done, rows = table(
        "quest", "--tokens", "20", "--new_tokens", "3", "--vary", "budget=3,5", "--baselines", "transformers"
    )
    assert done.exit_code == 0, done.output
    assert [row["name"] for row in rows] == ["vanilla", "quest budget=3", "quest budget=5", "transformers"]
    assert rows[3]["step_s"] > 0 and rows[3]["vanilla_step_s"] == rows[0]["step_s"] and rows[3]["graph"] is None


def test_rows_before_an_interruption_are_saved(table, monkeypatch) -> None:
    decoder = BenchModel.decoder

    def interrupted(self, method="vanilla", *arguments, **options):
        if method == "quest":
            raise KeyboardInterrupt
        return decoder(self, method, *arguments, **options)

    monkeypatch.setattr(BenchModel, "decoder", interrupted)
    done, rows = table("quest", "--tokens", "20", "--new_tokens", "3")
    assert done.exit_code == 130 and [row["name"] for row in rows] == ["vanilla"]


def test_the_table_shows_ratios_of_the_measured_times() -> None:
    row = MethodRow(
        "own", 8192, 4, step_s=0.004, vanilla_step_s=0.006, roofline_s=0.003, kept=0.05, cache_gpu_bytes=3 * 2**29,
        cache_host_bytes=0, prefill_overhead_s=0.01, prompt_s=0.2, graph=True,
    )  # fmt: skip
    title, _, _, line = methods_table([row]).splitlines()
    assert title == "8,192 tokens, batch 4 (a prompt: 200 ms)"
    assert line.split() == ["own", "4.00", "1000.0", "1.50", "75.0", "5.0", "1.50", "0.00", "10.0", "5.0", "yes"]
    assert methods_table([MethodRow("own", 1, 1, error="why")]).splitlines()[3].split()[1:] == ["-"] * 9 + ["failed"]


def test_options_go_to_the_methods_that_have_them() -> None:
    specs = specs_of_methods("quest,vanilla,quest,infinigen", {"alpha": "inf", "budget": "0.1"}, {})
    assert specs == [
        MethodSpec("vanilla"),
        MethodSpec("quest", {"budget": "0.1"}),
        MethodSpec("infinigen", {"alpha": "inf", "budget": "0.1"}),
    ]
    with pytest.raises(UsageError, match=r"No method of --methods quest has an option 'bugdet'\. Did you mean"):
        specs_of_methods("quest", {"bugdet": "1"}, {})
    with pytest.raises(UsageError, match="budget='x' is not a number"):
        specs_of_methods("quest,h2o", {"budget": "x"}, {})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("decode --methods quset", "There is no method 'quset'; did you mean 'quest'?"),
        ("decode --methods quest,", "There is no method ''"),
        ("decode --methods all --method quest", "--method has no effect with --methods: leave one of them out."),
        ("decode --methods all --profile", "--profile has no effect with --methods"),
        ("replay --methods all --workload w.csv", "--methods has no effect in mode replay"),
    ],
)
def test_bad_arguments_are_refused_with_the_way_out(arguments, problem, bench) -> None:
    done = bench(*arguments.split())
    assert done.exit_code == 2 and problem in done.output


def test_a_named_shape_of_another_family_has_random_weights(monkeypatch, tmp_path: Path) -> None:
    """Tied and with biases, and saved as a checkpoint that loads."""
    from sparsecache.bench.models import SHAPES

    sizes = {"vocab_size": 5000, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setitem(SHAPES, "small", {**SHAPES["qwen2.5-1.5b"], **sizes})
    model = load_bench_model("small", [torch.device("cpu")], torch.float32)
    assert model.config.architectures == ["Qwen2ForCausalLM"] and model.architecture.tied
    model.save(tmp_path / "saved")
    again = load_bench_model(str(tmp_path / "saved"), [torch.device("cpu")], torch.float32)
    requests = Workload(9, 5).requests(model.vocab_size)
    texts = [[each.token_ids for each in own.engine().generate(requests)] for own in (model, again)]
    assert texts[0] == texts[1] and len(texts[0][0]) == 5
