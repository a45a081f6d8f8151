"""Our engine on a GPU: the text of transformers and of the CPU, with CUDA graphs and without, for every method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecache.cache.base import CacheMethod
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import family_names
from sparsecache.engine.generator import Generator
from sparsecache.engine.reference import TransformersEngine
from sparsecache.engine.steps import EagerSteps, GraphedSteps
from sparsecache.methods import make_method, method_names, parse_options
from sparsecache.testing.method_under_test import MethodUnderTest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
GPU = torch.device("cuda")
LENGTHS = (1, 5, 95, 96, 97, 300, 33)
INFINIGEN: list[dict[str, Any]] = [  # over tight options
    {"alpha": 4.0, "budget": 0.2, "skew": False},
    {"guess": "residual", "fetch": "per_head", "sinks": 1, "recent": 2, "budget": 9.0},
    {"offload": True, "alpha": torch.inf, "budget": 0.2},
    {"offload": True, "gpu_cache": 20, "budget": 0.2},
    {"alpha": torch.inf, "group": "softmax", "top_p": 0.9, "budget": 0.3},
    {"partial_bits": 4, "partial_weight_ratio": 1.0, "group": "softmax", "budget": 0.3},
    {"partial_bits": 8, "partial_weight_ratio": 0.5, "offload": True, "budget": 0.2},
]
QUANTISED: list[tuple[str, dict[str, Any]]] = [  # enough tokens for a tail and groups before it
    ("kivi", {"bits": 4, "group": 32, "residual": 32}),
    ("oracle", {"storage": "int8", "budget": 0.2}),
    ("quest", {"storage": "int4", "budget": 0.2}),
    ("adakv", {"storage": "int4", "budget": 0.9}),
]
TIGHT: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in method_names()]
SHADOWKV: list[dict[str, Any]] = [  # a low rank, and pages of all kinds
    {"rank": 20, "budget": 40.0, "outliers": 0.3, "recent": 0.3},
    {"rank": 20, "budget": 40.0, "outliers": 0.3, "recent": 0.3, "offload": True},
]
COMPOSED: list[dict[str, Any]] = [  # calibrated selections, and one that speculates on other streams
    {"select": "loki,budget=4,dense_layers=1"},
    {"select": "infinigen,budget=4,dense_layers=1"},
    {"select": "infinigen,budget=4,dense_layers=1,offload=true"},
]
SETTINGS = [
    *TIGHT,
    *QUANTISED,
    *(("composed", options) for options in COMPOSED),
    ("vanilla", {"offload": True}),
    *(("infinigen", options) for options in INFINIGEN),
    *(("shadowkv", options) for options in SHADOWKV),
]
every_method = pytest.mark.parametrize("name", method_names())


def _make(name: str, options: dict[str, Any] | None = None) -> CacheMethod:
    """Return a method with options that drop tokens of short prompts, and further options."""
    return make_method(name, {**parse_options(name, {}), **MethodUnderTest.of(name).tight, **(options or {})})


def _requests(
    lengths: tuple[int, ...] = LENGTHS, new_tokens: int = 64, stop_ids: tuple[int, ...] = ()
) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in lengths]
    return [Request(at, prompt, new_tokens, stop_ids) for at, prompt in enumerate(prompts)]


def _texts(engine: Any, requests: list[Request]) -> dict[int, list[int]]:
    done = list(engine.generate(requests))
    assert [each.error for each in done] == [None] * len(requests)
    return {each.key: each.token_ids for each in done}


@pytest.mark.parametrize("model_type", family_names())
@pytest.mark.parametrize("slots", [1, 4])
def test_float32_text_is_that_of_transformers(
    model_type: str, slots: int, make_checkpoint: Any, make_engine: Callable[..., Generator]
) -> None:
    folder = make_checkpoint(model_type)
    expected = _texts(TransformersEngine.load(folder, GPU, torch.float32), _requests())
    engine = make_engine(folder, slots, None, torch.float32, GPU)
    assert _texts(engine, _requests()) == expected
    assert max(len(set(tokens)) for tokens in expected.values()) > 20
    assert engine.stats.peak_gpu_bytes is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_as_close_to_float32_as_those_of_transformers(
    dtype: torch.dtype, make_checkpoint: Any, make_decoder: Callable[..., Decoder]
) -> None:
    folder = make_checkpoint()
    prompt = torch.tensor(_requests()[5].token_ids, device=GPU)
    decoder = make_decoder(folder, None, dtype, GPU)
    decoder.allocate(1, len(prompt) + 1, 1)
    with torch.inference_mode():
        exact, theirs = (
            TransformersEngine.load(folder, GPU, each).model(prompt[None]).logits[0, -1].double()
            for each in (torch.float32, dtype)
        )
        ours = decoder.prefill(prompt, 0).double()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize(("slots", "dtype"), [(1, torch.bfloat16), (2, torch.bfloat16), (5, torch.float32)], ids=str)
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_graphs_give_the_tokens_and_reports_of_eager_steps(
    name: str,
    options: dict[str, Any],
    slots: int,
    dtype: torch.dtype,
    make_checkpoint: Any,
    make_engine: Callable[..., Generator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Caches are allocated anew for longer prompts. Stop ids end some sequences, after which graphs run one step more.

    Kernels add up in another order in a batch of another size, so bfloat16 texts may differ then. Batches of 3
    sequences are padded to a graph of 4, and a step after a stop id still has the ended sequence. So batches in
    bfloat16 have 2 sequences and no stop ids.
    """
    folder, found = make_checkpoint("llama", num_hidden_layers=3), []
    stop_ids: tuple[int, ...] = ()
    if slots == 1 or dtype == torch.float32:
        free = _texts(make_engine(folder, 1, _make(name, options), dtype, GPU), _requests())
        stop_ids = tuple(tokens[3 + 7 * key] for key, tokens in free.items() if key % 2)
    for steps in (GraphedSteps, EagerSteps):
        if steps is EagerSteps:
            monkeypatch.setattr(Decoder, "graphable", False)
        engine = make_engine(folder, slots, _make(name, options), dtype, GPU)
        done = {each.key: each for each in engine.generate(_requests(stop_ids=stop_ids))}
        assert isinstance(engine._steps, steps)
        assert [each.error for each in done.values()] == [None] * len(LENGTHS)
        assert ("stop" in {each.finish_reason for each in done.values()}) == bool(stop_ids)
        found.append({key: (each.token_ids, each.report) for key, each in done.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_float32_text_is_that_of_the_cpu(
    name: str, options: dict[str, Any], make_checkpoint: Any, make_engine: Callable[..., Generator]
) -> None:
    folder, requests = make_checkpoint("llama", num_hidden_layers=3), _requests((5, 97, 33), 24)
    texts = [
        _texts(make_engine(folder, 3, _make(name, options), torch.float32, device), requests)
        for device in (GPU, torch.device("cpu"))
    ]
    assert texts[0] == texts[1]
    if name != "vanilla":
        assert texts[0] != _texts(make_engine(folder, 3, None, torch.float32, GPU), requests), "nothing was dropped"


@every_method
def test_free_slots_in_graphs_change_no_text(
    name: str, make_checkpoint: Any, make_engine: Callable[..., Generator]
) -> None:
    """Three sequences in five slots: the graph of four names a free slot at each step, far beyond its capacity."""
    folder, requests = make_checkpoint("llama", num_hidden_layers=3), _requests((9, 20, 13, 2, 17), 20)
    alone = _texts(make_engine(folder, 1, _make(name), torch.float32, GPU), requests)
    engine = make_engine(folder, 5, _make(name), torch.float32, GPU)
    engine.reserve(40)
    three = [requests[at] for at in (4, 1, 2)]
    for _ in range(4):
        assert _texts(engine, three) == {each.key: alone[each.key] for each in three}
    assert _texts(engine, requests) == alone  # the slots that were free take sequences
    assert isinstance(engine._steps, GraphedSteps)


@pytest.mark.parametrize("guess", ["input", "residual"])
def test_offload_and_gpu_cache_change_neither_text_nor_kept_share(
    guess: str, make_checkpoint: Any, make_engine: Callable[..., Generator]
) -> None:
    folder, reports = make_checkpoint("llama", num_hidden_layers=4), []
    for options in (
        {},
        {"offload": True},
        {"offload": True, "gpu_cache": 7},
        {"offload": True, "gpu_cache": 10_000},
    ):
        method = _make("infinigen", {"budget": 0.2, "guess": guess, **options})
        done = make_engine(folder, 3, method, torch.float32, GPU).generate(_requests())
        reports.append({each.key: (each.error, each.token_ids, each.report) for each in done})
    for key, (error, text, report) in reports[0].items():
        assert error is None
        fetched = []
        for other in reports[1:]:
            assert other[key][:2] == (None, text)
            assert {name: other[key][2][name] for name in report} == report
            fetched.append(other[key][2]["fetched_bytes"])
        assert fetched[0] >= fetched[1] >= fetched[2]
    assert sum(row[2]["fetched_bytes"] for row in reports[1].values()) > sum(
        row[2]["fetched_bytes"] for row in reports[3].values()
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_a_model_on_two_gpus_writes_the_text_of_one(
    name: str, options: dict[str, Any], make_checkpoint: Any, make_engine: Callable[..., Generator]
) -> None:
    folder, texts = make_checkpoint("llama", num_hidden_layers=4), []
    for devices in ([torch.device("cuda:0")], [torch.device("cuda:0"), torch.device("cuda:1")]):
        engine = make_engine(folder, 3, _make(name, options), torch.float32, devices)
        assert len(engine._decoder.devices) == len(devices)
        texts.append(_texts(engine, _requests()))
    assert texts[0] == texts[1]
