"""OmniKV against the attention of the filter layers, in float64."""

import pytest
import torch

from sparsecache.methods.omnikv import OmniKV
from tests.methods.stepping import Kept, Text, budget_tokens, check_against, make_cache, random_texts, shape_of


def _kept(text: Text, layer: int, budget: float, filters: tuple[int, ...]) -> list[Kept]:
    """Return, for all KV heads, the tokens with the highest attention of a head in the last filter layer before."""
    source = max(each for each in filters if each < layer)
    steps = []
    for past in range(text.prompt, text.prompt + text.new):
        rows = torch.tensor([head[past][:past] for head in text.scores[source]], dtype=torch.float64)
        order = rows.softmax(1).amax(0).argsort(descending=True, stable=True)
        steps.append([sorted(order[: budget_tokens(budget, past)].tolist())] * text.k.shape[1])
    return steps


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("budget", "dense_layers", "given", "filters"),
    [(0.2, 1, None, (1, 2)), (7, 0, "3", (0, 3)), (0.5, 0, None, (0, 1, 2)), (5, 2, None, (2,))],
)
def test_layers_attend_to_what_the_last_filter_layer_chose(budget, dense_layers, given, filters, group) -> None:
    shape = shape_of(group, layers=5)  # 8/32 and 18/32 of five layers are one and two
    method = OmniKV(budget=budget, dense_layers=dense_layers, filter_layers=given)
    cache = make_cache(method, shape, 1, 10, 5)
    full = {*range(dense_layers), *filters}
    assert [not layer.sparse for layer in cache.layers] == [layer in full for layer in range(5)]
    texts = random_texts(shape)[:3:2]
    check_against(lambda text, layer: _kept(text, layer, budget, filters), method, shape, texts)


@pytest.mark.parametrize("given", ["0", "5", "2,9"])
def test_a_layer_that_cannot_select_is_refused(given) -> None:
    with pytest.raises(ValueError, match=rf"^filter_layers={given} must be 1 to 4, layers of this model after layer 0"):
        OmniKV(dense_layers=0, filter_layers=given).check(shape_of(2, layers=5))


def test_what_is_no_list_of_layers_is_refused() -> None:
    for given in ("5,5,4", "4,4", "5,4"):
        with pytest.raises(ValueError, match=rf"^filter_layers={given} must be in ascending order, each layer once\.$"):
            OmniKV(filter_layers=given)
    with pytest.raises(ValueError, match=r"^filter_layers=a,2 must be numbers of layers, as in 8,18\.$"):
        OmniKV(filter_layers="a,2")
