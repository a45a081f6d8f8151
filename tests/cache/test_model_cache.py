"""The caches of all layers together: order, shared lengths, and reports over devices."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sparsecache.cache.base import CacheConfig, Shape
from sparsecache.cache.full import FullCache
from sparsecache.cache.model_cache import ModelCache
from sparsecache.cache.stats import SequenceStats
from sparsecache.methods.vanilla import Vanilla

CPU = torch.device("cpu")
SHAPE = Shape(layers=4, heads=4, kv_heads=2, head_dim=6)


class _Recording(FullCache):
    """Records made-up counts: layer + 1 past tokens."""

    def __init__(self, method: "_Method", layer: int, config: CacheConfig) -> None:
        super().__init__(config)
        self.config, self.method, self.layer = config, method, layer
        self.sparse = layer not in method.dense

    def attend(self, q, k, v, slots):
        if self.sparse:
            self.config.stats.record(torch.full((len(slots), 2), self.layer + 1), slots)
        return super().attend(q, k, v, slots)

    def free_slot(self, slot):
        self.method.freed.append((self.layer, slot))


@dataclass
class _Method(Vanilla):
    dense: tuple[int, ...] = (0,)
    made: list[int] = field(default_factory=list)
    freed: list[tuple[int, int]] = field(default_factory=list)
    finished: list[SequenceStats] = field(default_factory=list)

    def make_cache(self, layer, config):
        self.made.append(layer)
        return _Recording(self, layer, config)

    def report(self, stats: SequenceStats) -> dict[str, Any]:
        self.finished.append(stats)
        return {"kept": stats.kept}


def _make(method: _Method, devices: list[torch.device] | None = None, slots: int = 3) -> ModelCache:
    return ModelCache(method, SHAPE, devices or [CPU] * 4, slots, 30, 10, torch.float32)


def _decode(cache: ModelCache, slots: list[int], steps: int) -> None:
    rows = torch.tensor(slots)
    for _ in range(steps):
        for layer in cache.layers:
            layer.attend(*(torch.randn(len(slots), heads, 1, 6) for heads in (4, 2, 2)), rows)
        cache.end_step(rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
@pytest.mark.parametrize("wait", [True, False])
def test_the_end_of_a_step_is_after_its_work_on_side_streams(wait) -> None:
    device = torch.device("cuda")
    cache = _make(_Method(), [device] * 4)
    cache.start_sequence(1, 12)
    with cache.layers[0].config.deferred.after():
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
    cache.end_step(torch.tensor([1], device=device), wait)
    if not wait:
        cache.join()
    assert cache.layers[0].config.seq_lens.tolist() == [0, 13, 0]


def test_layers_are_made_in_order_and_share_their_lengths() -> None:
    method = _Method()
    cache = _make(method)
    assert method.made == [0, 1, 2, 3] and [layer.layer for layer in cache.layers] == [0, 1, 2, 3]
    lengths = cache.layers[0].config.seq_lens
    assert all(layer.config.seq_lens is lengths for layer in cache.layers)
    assert [layer.config.stats for layer in cache.layers] == cache.layer_stats
    assert len({stats.counts.data_ptr() for stats in cache.layer_stats}) == 4
    cache.start_sequence(1, 12)
    _decode(cache, [2, 1], 3)
    assert lengths.tolist() == [0, 15, 3]


@pytest.mark.parametrize("dense", [(), (0,), (0, 1), (1, 3), (0, 1, 2, 3)])
def test_a_report_is_of_the_sparse_layers(dense) -> None:
    method = _Method(dense=dense)
    cache = _make(method)
    cache.start_sequence(1, 10)
    cache.start_sequence(0, 20)
    _decode(cache, [1, 0], 2)
    _decode(cache, [0], 3)
    sparse = [layer for layer in range(4) if layer not in dense]
    counts = sum(layer + 1 for layer in sparse)
    for slot, prompt, steps in ((1, 10, 2), (0, 20, 5)):
        report = cache.report(slot)
        stats = method.finished[-1]
        assert (stats.prompt_tokens, stats.steps, stats.slot) == (prompt, steps, slot)
        assert (stats.sparse_layers, stats.dense_layers) == (len(sparse), len(dense))
        assert stats.attended == 2 * counts * steps and not stats.last_step_discarded
        shares = [(layer + 1) / past for layer in sparse for past in range(prompt, prompt + steps)]
        assert report["kept"] == (pytest.approx(sum(shares) / len(shares)) if sparse else None)


def test_a_discarded_step_is_in_no_sum() -> None:
    method = _Method()
    cache = _make(method)
    cache.start_sequence(1, 10)
    _decode(cache, [1], 2)
    before = cache.report(1)
    _decode(cache, [1], 1)
    assert cache.report(1, discard_last_step=True) == before != cache.report(1)
    first, second, _ = method.finished
    assert (first.steps, first.attended, first.kept) == (second.steps, second.attended, second.kept)
    assert second.last_step_discarded


def test_freeing_a_slot_forgets_its_sequence_in_every_layer() -> None:
    method = _Method()
    cache = _make(method)
    cache.start_sequence(1, 10)
    cache.start_sequence(2, 5)
    _decode(cache, [1, 2], 2)
    other = cache.report(2)
    cache.free_slot(1)
    cache.free_slot(1)
    cache.free_slot(0)
    assert method.freed == [(layer, slot) for slot in (1, 1, 0) for layer in range(4)]
    assert cache.layers[0].config.seq_lens.tolist() == [0, 0, 7] and cache.report(2) == other
    cache.start_sequence(1, 3)
    assert cache.report(1) == {"kept": None}  # no step yet


def test_the_whole_is_graphable_if_every_layer_is() -> None:
    cache = _make(_Method())
    assert cache.graphable
    cache.layers[2].graphable = False
    assert not cache.graphable


def test_bytes_of_a_token_and_zeros_have_the_layers_shape() -> None:
    config = _make(_Method()).layers[0].config
    assert config.token_nbytes == 2 * 2 * 6 * 4 and SHAPE.kv_nbytes(torch.float16) == 4 * 2 * 2 * 6 * 2
    assert config.zeros(7, 5).shape == (3, 2, 7, 5) and config.zeros().dtype == torch.float32
    assert config.zeros(dtype=torch.int64).shape == (3, 2)
