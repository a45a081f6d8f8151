"""Expected attention against kvpress on the same queries, keys and values."""

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.cache.model_cache import ModelCache
from sparsecache.kernels.rotation import Rotation, rotate_rows
from sparsecache.methods import make_method
from sparsecache.methods.expected_attention import ExpectedAttention
from sparsecache.testing.cache_checks import plain_rope
from tests.methods.presses import HEAD_DIM, LENGTHS, kept_by_method, kept_by_press, press_arguments, random_prompt

BASE = 50.0  # all channels rotate by more than a little over the prompt


def _rope(scale: float, rotated: int):
    """Return rotations that also scale, as YaRN's do, of the first channels only."""
    rope = plain_rope(rotated, BASE)
    return lambda positions: Rotation(*(scale * table for table in rope(positions)))


def _method(scale: float = 1.0, rotated: int = HEAD_DIM, **options) -> ExpectedAttention:
    method = ExpectedAttention(dense_layers=0, **options)
    method.rope = _rope(scale, rotated)
    return method


def _prompt(length: int, group: int, scale: float = 1.0, rotated: int = HEAD_DIM):
    """Return queries before RoPE with a mean, and q, k, v as a cache receives them."""
    q, k, v = random_prompt(length, group)
    q = q + torch.randn(len(q), 1, HEAD_DIM, generator=torch.Generator().manual_seed(length))
    rotation = _rope(scale, rotated)(torch.arange(length))
    return q, (rotate_rows(q, rotation), rotate_rows(k, rotation), v)


def _press(kvpress, scale: float = 1.0, **options):
    """Return kvpress' press, which takes its rotations from the attention module."""

    class Press(kvpress("expected_attention_press").ExpectedAttentionPress):
        def score(self, module, *arguments):
            module.rotary_emb = lambda x, positions: _rope(scale, HEAD_DIM)(positions)
            return super().score(module, *arguments)

    return Press(**options)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_scores_and_kept_tokens_are_those_of_kvpress(length, group, kvpress) -> None:
    for sinks, future, epsilon, scale in ((4, 30, 0.01, 1.0), (0, 512, 0.0, 1.3)):
        before, prompt = _prompt(length, group, scale)
        options = {"n_sink": sinks, "n_future_positions": future, "epsilon": epsilon}
        expected = _press(kvpress, scale, **options).score(*press_arguments(before, *prompt[1:]))[0]
        method = _method(scale, sinks=sinks, future=future, epsilon=epsilon)
        scores = method.score(*prompt)
        torch.testing.assert_close(scores[:, sinks:], expected[:, sinks:], rtol=1e-3, atol=1e-6)
        assert (scores[:, :sinks] == torch.inf).all()
        for count in {sinks + 2, length // 2, length - 1} & set(range(sinks + 1, length)) - {1}:
            press = _press(kvpress, scale, compression_ratio=1 - (count + 0.5) / length, **options)
            method.budget = float(count)
            assert kept_by_method(method, *prompt) == kept_by_press(press, before, *prompt[1:])


def test_channels_that_are_not_rotated_are_those_of_a_rotation_by_nothing() -> None:
    """Frequencies of 0 for the last pairs of channels, against a rotation of fewer channels, in another order."""
    length, rotated = 40, HEAD_DIM // 2
    _, prompt = _prompt(length, 2, rotated=rotated)
    partial = _method(rotated=rotated).score(*prompt)
    half = rotated // 2
    order = [*range(half), *range(rotated, rotated + half), *range(half, rotated), *range(rotated + half, HEAD_DIM)]
    rest = torch.ones(half), torch.zeros(half)

    def rope(positions: torch.Tensor) -> Rotation:
        tables = _rope(1.0, rotated)(positions)
        parts = [
            torch.cat((table[..., :half], fill.expand(*positions.shape, -1)), -1)
            for table, fill in zip(tables, rest, strict=True)
        ]
        return Rotation(*(part.repeat(1, 2) for part in parts))

    whole = ExpectedAttention()
    whole.rope = rope
    q, k, v = (part[..., order] for part in prompt)
    torch.testing.assert_close(whole.score(q, k, v), partial)


def test_scores_do_not_depend_on_the_prompts_before() -> None:
    """The rotations that prompts of one length share are made anew for another length and another model."""
    method = _method()
    for length, scale in ((40, 1.0), (64, 1.0), (64, 1.3)):
        _, prompt = _prompt(length, 2, scale)
        method.rope = _rope(scale, HEAD_DIM)
        for _ in range(2):
            assert torch.equal(method.score(*prompt), _method(scale).score(*prompt))


@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_prompt_of_sinks_keeps_the_first_tokens(length) -> None:
    _, prompt = _prompt(length, 2)
    assert kept_by_method(_method(budget=2), *prompt) == [[0, 1][:length]] * 2


def test_an_eviction_before_a_selection_keeps_the_same_tokens() -> None:
    _, (q, k, v) = _prompt(64, 2)
    expected = kept_by_method(_method(budget=20), q, k, v)
    options = {"evict": "expected_attention,budget=20,dense_layers=0", "select": "oracle,dense_layers=0"}
    method = make_method("composed", options)
    method.rope = _rope(1.0, HEAD_DIM)
    cache = ModelCache(method, Shape(1, 4, 2, HEAD_DIM), [torch.device("cpu")], 1, 70, 6, torch.float32).layers[0]
    cache.prefill(0, q, k, v)
    for of_head, keys, all_keys in zip(expected, cache.selection.full.kv.keys[0, :, :20], k, strict=True):
        assert torch.equal(keys, all_keys[of_head])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"future": 65537}, r"^future=65537 must be 1 to 65536 positions\.$"),
        ({"sinks": -1}, r"^sinks=-1 must be 0 tokens or more\.$"),
        ({"epsilon": float("nan")}, r"^epsilon=nan must be 0 or more\.$"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedAttention(**options)
