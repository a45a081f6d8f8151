"""Every step of InfiniGen against the slow reference, and what must hold for any selection and report."""

import math
from typing import Any

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.kernels._triton import INTERPRETED, force_backend
from sparsecache.methods import parse_options
from sparsecache.methods.infinigen import PAPER, InfiniGen
from sparsecache.methods.infinigen.cache import InfiniGenCache
from tests.methods.infinigen.compared import CPU, SHAPES, ComparedRun, GivenQuery, small_numbers

DEFAULTS: dict[str, Any] = {"partial_bits": 4, "partial_weight_ratio": None, "group": "max"}
OPTIONS: list[dict[str, Any]] = [
    {"alpha": 4.0, "budget": 0.5},
    {"alpha": 4.0, "budget": 0.5, "fetch": "per_head", "partial_weight_ratio": 0.25},
    {"alpha": 3.0, "budget": 1.0, "skew": False, "partial_weight_ratio": 0.3},
    {"alpha": 1.0, "budget": 9, "sinks": 2, "recent": 3, "partial_weight_ratio": 0.5},
    {"alpha": math.inf, "budget": 0.15, "fetch": "per_head"},
    {"alpha": 0.0, "budget": 0.5},
    {"alpha": 2.0, "budget": 3, "sinks": 2, "recent": 4},  # more than the budget: the lower positions
    {"alpha": 2.0, "budget": 3, "sinks": 10**30, "recent": 10**30},
    {"alpha": math.inf, "budget": 0.5, "group": "softmax", "top_p": 0.8, "fetch": "per_head"},
    {"alpha": 3.0, "budget": 0.5, "top_p": 0.6, "sinks": 1},
    {**PAPER, "dense_layers": 1},
    {**DEFAULTS, "alpha": math.inf, "budget": 0.3},
    {**DEFAULTS, "alpha": 4.0, "budget": 0.5},
    {"alpha": 4.0, "budget": 0.5, "partial_weight_ratio": 1.0},
    {"alpha": 4.0, "budget": 0.5, "partial_weight_ratio": 1.0, "partial_bits": 8, "fetch": "per_head"},
    {"alpha": math.inf, "budget": 0.3, "partial_weight_ratio": 1.0, "partial_bits": 4, "group": "softmax", "top_p": 0.9,
     "fetch": "per_head"},
    {"alpha": 3.0, "budget": 0.5, "partial_weight_ratio": 0.5, "partial_bits": 4, "skew": False},
    {"alpha": 3.0, "budget": 0.5, "partial_weight_ratio": 0.25, "partial_bits": 8},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_selections_and_outputs_equal_the_reference(shape, options) -> None:
    run = ComparedRun(shape, (23, 9), options)
    sizes = {len(head) for _ in range(4) for step in run.step() for row in step.selected for head in row}
    assert options["alpha"] in (0, math.inf) or len(sizes) > 1 or options["budget"] == 3, "else it shows little"


@pytest.mark.parametrize("fetch", ["mean", "per_head"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 16), (4, 2, 64), (8, 2, 16)])
def test_ties_too(heads, kv_heads, head_dim, fetch) -> None:
    shape = Shape(layers=2, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    options = {"skew": False, "budget": 7, "fetch": fetch, "partial_weight_ratio": 0.5}
    for alpha in (4 / head_dim**0.5, math.inf):
        run = ComparedRun(shape, (40, 13), {**options, "alpha": alpha}, draw=small_numbers(head_dim + heads))
        for _ in range(6):
            run.step()


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_the_same_where_it_is_exact(dtype, ratio) -> None:
    options = {"skew": False, "budget": 7, "alpha": 1.0, "offload": True, "gpu_cache": 4, "partial_weight_ratio": ratio}
    run = ComparedRun(SHAPES["gqa2-64"], (40, 13), options, draw=small_numbers(3), dtype=dtype)
    for _ in range(7):
        run.step()
    cache = run.layer(1)
    assert cache.store.dtype == cache._partial.keys.dtype == dtype


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels in test_cuda.py; a CPU needs the package triton")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(layers=2, heads=4, kv_heads=2, head_dim=64), {"alpha": 2.0, "budget": 0.4}),
        (SHAPES["gqa4-128"], {"alpha": 4.0, "budget": 7, "fetch": "per_head", "sinks": 1, "recent": 2}),
        (SHAPES["gqa3-32"], {"alpha": math.inf, "budget": 0.3, "offload": True, "skew": False}),
        (SHAPES["gqa3-32"], {"alpha": 2.0, "budget": 0.4, "partial_weight_ratio": 1.0}),
        (SHAPES["gqa2-64"], {"alpha": math.inf, "budget": 0.3, "partial_weight_ratio": 1.0, "partial_bits": 4}),
        (SHAPES["gqa3-32"], {"alpha": 4.0, "budget": 0.4, "partial_bits": 4, "skew": False, "offload": True}),
        (SHAPES["mha-32"], {"alpha": 4.0, "budget": 0.4, "partial_weight_ratio": 1.0, "partial_bits": 8}),
    ],
    ids=str,
)
def test_kernels_select_and_attend_as_the_reference(shape, options) -> None:
    """In Triton's interpreter: what a GPU runs."""
    with force_backend("kernels"):
        run = ComparedRun(shape, (30, 9), {"partial_weight_ratio": 0.5, **options})
        for rows in ([0, 1], [1], [1, 0]):
            run.step(rows)
        assert run.cache.graphable
        report = run.report(0)
    assert report["sparse_steps"] == 2 and 0 < report["kept"] <= 1
    assert (report.get("fetched_bytes", 0) > 0) == options.get("offload", False)


def test_the_compared_defaults_are_those_of_the_method() -> None:
    assert DEFAULTS.items() <= parse_options("infinigen", {}).items()


def test_rows_of_a_batch_in_any_order_and_steps_without_some() -> None:
    run = ComparedRun(SHAPES["gqa2-64"], (23, 9, 31), {"alpha": 4.0, "budget": 0.5}, new_tokens=12)
    for rows in ([0, 1, 2], [2, 0, 1], [1], [2, 1], [0], [1, 0, 2], [2]):
        run.step(rows)


def test_the_first_layers_are_dense() -> None:
    shape = Shape(layers=4, heads=4, kv_heads=2, head_dim=32)
    for dense in (1, 2, 3):
        run = ComparedRun(shape, (20,), {"alpha": 4.0, "budget": 0.5, "dense_layers": dense})
        assert [len(run.step()) for _ in range(3)] == [4 - dense] * 3
        assert [cache.sparse for cache in run.cache.layers] == [False] * dense + [True] * (4 - dense)
        assert run.report(0)["dense_layers"] == dense


@pytest.mark.parametrize("options", [{}, {"offload": True, "gpu_cache": 4}, {"sinks": 2, "recent": 2}], ids=str)
def test_steps_may_name_free_slots_beyond_their_capacity(options) -> None:
    shape = Shape(layers=3, heads=4, kv_heads=2, head_dim=16)
    cache = ModelCache(InfiniGen(skew=False, dense_layers=1, **options), shape, [CPU] * 3, 2, 5, 5, torch.float32)
    slots = torch.tensor([1, 0])
    for _ in range(9):
        for layer in cache.layers:
            if isinstance(layer, InfiniGenCache):
                layer.speculate(torch.randn(2, 4, 1, 16), GivenQuery(), slots)
            out = layer.attend(torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 2, 1, 16), slots)
            assert out.isfinite().all()
        cache.end_step(slots)


@pytest.mark.parametrize("fetch", ["mean", "per_head"])
@pytest.mark.parametrize("budget", [0.001, 0.1, 0.3, 0.7, 2, 6, 1000])
def test_no_step_selects_more_than_the_budget(budget, fetch) -> None:
    options = {"budget": budget, "alpha": 6.0, "fetch": fetch}
    run = ComparedRun(SHAPES["gqa2-64"], (37, 8), options, new_tokens=14, compare=False)
    for at in range(13):
        for step in run.step():
            for past, selected in zip((37 + at, 8 + at), step.selected, strict=True):
                cap = max(1, math.floor(budget * past + 1e-6)) if budget <= 1 else budget
                assert max(map(len, selected)) <= min(cap, past)
    assert run.report(0)["capped_steps"] == (13 if budget != 1000 else 0)


def test_a_share_of_past_tokens_is_counted_exactly() -> None:
    """0.7 x 10 is a little under 7 in floating point, and 0.29 x 100 a little under 29."""
    shape = Shape(layers=2, heads=2, kv_heads=1, head_dim=32)
    for share, past, cap in ((0.7, 10, 7), (0.29, 100, 29), (0.1, 30, 3), (0.2, 4, 1), (0.35, 20, 7), (1.0, 9, 9)):
        (step,) = ComparedRun(shape, (past,), {"budget": share, "alpha": math.inf}).step()
        assert len(step.selected[0][0]) == cap


@pytest.mark.parametrize(
    "growing",
    [[{"alpha": a, "budget": 9} for a in (0.0, 1.0, 2.0, 4.0, 8.0, math.inf)],
     [{"alpha": 5.0, "budget": b} for b in (0.001, 0.1, 0.3, 12, 17, 1.0)]],
    ids=["alpha", "budget"],
)  # fmt: skip
@pytest.mark.parametrize("fetch", ["mean", "per_head"])
def test_the_selection_of_a_step_grows_with_alpha_and_with_the_budget(growing, fetch) -> None:
    before = None
    for options in growing:
        run = ComparedRun(SHAPES["gqa4-128"], (40, 21), {**options, "fetch": fetch}, compare=False)
        selected = [set(head) for step in run.step() for row in step.selected for head in row]
        assert before is None or all(few <= many for few, many in zip(before, selected, strict=True))
        before = selected
    assert before is not None and all(before)


@pytest.mark.parametrize(
    "options", [{"budget": 6}, {"budget": 0.3, "fetch": "per_head"}, {"offload": True, "gpu_cache": 3}], ids=str
)
def test_reports_equal_a_count_by_hand_and_leave_out_a_discarded_step(options) -> None:
    run = ComparedRun(SHAPES["gqa2-64"], (15, 4), {"alpha": 3.0, "budget": 0.2, **options}, new_tokens=10)
    steps = [run.step() for _ in range(8)]
    reports = [run.report(row) for row in (0, 1)]
    for row, length in enumerate((15, 4)):
        shares, capped = [], 0
        for at, layers in enumerate(steps):
            past = length + at
            shares += [sum(map(len, step.selected[row])) / 2 / past for step in layers]
            capped += past > run.slow[1, row].cap(past)
        report = {key: value for key, value in reports[row].items() if key not in ("fetched_bytes", "gpu_cache_hit")}
        assert report.pop("kept") == pytest.approx(sum(shares) / len(shares))
        assert report == {"sparse_steps": 8, "dense_layers": 1, "capped_steps": capped}
        assert capped == (5 if options.get("budget") == 6 and row == 1 else 8)
    run.step()
    assert [run.cache.report(slot, discard_last_step=True) for slot in (1, 2)] == reports
    assert [run.report(row)["sparse_steps"] for row in (0, 1)] == [9, 9]


@pytest.mark.parametrize("options", [{}, {"offload": True, "gpu_cache": 3}], ids=str)
def test_a_sequence_without_a_step_has_no_kept_share_and_nor_has_the_next_in_its_slot(options) -> None:
    expected = {"kept": None, "sparse_steps": 0, "dense_layers": 1, "capped_steps": 0}
    if options:
        expected |= {"fetched_bytes": 0, "gpu_cache_hit": None}
    run = ComparedRun(SHAPES["mha-32"], (15,), options)
    assert run.report(0) == expected
    run.step()
    assert run.report(0).keys() == expected.keys() and run.report(0) != expected
    run.cache.free_slot(1)
    again = ComparedRun(SHAPES["mha-32"], (15,), options, cache=run.cache)
    assert again.report(0) == expected
