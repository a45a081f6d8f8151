"""Our engine on a GPU against transformers on the same GPU, over rows of all lengths, slots and dtypes."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecache.bench.models import load_subject
from sparsecache.bench.modes import Job
from sparsecache.cache.base import Method
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import family_names, load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.rope import Rope
from sparsecache.engine.steps import GraphedSteps
from sparsecache.kernels import attention
from sparsecache.methods import load_method, make_method, method_names, method_options, parse_options
from sparsecache.methods.vanilla import Vanilla

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")
LENGTHS = (1, 5, 95, 96, 97, 300, 33)


def _engine(folder: Path, slots: int, dtype: torch.dtype, method: Method | None = None) -> tuple[Generator, Decoder]:
    checkpoint, method = Checkpoint(folder), method or Vanilla()
    architecture = load_family(checkpoint.model_type).architecture(checkpoint.config)
    decoder = Decoder(architecture, checkpoint.load(architecture, GPU, dtype), Rope(checkpoint.config, GPU), method)
    return Generator(decoder, method, slots), decoder


def _requests(stop_ids: tuple[int, ...] = ()) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    return [
        Request(at, torch.randint(3, 1024, (length,), generator=generator).tolist(), 64, stop_ids)
        for at, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("model_type", family_names())
@pytest.mark.parametrize("slots", [1, 4])
def test_float32_text_is_that_of_transformers(model_type: str, slots: int, make_checkpoint: Any) -> None:
    folder = make_checkpoint(model_type)
    theirs = {
        done.key: done.token_ids for done in TransformersEngine.load(folder, GPU, torch.float32).generate(_requests())
    }
    engine, _ = _engine(folder, slots, torch.float32)
    ours = {done.key: done.token_ids for done in engine.generate(_requests())}
    assert ours == theirs
    assert max(len(set(tokens)) for tokens in ours.values()) > 20
    assert engine.clock.peak_gpu_bytes is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_as_near_to_float32_as_those_of_transformers(
    dtype: torch.dtype, make_checkpoint: Any
) -> None:
    folder = make_checkpoint("llama")
    prompt = torch.tensor(_requests()[5].token_ids, device=GPU)
    exact = TransformersEngine.load(folder, GPU, torch.float32)._model(prompt[None]).logits[0, -1].double()
    theirs = TransformersEngine.load(folder, GPU, dtype)._model(prompt[None]).logits[0, -1].double()
    engine, decoder = _engine(folder, 1, dtype)
    engine.reserve(400)
    with torch.inference_mode():
        ours = decoder.prefill(prompt, 0, 1).double()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("slots", [1, 3, 17])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vanilla", {}),
        ("vanilla", {"offload": "true"}),
        ("infinigen", {"budget": "0.2", "alpha": "4", "skew": "false", "dense_layers": "1"}),
        ("infinigen", {"budget": "0.2", "alpha": "inf", "skew": "false", "dense_layers": "1", "offload": "true"}),
        ("infinigen", {"budget": "0.2", "skew": "false", "dense_layers": "1", "offload": "true", "gpu_cache": "20"}),
        ("infinigen", {"budget": "9", "skew": "false", "dense_layers": "1", "guess": "residual", "fetch": "per_head"}),
    ],
    ids=str,
)
def test_a_graph_replays_what_is_launched_call_by_call(
    name: str, options: dict[str, str], slots: int, dtype: torch.dtype, make_checkpoint: Any
) -> None:
    """The same kernels in the same order, hence the same bits; rooms grow on the way, so that graphs are made anew.

    Stop ids end some sequences, of which a graph then takes one step too far.
    """
    folder, found = make_checkpoint("llama", num_hidden_layers=3), []
    engine, _ = _engine(folder, 1, dtype, make_method(name, parse_options(name, options)))
    stop_ids = tuple(done.token_ids[3 + 7 * done.key] for done in engine.generate(_requests()) if done.key % 2)
    for graphed in (True, False):
        engine, decoder = _engine(folder, slots, dtype, make_method(name, parse_options(name, options)))
        decoder.graphable = decoder.graphable and graphed
        done = {each.key: each for each in engine.generate(_requests(stop_ids))}
        assert {each.finish_reason for each in done.values()} >= {"stop"}
        assert isinstance(engine._steps, GraphedSteps) == graphed
        assert [each.error for each in done.values()] == [None] * len(LENGTHS)
        found.append({key: (each.token_ids, each.report) for key, each in done.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "in host memory"])
@pytest.mark.parametrize("name", method_names())
def test_a_prompt_is_launched_without_waiting_for_the_device(name: str, offload: bool, make_checkpoint: Any) -> None:
    """So that what the next prompt needs is made ready meanwhile; with each method's tight options."""
    known = method_options(load_method(name))
    if offload and "offload" not in known:
        pytest.skip("the method keeps nothing in host memory")
    chosen = {"offload": offload, "skew": False, **load_method(name).tight}
    method = make_method(name, {key: value for key, value in chosen.items() if key in known})
    engine, decoder = _engine(make_checkpoint("llama", num_hidden_layers=3), 2, torch.bfloat16, method)
    engine.reserve(400)
    prompt = torch.tensor(_requests()[5].token_ids, device=GPU)
    with torch.inference_mode():
        whole = decoder.prefill(prompt, 0, 1)  # compiles
        method.release(0)
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)
        awake = torch.cuda.current_stream().record_event()
        again = decoder.prefill(prompt, 0, 1)
        assert not awake.query()
    assert torch.equal(again, whole)


def test_a_prompt_on_its_way_to_the_host_takes_no_more_room_with_more_layers(make_checkpoint: Any) -> None:
    """However far the host is ahead of the device."""
    prompt, peaks = torch.ones(4000, device=GPU, dtype=torch.int64), []
    for layers in (4, 24):
        method = make_method("infinigen", parse_options("infinigen", {"skew": "false", "offload": "true"}))
        folder = make_checkpoint("llama", num_hidden_layers=layers)
        engine, decoder = _engine(folder, 1, torch.bfloat16, method)
        engine.reserve(len(prompt) + 1)
        with torch.inference_mode():
            decoder.prefill(prompt, 0, 1)  # compiles
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["active_bytes.all.current"]  # with what another stream still reads
            torch.cuda._sleep(10**9)
            decoder.prefill(prompt, 0, 1)
            torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"] - before)
    shape = decoder.shape
    assert peaks[1] < peaks[0] + 3 * (2 * shape.kv_heads * len(prompt) * shape.head_dim * 2)  # rows of three layers


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every call of torch's attention: what cuDNN's plans are kept by, and whether it may make one."""
    calls: list[dict[str, Any]] = []
    whole = attention.scaled_dot_product_attention

    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        key = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors], options.get("enable_gqa")
        causal, planned = bool(options.get("is_causal")), torch.backends.cuda.cudnn_sdp_enabled()
        calls.append({"key": key, "causal": causal, "planned": planned})
        return whole(*tensors, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    return calls


def test_cudnn_attends_to_prompts_alone(make_checkpoint: Any, attended: list[dict[str, Any]]) -> None:
    """What single tokens attend to is of a new length at every step."""
    method = make_method("infinigen", parse_options("infinigen", {"capacity": "0.5", "skew": "false"}))
    engine, _ = _engine(make_checkpoint(), 2, torch.bfloat16, method)
    assert all(done.error is None for done in engine.generate(_requests()))
    assert {(call["causal"], call["planned"]) for call in attended} == {(True, True), (False, False)}


@pytest.mark.parametrize("tokens", [1, 511, 600, 1024])
def test_a_prompt_finds_the_plan_that_was_made_for_it(
    tokens: int, make_checkpoint: Any, attended: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_plans", set())
    _, decoder = _engine(make_checkpoint(), 1, torch.bfloat16, method := Vanilla())
    method.allocate(decoder.shape, 1, tokens + 1, GPU, torch.bfloat16)
    with torch.inference_mode():
        decoder.expect(tokens)
        decoder.prefill(torch.ones(tokens, device=GPU, dtype=torch.int64), 0, 1)
        planned, *others = [call["key"] for call in attended if call["causal"]]
        assert others and all(key == planned for key in others)
        before = len(attended)
        decoder.expect(tokens)
        assert len(attended) == before


def test_a_prompt_is_attended_to_without_its_whole_score_matrix(make_checkpoint: Any) -> None:
    engine, decoder = _engine(make_checkpoint("llama"), 1, torch.bfloat16)
    length = 30_000
    engine.reserve(length + 1)
    engine.reset_clock()
    before = torch.cuda.memory_allocated()
    (done,) = engine.generate([Request(0, torch.randint(3, 1024, (length,)).tolist(), 1, ())])
    assert done.error is None and engine.clock.peak_gpu_bytes is not None
    assert engine.clock.peak_gpu_bytes - before < length**2 / 2  # one head's scores take four times as much
    assert engine.clock.peak_gpu_bytes - before < 2 * decoder.prompt_nbytes(length)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vanilla", {}),
        ("infinigen", {"budget": "0.2", "dense_layers": "1"}),
        ("infinigen", {"offload": "true"}),
        ("infinigen", {"offload": "true", "gpu_cache": "64", "budget": "32"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["tiny", "llama-3.1-8b"])
def test_a_model_split_over_two_gpus_writes_the_text_of_one(
    model: str, name: str, options: dict[str, str], make_checkpoint: Any
) -> None:
    if model != "tiny" and torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a GPU of 24 GiB")
    if model == "tiny":
        model = str(make_checkpoint("llama", num_hidden_layers=4))
    texts = []
    for gpus in (1, 2):
        subject = load_subject(model, [torch.device("cuda", at) for at in range(gpus)], torch.bfloat16)
        prompts = Job(3000, 40, 2).requests(subject.architecture.vocabulary)
        engine = subject.engine(name, options, slots=2)
        texts.append({done.key: done.token_ids for done in engine.generate(prompts)})
        assert len(engine._decoder.devices) == gpus
        del subject, engine
    assert texts[0] == texts[1] and all(len(text) == 40 for text in texts[0].values())
