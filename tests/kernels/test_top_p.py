"""The top-p tokens of heads: the kernels against sorting, and their extremes."""

import math

import pytest
import torch

from sparsecache.kernels import top_p as top_p_module
from sparsecache.kernels import top_p_split, top_p_tokens
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.threshold import Scores, SelectionParams, threshold_select
from sparsecache.kernels.top_p import top_p_scores

CASES = {  # slots, KV heads, group, T, past tokens of the slots of the batch, dtype
    "one token": (2, 1, 2, 16, [1, 0], torch.float32),
    "around a block": (2, 1, 2, 2064, [2049], torch.float32),
    "odd": (2, 2, 1, 77, [77, 33], torch.float16),
}
if torch.cuda.is_available():
    LONG = (17, 8, 4, 33_008, [*range(1, 33_000, 2062)])
    CASES |= {"long": (*LONG, torch.float32), "long, half precision": (*LONG, torch.float16)}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=["whole", "split"])
def path(request, monkeypatch) -> str:
    """Force one program per head, or several."""
    _force_path(monkeypatch, request.param)
    return request.param


def _force_path(monkeypatch, path: str) -> None:
    monkeypatch.setattr(top_p_tokens, "_MAX_WHOLE", {"whole": 1 << 20, "split": 0}[path])


def _set_small_blocks(monkeypatch, chunk: int, mass_block: int, block: int) -> None:
    """Let a few hundred tokens make several chunks and blocks."""
    for module, name, size in (
        (top_p_split, "_CHUNK", chunk),
        (top_p_split, "_MASS_BLOCK", mass_block),
        (top_p_split, "_BLOCK", block),
        (top_p_tokens, "_MASS_BLOCK", mass_block),
        (top_p_tokens, "_LIST_BLOCK", block),
        (top_p_tokens, "_SEARCH_BLOCK", block),
    ):
        monkeypatch.setattr(module, name, size)


def _inputs(case, device, ties: bool = False):
    slots, kv_heads, group, tokens, past, dtype = case
    generator = torch.Generator().manual_seed(3)
    values = 3 * torch.randn(len(past), kv_heads, group, tokens, generator=generator)
    order = torch.randperm(slots, generator=generator)[: len(past)].to(device)
    seq_lens = torch.zeros(slots, dtype=torch.int64, device=device)
    seq_lens[order] = torch.tensor(past, device=device)
    return (values.round() if ties else values).to(device, dtype), seq_lens, order


def _log_probs(scores, seq_lens, slots):
    """Return each KV head's log probabilities of the top-p tokens of its query heads, else -inf: [B, G, T]."""
    values, _, top_p = scores
    is_past = torch.arange(values.shape[3], device=values.device) < seq_lens[slots][:, None, None, None]
    if top_p is None:
        return values.masked_fill(~is_past, -torch.inf)[:, :, 0]
    shape, position = (*values.shape[:3], 1), torch.arange(values.shape[3], device=values.device)
    threshold, tie_end, log_total = (each.view(shape) for each in top_p)
    is_top_p = (values.float() > threshold) | ((values.float() == threshold) & (position < tie_end))
    return (values.float() - log_total).masked_fill(~(is_top_p & is_past), -torch.inf).amax(2)


@cases
@pytest.mark.parametrize(("p", "ties"), [(0.3, False), (0.85, True), (1.0, True)])
def test_kernel_and_reference_agree(case, p, ties, device, path) -> None:
    """They may differ by one token per query head, at which sums round to either side of the share."""
    values, seq_lens, slots = _inputs(case, device, ties)
    found = []
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            scores = top_p_scores(Scores(values, None), seq_lens, slots, p)
        found.append(_log_probs(scores, seq_lens, slots))
    kernel, reference = found
    differ = kernel.isinf() != reference.isinf()
    assert int(differ.sum(2).max()) <= (values.shape[2] if p < 1 else 0)
    both = kernel.isfinite() & reference.isfinite()
    torch.testing.assert_close(kernel[both], reference[both], rtol=1e-4, atol=1e-4)


@cases
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("budget", [0.1, 1.0])
@pytest.mark.parametrize("p", [0.7, 1.0])
def test_the_top_p_tokens_of_highest_probability_are_selected(case, p, budget, sinks, device) -> None:
    """Against a sort of the log probabilities. The lower position wins a tie."""
    values, seq_lens, slots = _inputs(case, device, ties=True)
    capacity = values.shape[3]
    budgets = (budget * torch.arange(capacity + 1, device=device)).ceil().long()
    params = SelectionParams(math.inf, budgets, mean=False, sinks=sinks)
    with force_backend("kernels"):
        scores = top_p_scores(Scores(values, None), seq_lens, slots, p)
        positions, counts = threshold_select(scores, seq_lens, slots, params, capacity)
    log_probs = _log_probs(scores, seq_lens, slots)
    is_forced = (
        torch.arange(capacity, device=device)
        < torch.minimum(seq_lens[slots], torch.tensor(sinks, device=device))[:, None]
    )
    log_probs = log_probs.masked_fill(is_forced[:, None], torch.inf)
    wanted = torch.minimum((log_probs > -torch.inf).sum(2), budgets[seq_lens[slots]][:, None])
    assert torch.equal(counts, wanted)
    rank = torch.arange(capacity, device=device).expand_as(log_probs)
    order = log_probs.sort(dim=2, descending=True, stable=True).indices
    expected = torch.zeros_like(log_probs, dtype=torch.bool).scatter(2, order, rank < wanted[..., None])
    found = positions.masked_fill(rank >= wanted[..., None], capacity)  # a column more for those that do not count
    selected = torch.zeros(*log_probs.shape[:2], capacity + 1, dtype=torch.bool, device=device)
    assert torch.equal(selected.scatter(2, found, torch.ones_like(found, dtype=torch.bool))[..., :capacity], expected)


def test_of_equal_tokens_the_earliest_are_top_p_tokens(device, path, monkeypatch) -> None:
    _set_small_blocks(monkeypatch, 32, 16, 16)
    values = torch.zeros(1, 1, 2, 100, device=device)
    for backend in ("kernels", "reference"):
        with force_backend(backend):
            seq_lens, slots = torch.tensor([100], device=device), torch.tensor([0], device=device)
            found = _log_probs(top_p_scores(Scores(values, None), seq_lens, slots, 0.495), seq_lens, slots)
        assert found.isfinite().flatten().tolist() == [True] * 50 + [False] * 50


HARD = {  # score of the first token, and the step that the others are rounded to
    "a token with most of the attention": (14.0, 0.001),
    "a token far below the others": (-6e4, 0.001),
    "many ties": (0.0, 1 / 32),
}


@pytest.mark.parametrize("p", [0.85, 0.99999])
@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
def test_several_chunks_give_what_sums_in_double_precision_give(hard, p, device, path, monkeypatch) -> None:
    _set_small_blocks(monkeypatch, 256, 256, 256)
    past, generator = [700, 256], torch.Generator().manual_seed(5)
    values = (2 / hard[1] * torch.randn(2, 1, 2, 700, generator=generator)).round() * hard[1]
    values[..., 0] = hard[0]
    values = values.half()
    parts = [values[..., :256].flatten(1, 2)] * 2  # a split of the scores may have no tokens
    parts[1] = torch.cat((values[:1, ..., 256:], torch.full((1, 1, 2, 444), torch.nan).half())).flatten(1, 2)
    highest = torch.stack([part.amax(2) for part in parts], 2).nan_to_num(-torch.inf)
    lowest = torch.stack([part.amin(2) for part in parts], 2).nan_to_num(torch.inf)
    scores = Scores(values.to(device), torch.stack((highest, lowest)).float().to(device))
    seq_lens, slots = torch.tensor(past, device=device), torch.arange(2, device=device)
    with force_backend("kernels"):
        found = _log_probs(top_p_scores(scores, seq_lens, slots, p), seq_lens, slots)
    for row, count in enumerate(past):
        order = values[row, 0, :, :count].double().sort(dim=1, descending=True, stable=True)
        weights = order.values.softmax(1)
        is_top_p = torch.zeros(2, count, dtype=torch.bool)
        is_top_p.scatter_(1, order.indices, weights.cumsum(1) - weights < p)
        assert torch.equal(found[row, 0, :count].isfinite().cpu(), is_top_p.any(0))


SUMS = {  # tokens, past tokens, dtype, scale, step that scores are rounded to
    "half precision": (1_041, [1_041, 1_000], torch.float16, 3.0, 1e-4),
    "around zero": (515, [515, 257], torch.float16, 0.2, 1e-6),
    "single precision": (300, [300, 1], torch.float32, 3.0, 1e-7),
    "ties": (771, [771, 64], torch.float16, 2.0, 0.5),
    "equal scores": (333, [333, 2], torch.float16, 0.0, 1.0),
}
if torch.cuda.is_available():
    SUMS |= {f"long, {past}": (32_784, [past, 32_784], torch.float16, 3.0, 1e-4) for past in (8_191, 20_001, 32_784)}


@pytest.mark.parametrize("p", [0.3, 0.85, 0.999, 1.0])
@pytest.mark.parametrize("blocks", [None, (128, 64, 32)], ids=["blocks", "small blocks"])
@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS)
def test_top_p_tokens_have_the_share_of_the_sum_in_double_precision(case, blocks, p, device, path, monkeypatch) -> None:
    """The sum of all before the last top-p token is below the share, and with it the sum reaches the share."""
    if blocks is not None:
        _set_small_blocks(monkeypatch, *blocks)
    tokens, past, dtype, scale, step = case
    generator = torch.Generator().manual_seed(7)
    values = scale * torch.randn(2, 3, tokens, generator=generator)
    values = ((values / step).round() * step).to(device, dtype)
    seq_lens, slots = torch.tensor(past, device=device), torch.arange(2, device=device)
    best = [values[row, :, :count].float().aminmax(dim=1) for row, count in enumerate(past)]
    extremes = torch.stack([torch.stack([each.max for each in best]), torch.stack([each.min for each in best])])
    found = top_p_tokens.find_top_p(values, extremes[..., None].contiguous(), seq_lens, slots, p)
    thresholds, tie_ends, log_totals = (each.view(2, 3).cpu() for each in found)
    for row, count in enumerate(past):
        scores = values[row, :, :count].double().cpu()
        torch.testing.assert_close(log_totals[row], scores.logsumexp(1).float(), rtol=1e-6, atol=2e-6)
        for head in range(3):
            order = scores[head].sort(descending=True, stable=True)
            sums = order.values.softmax(0).cumsum(0)
            threshold, tie_end = thresholds[row, head], int(tie_ends[row, head])
            position = torch.arange(count)
            is_top_p = (scores[head] > threshold) | ((scores[head] == threshold) & (position < tie_end))
            number = int(is_top_p.sum())
            assert is_top_p[order.indices[:number]].all()
            if p == 1:
                assert number == count
                continue
            assert sums[number - 1] >= p - 2e-6
            assert number == 1 or sums[number - 2] < p + 2e-6


def test_selections_do_not_depend_on_the_batch(device, path) -> None:
    """A head finds the same tokens alone and in a batch."""
    values, seq_lens, slots = _inputs((3, 2, 2, 1040, [1040, 555, 7], torch.float16), device)
    with force_backend("kernels"):
        batch = top_p_scores(Scores(values, None), seq_lens, slots, 0.9).top_p
        for row in range(3):
            alone = top_p_scores(Scores(values[row : row + 1], None), seq_lens, slots[row : row + 1], 0.9).top_p
            for left, right in zip(batch, alone, strict=True):
                assert torch.equal(left.view(3, 4)[row], right)


@cases
def test_joining_before_and_in_the_selection_select_the_same_tokens(case, device, monkeypatch) -> None:
    values, seq_lens, slots = _inputs(case, device, ties=True)
    tokens = values.shape[3]
    params = SelectionParams(math.inf, torch.arange(tokens + 1, device=device) // 2, False)
    found = []
    with force_backend("kernels"):
        for longest in (0, 1 << 20):
            monkeypatch.setattr(top_p_module, "_MAX_UNJOINED", longest)
            scores = top_p_scores(Scores(values, None), seq_lens, slots, 0.8)
            assert scores.values.shape[2] == (1 if longest == 0 else values.shape[2])
            selection = threshold_select(scores, seq_lens, slots, params, tokens)
            is_selected = torch.arange(selection.positions.shape[2], device=device) < selection.counts[..., None]
            found.append((selection.counts, selection.positions.masked_fill(~is_selected, tokens).sort(2).values))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
