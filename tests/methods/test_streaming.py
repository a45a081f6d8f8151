"""StreamingLLM against the first and last positions, counted out."""

import pytest
import torch

from sparsecache.cache import DecodingEvictionCache
from sparsecache.methods.streaming import Streaming, StreamingCache
from tests.methods.stepping import Kept, Text, budget_tokens, check_against, random_texts, run, shape_of


def _kept(text: Text, budget: float, sinks: int) -> list[Kept]:
    """Return the sinks that are there, then the latest tokens that were never evicted, step by step."""
    steps, held = [], list(range(text.prompt))
    for past in range(text.prompt, text.prompt + text.new):
        most = budget_tokens(budget, past)
        first = [p for p in held if p < sinks][:most]
        others = [p for p in held if p >= sinks]
        held = [*first, *others[max(0, len(others) - (most - len(first))) :]]
        steps.append([held] * text.k.shape[1])
        held = [*held, past]
    return steps


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    ("budget", "sinks"), [(0.2, 4), (0.5, 0), (0.05, 3), (1.0, 4), (7, 4), (4, 4), (3, 4), (1, 0), (500, 2)]
)
def test_sinks_and_recent_tokens_are_kept(budget, sinks, group) -> None:
    shape = shape_of(group)
    method = Streaming(budget=budget, sinks=sinks, dense_layers=1)
    check_against(lambda text, layer: _kept(text, budget, sinks), method, shape, random_texts(shape))


def test_with_a_count_the_sinks_and_a_window_are_kept() -> None:
    shape = shape_of(2)
    method = Streaming(budget=10, sinks=3, dense_layers=0)

    def window(text: Text, layer: int) -> list[Kept]:
        ends = range(text.prompt, text.prompt + text.new)
        kept = [[p for p in range(end) if p < 3 or p >= end - 7] for end in ends]
        return [[positions] * 2 for positions in kept]

    check_against(window, method, shape, random_texts(shape))


def test_positions_as_priorities_evict_the_same_tokens() -> None:
    """A method of one's own can evict by `step_scores`, without the kernel."""

    class Scored(DecodingEvictionCache):
        prompt_scores = StreamingCache.prompt_scores

        def __init__(self, sinks, *arguments):
            super().__init__(*arguments)
            self._sinks = sinks

        def step_scores(self, q, slots, new_seq_lens):
            positions = self.positions[slots].double()
            return self.scores[slots], positions.masked_fill(positions < self._sinks, 1e9)

    class ScoredStreaming(Streaming):
        def make_sparse_cache(self, layer, config):
            return Scored(self.sinks, self, layer, config)

    shape = shape_of(2)
    texts = random_texts(shape)
    found, expected = (run(kind(budget=9, dense_layers=0), shape, texts) for kind in (ScoredStreaming, Streaming))
    for one, other in zip(found, expected, strict=True):
        assert one.attended == other.attended
        for layer in range(shape.layers):
            assert all(map(torch.equal, one.outputs[layer], other.outputs[layer]))


def test_a_negative_number_of_sinks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sinks=-1 must be 0 tokens or more\.$"):
        Streaming(sinks=-1)
