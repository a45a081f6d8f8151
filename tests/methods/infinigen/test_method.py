"""InfiniGen as a whole: every step against the slow one, no loss where none is allowed, reports."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsecache.kernels.attention
import sparsecache.kernels.decode
import sparsecache.methods.infinigen
from sparsecache.cache.base import Method, Shape
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import family_names, load_family
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.rope import Rope
from sparsecache.kernels._triton import INTERPRETED, running
from sparsecache.kernels.attention import attention, attention_over_rows
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.methods.vanilla import Vanilla

CPU = torch.device("cpu")
SHAPES = {
    "mha-32": Shape(layers=3, heads=2, kv_heads=2, head_dim=32),
    "gqa2-64": Shape(layers=3, heads=4, kv_heads=2, head_dim=64),
    "gqa4-128": Shape(layers=2, heads=8, kv_heads=2, head_dim=128),
    "gqa8-64": Shape(layers=2, heads=8, kv_heads=1, head_dim=64),
    "gqa3-32": Shape(layers=2, heads=9, kv_heads=3, head_dim=32),
}
CHOICES: list[dict[str, Any]] = [
    {"alpha": 4.0, "budget": 0.5},
    {"alpha": 4.0, "budget": 0.5, "fetch": "per_head", "partial_weight_ratio": 0.25},
    {"alpha": 3.0, "budget": 1.0, "skew": False, "partial_weight_ratio": 0.3},
    {"alpha": 1.0, "budget": 9, "sinks": 2, "recent": 3, "partial_weight_ratio": 0.5},
    {"alpha": math.inf, "budget": 0.15, "fetch": "per_head"},
    {"alpha": 0.0, "budget": 0.5},
    {"alpha": 2.0, "budget": 3, "sinks": 2, "recent": 4},  # more than the budget: the lower positions
    {"alpha": 2.0, "budget": 3, "sinks": 10**30, "recent": 10**30},
]
every_family = pytest.mark.parametrize("model_type", family_names())


# Every step against the slow one.


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_selections_and_outputs_are_those_of_the_page(shape, options, play) -> None:
    played = play(shape, (23, 9), options)
    sizes = {len(chosen) for _ in range(5) for step in played.step() for row in step.selected for chosen in row}
    assert options["alpha"] in (0, math.inf) or len(sizes) > 1 or options["budget"] == 3, "else it shows little"


@pytest.mark.parametrize("fetch", ["mean", "per_head"])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2)])
def test_ties_too(heads, kv_heads, head_dim, fetch, play, small_numbers) -> None:
    shape = Shape(layers=3, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    options = {"skew": False, "budget": 7, "fetch": fetch, "partial_weight_ratio": 0.5}
    for alpha in (4 / head_dim**0.5, math.inf):
        played = play(shape, (40, 13), {**options, "alpha": alpha}, draw=small_numbers(head_dim + heads))
        for _ in range(6):
            played.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_the_same_where_it_is_exact(dtype, play, small_numbers) -> None:
    options = {"skew": False, "budget": 7, "alpha": 1.0, "capacity": 14, "offload": True, "gpu_cache": 4}
    played = play(SHAPES["gqa2-64"], (40, 13), options, draw=small_numbers(3), dtype=dtype)
    for _ in range(7):
        played.step()
    assert played.method._pool.keys.dtype == played.method._partial.keys.dtype == dtype


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels in test_cuda.py; a CPU needs the package triton")
@pytest.mark.parametrize("shape", ["gqa2-64", "gqa4-128"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 2.0, "budget": 0.4},
        {"alpha": 4.0, "budget": 7, "fetch": "per_head", "sinks": 1, "recent": 2},
        {"alpha": math.inf, "budget": 0.3, "offload": True, "skew": False},
    ],
    ids=str,
)
def test_kernels_select_and_attend_as_the_page_says(options, shape, play) -> None:
    """Through Triton's interpreter on the CPU: what a GPU runs when no token is ever evicted."""
    with running("kernels"):
        played = play(SHAPES[shape], (30, 9), {"partial_weight_ratio": 0.5, **options}, draw=None)
        assert played.method.graphable and played.method._unbounded is not None
        for order in ([0, 1], [1], [1, 0]):
            played.step(order)
        report = played.method.report(1)
    assert report["sparse_steps"] == 2 and 0 < report["kept"] <= 1
    assert (report.get("fetched_bytes", 0) > 0) == options.get("offload", False)


def test_rows_of_a_batch_in_any_order_and_steps_without_some(play) -> None:
    played = play(SHAPES["gqa2-64"], (23, 9, 31), {"alpha": 4.0, "budget": 0.5}, new_tokens=12)
    for order in ([0, 1, 2], [2, 0, 1], [1], [2, 1], [0], [1, 0, 2], [2]):
        played.step(order)


def test_dense_layers_are_dense_and_the_others_as_ever(play) -> None:
    shape = Shape(layers=4, heads=4, kv_heads=2, head_dim=32)
    for dense in (1, 2, 3):
        played = play(shape, (20,), {"alpha": 4.0, "budget": 0.5, "dense_layers": dense})
        assert [len(played.step()) for _ in range(3)] == [4 - dense] * 3
        assert played.method.report(1)["dense_layers"] == dense


# No loss where none is allowed.


def _decoders(model_type: str, options: dict[str, Any], decoder: Any) -> tuple[Method, Decoder, Method, Decoder]:
    vanilla, method = Vanilla(), InfiniGen(**options)
    return vanilla, decoder(model_type, vanilla), method, decoder(model_type, method)


@torch.inference_mode()
def _compare_logits(first: Decoder, second: Decoder, prompt: list[int], steps: int) -> None:
    """Both are given the tokens that the first chooses; every logit must agree, and every choice."""
    token_ids = torch.tensor(prompt)
    slot = torch.tensor([1])
    for each in (first, second):
        each._method.allocate(each.shape, 2, len(prompt) + steps, CPU, each.dtype)
    logits = [each.prefill(token_ids, 1, steps) for each in (first, second)]
    for at in range(steps - 1):
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        chosen = logits[0].argmax()
        assert chosen == logits[1].argmax()
        position = torch.tensor([len(prompt) + at])
        logits = [each.step(chosen[None], position, slot)[0] for each in (first, second)]


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {"dense_layers": 1},
        {"dense_layers": 2, "fetch": "per_head", "skew": False, "guess": "own_norm"},
        {"dense_layers": 1, "offload": True, "gpu_cache": 5, "guess": "residual", "partial_weight_ratio": 0.25},
    ],
    ids=["defaults", "per head, unskewed", "offloaded"],
)
def test_no_limits_give_the_logits_of_vanilla_step_by_step(options, model_type, decoder) -> None:
    _, whole, method, ours = _decoders(model_type, {"budget": 1.0, "alpha": math.inf, **options}, decoder)
    _compare_logits(whole, ours, [0, *range(300, 345)], 14)
    assert method.report(1)["kept"] == 1.0 and method.report(1)["sparse_steps"] == 13


@every_family
def test_only_dense_layers_give_the_logits_of_vanilla_step_by_step(model_type, decoder) -> None:
    _, whole, method, ours = _decoders(model_type, {"budget": 0.01, "alpha": 0.0, "dense_layers": 3}, decoder)
    _compare_logits(whole, ours, [0, *range(300, 345)], 14)
    assert method.report(1) == {"kept": None, "sparse_steps": 0, "capped_steps": 0, "dense_layers": 3}


@every_family
def test_limits_change_the_logits(model_type, decoder) -> None:
    """Else the two tests above would show nothing."""
    _, whole, _, ours = _decoders(model_type, {"budget": 3, "alpha": 1.0, "dense_layers": 1}, decoder)
    with pytest.raises(AssertionError):
        _compare_logits(whole, ours, [0, *range(300, 345)], 14)


def test_the_trained_checkpoint_loses_nothing_without_limits_and_drops_most_with_the_defaults(repo) -> None:
    folder = repo / "sparsecache" / "demo" / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no trained checkpoint in {folder}")
    found = Checkpoint(folder)
    architecture = load_family(found.model_type).architecture(found.config)
    weights = found.load(architecture, CPU, torch.float32)
    lossless, defaults = InfiniGen(budget=1.0, alpha=math.inf), InfiniGen()
    made = [Decoder(architecture, weights, Rope(found.config, CPU), each) for each in (Vanilla(), lossless, defaults)]
    token_ids = found.tokenizer(str(lossless.calibration_text()))["input_ids"]
    with torch.inference_mode():
        made[1].calibrate(torch.tensor(token_ids[:600]), lambda layers: None)
    defaults.restore(lossless.calibration(), made[2].shape)
    _compare_logits(made[0], made[1], token_ids[-300:], 10)
    (done,) = Generator(made[2], defaults, 1).generate([Request(0, token_ids[-300:], 10, ())])
    assert done.error is None and 0 < done.report["kept"] < 0.2


def test_prefill_and_decode_go_through_the_plain_attention_functions(decoder, monkeypatch) -> None:
    """Those of kernels/attention.py, which know of no backend that a method would choose."""
    asked: list[tuple[int, str | None]] = []

    def note(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        asked.append((q.shape[2], next((key for key, value in options.items() if value is not None), None)))
        return attention(q, k, v, **options)

    def note_rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        asked.append((q.shape[2], "rows"))
        return attention_over_rows(q, k, v, seen)

    for module in (sparsecache.kernels.attention, sparsecache.kernels.decode):
        monkeypatch.setattr(module, "attention", note)
    monkeypatch.setattr(sparsecache.methods.infinigen, "attention_over_rows", note_rows)
    method = InfiniGen(dense_layers=1, skew=False)
    (done,) = Generator(decoder("llama", method), method, 1).generate([Request(0, [0, 7, 8, 9], 3, ())])
    assert done.error is None
    prompt = [(4, "causal"), (4, "causal"), (1, "causal")]  # of the last layer only the last token is asked for
    assert asked == prompt + 2 * [(1, None), (1, "rows"), (1, "rows")]


# What was done before, beside it, or in another slot.


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 0.3, "eviction": "counter"},
        {"capacity": 20, "eviction": "lru", "offload": True, "gpu_cache": 6},
        {"capacity": 12, "eviction": "fifo", "sinks": 2, "recent": 2, "guess": "residual"},
        {"offload": True, "gpu_cache": 9, "fetch": "per_head", "guess": "own_norm"},
    ],
    ids=str,
)
def test_a_text_and_its_report_depend_on_its_prompt_alone(options, decoder) -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in (50, 6, 31)]

    def texts(slots: int, order: list[int]) -> dict[int, Any]:
        method = InfiniGen(**{"budget": 5, "alpha": 3.0, "dense_layers": 1, **options})
        engine = Generator(decoder("qwen2", method), method, slots)
        done = engine.generate(Request(at, prompts[at], 16, ()) for at in order)
        return {each.key: (each.error, each.token_ids, each.report) for each in done}

    alone = {at: texts(1, [at])[at] for at in range(3)}
    assert all(error is None for error, _, _ in alone.values())
    for slots in (1, 2, 3):
        for order in ([0, 1, 2], [2, 1, 0], [1, 0, 1, 2]):
            assert texts(slots, order) == alone


def test_a_step_may_name_slots_that_hold_nothing_at_all() -> None:
    shape = Shape(layers=3, heads=4, kv_heads=2, head_dim=16)
    for options in ({}, {"capacity": 0.5}, {"offload": True, "gpu_cache": 4}, {"sinks": 2, "recent": 2}):
        method = InfiniGen(skew=False, **options)
        method.allocate(shape, 2, 5, CPU, torch.float32)
        for _ in range(9):  # more often than there is room
            for layer in range(3):
                if method.guesses(layer):
                    method.anticipate(layer, torch.randn(2, 4, 1, 16), torch.tensor([1, 0]))
                out = method.attend(layer, torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 2, 1, 16), torch.tensor([1, 0]))
                assert out.isfinite().all()


# Never more than the cap; more with wider options.


@pytest.mark.parametrize("fetch", ["mean", "per_head"])
@pytest.mark.parametrize("budget", [0.001, 0.1, 0.3, 0.7, 2, 6, 1000])
def test_never_more_than_the_cap_and_the_current_token(budget, fetch, play) -> None:
    played = play(
        SHAPES["gqa2-64"], (37, 8), {"budget": budget, "alpha": 6.0, "fetch": fetch}, new_tokens=14, compare=False
    )
    for at in range(13):
        for step in played.step():
            for past, chosen in zip((37 + at, 8 + at), step.selected, strict=True):
                cap = max(1, math.floor(budget * past + 1e-6)) if budget <= 1 else budget
                assert max(map(len, chosen)) <= min(cap, past)
    report = played.method.report(1)
    assert report["capped_steps"] == (13 if budget != 1000 else 0)


def test_a_share_of_past_tokens_is_counted_exactly(play) -> None:
    """0.7 x 10 is a little under 7 in floating point, and 0.29 x 100 a little under 29."""
    shape = Shape(layers=2, heads=2, kv_heads=1, head_dim=32)
    for share, past, cap in ((0.7, 10, 7), (0.29, 100, 29), (0.1, 30, 3), (0.2, 4, 1), (0.35, 20, 7), (1.0, 9, 9)):
        (step,) = play(shape, (past,), {"budget": share, "alpha": math.inf}).step()
        assert len(step.selected[0][0]) == cap


@pytest.mark.parametrize(
    "growing",
    [[{"alpha": a, "budget": 9} for a in (0.0, 1.0, 2.0, 4.0, 8.0, math.inf)],
     [{"alpha": 5.0, "budget": b} for b in (0.001, 0.1, 0.3, 12, 17, 1.0)]],
    ids=["alpha", "budget"],
)  # fmt: skip
@pytest.mark.parametrize("fetch", ["mean", "per_head"])
def test_the_selection_of_a_step_grows_with_alpha_and_with_the_budget(growing, fetch, play) -> None:
    before = None
    for options in growing:
        played = play(SHAPES["gqa4-128"], (40, 21), {**options, "fetch": fetch}, compare=False)
        chosen = [set(head) for step in played.step() for row in step.selected for head in row]
        assert before is None or all(few <= many for few, many in zip(before, chosen, strict=True))
        before = chosen
    assert before is not None and all(before)


# What is reported.


@pytest.mark.parametrize("options", [{"budget": 6}, {"budget": 0.3, "fetch": "per_head"}, {"capacity": 12}], ids=str)
def test_reports_equal_a_count_by_hand(options, play) -> None:
    options = {"alpha": 3.0, "dense_layers": 1, **options}
    played = play(SHAPES["gqa2-64"], (15, 4), options, new_tokens=9)
    steps = [played.step() for _ in range(8)]
    for row, length in enumerate((15, 4)):
        shares, capped = [], 0
        for at, layers in enumerate(steps):
            past = length + at
            shares += [sum(map(len, step.selected[row])) / 2 / past for step in layers]
            capped += past > played.slow[1, row].cap(past)
        report = played.method.report(row + 1)
        assert report.pop("kept") == pytest.approx(sum(shares) / len(shares))
        assert report == {"sparse_steps": 8, "dense_layers": 1, "capped_steps": capped}
        assert capped == (5 if options.get("budget") == 6 and row == 1 else 8)


def test_a_row_without_a_step_has_kept_nothing_to_speak_of_nor_has_a_released_slot(play) -> None:
    nothing = {"kept": None, "sparse_steps": 0, "dense_layers": 1, "capped_steps": 0}
    nothing_fetched = {**nothing, "fetched_bytes": 0, "gpu_cache_hit": None}
    for options, expected in (({}, nothing), ({"offload": True, "gpu_cache": 3}, nothing_fetched)):
        played = play(SHAPES["mha-32"], (15,), options)
        assert played.method.report(1) == expected
        played.step()
        assert played.method.report(1).keys() == expected.keys() and played.method.report(1) != expected
        played.method.release(1)
        assert played.method.report(1) == expected
