"""What streaming, h2o and snapkv have in common: what they hold is bounded, and what has left does not return."""

from typing import Any

import pytest
import torch
from sparsecache.methods._evicting import EvictingMethod
from sparsecache.methods._rows import FREE, Rows

from sparsecache.methods.h2o import H2O
from sparsecache.methods.snapkv import SnapKV
from sparsecache.methods.streaming import Streaming
from tests.methods.stepping import CPU, Text, cap_of, check_cap, random_text, random_texts, shape_of

KINDS = {"streaming": Streaming, "h2o": H2O, "snapkv": SnapKV}
SHAPE = shape_of(2)

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
budgets = pytest.mark.parametrize("budget", [0.02, 0.3, 1.0, 1, 13, 64])


def _prefill(method: EvictingMethod, slot: int, text: Text) -> None:
    for layer in range(SHAPE.layers):
        parts = (part[layer, :, : text.prompt] for part in (text.q, text.k, text.v))
        method.prefill(layer, slot, *parts, text.new)


def _step(method: EvictingMethod, slot: int, text: Text, at: int) -> None:
    for layer in range(SHAPE.layers):
        token = (part[layer, None, :, at : at + 1] for part in (text.q, text.k, text.v))
        method.attend(layer, *token, torch.tensor([slot]))


def _held(method: EvictingMethod, slot: int) -> list[set[int]]:
    """The positions that every layer and KV head holds, none twice."""
    found = []
    for rows in method.rows:
        for positions in rows.positions[slot].tolist():
            held = [position for position in positions if position != FREE]
            assert len(held) == len(set(held))
            found.append(set(held))
    return found


@budgets
@pytest.mark.parametrize("kind", [Streaming, H2O])
def test_never_more_than_the_budget_is_attended_to(kind, budget) -> None:
    check_cap(kind(budget=budget, dense_layers=0), SHAPE, random_texts(SHAPE), lambda text, past: cap_of(budget, past))


@budgets
@every_kind
@torch.inference_mode()
def test_no_more_is_held_than_the_budget_and_what_has_left_does_not_return(kind, budget) -> None:
    method = kind(budget=budget, dense_layers=0)
    method.allocate(SHAPE, 2, 120, CPU, torch.float32)
    for seed, (prompt, new) in enumerate([(70, 40), (3, 60)]):
        text = random_text(SHAPE, prompt, new, seed)
        _prefill(method, 1, text)
        before = _held(method, 1)
        for at in range(prompt, prompt + new):
            cap = cap_of(budget, at) if not kind.keeps_new else cap_of(budget, prompt) + at - prompt
            assert all(1 <= len(held) <= cap and max(held) < at for held in before)
            _step(method, 1, text, at)
            after = _held(method, 1)
            assert all(now <= {*then, at} for now, then in zip(after, before, strict=True))
            assert all(kind is Streaming or at in now for now in after)
            before = after
        method.release(1)
        assert _held(method, 1) == [set()] * 4


@every_kind
@pytest.mark.parametrize(("budget", "rows"), [(0.1, 101), (16, 17), (1.0, 1000), (5000, 1000)])
def test_room_is_taken_for_the_budget_and_one_more(budget, rows, kind) -> None:
    method = kind(budget=budget, dense_layers=0)
    method.allocate(SHAPE, 3, 1000, CPU, torch.float32)
    for layer in method.rows:
        assert layer.keys.shape == layer.values.shape == (3, 2, rows, 6)
    biggest = max(_tensors(vars(method)), key=torch.Tensor.numel)
    assert biggest.numel() <= max(3 * 2 * rows * 6, 1001), "only the table of caps may be longer"


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors that are to be found in there."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else vars(value).values()
    return [tensor for part in parts if isinstance(part, (torch.Tensor, dict, list, Rows)) for tensor in _tensors(part)]


@every_kind
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "^budget=0 must be a share above 0 up to 1, or a whole number of tokens"),
        ({"budget": 2.5}, "^budget=2.5 must be "),
        ({"dense_layers": -1}, r"^dense_layers=-1 must be 0 or more\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message, kind) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_rows_that_grow_keep_what_they_hold() -> None:
    rows = Rows(2, 3, SHAPE, CPU, torch.float32)
    k, v, q = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.randn(1, 4, 1, 6)
    rows.fill(1, k, v, torch.tensor([[0, 4], [1, 2]]))
    slots = torch.tensor([1])
    before = rows.attend(q, slots)
    for wanted, there in ((2, 3), (3, 3), (9, 9)):
        rows.reserve(wanted)
        assert rows.keys.shape[2] == rows.values.shape[2] == rows.positions.shape[2] == there
        torch.testing.assert_close(rows.attend(q, slots), before)
    assert rows.held(torch.tensor([1, 0])).tolist() == [[2, 2], [0, 0]]
