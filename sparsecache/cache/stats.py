"""How many past tokens sparse layers attended to: counters per layer, slot and KV head, in one tensor per device.

Counters are integers, so that sums do not depend on their order and the latest step can be subtracted exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SHARE_BITS = 40  # a share of the past is an integer multiple of 2 ** -40


@dataclass(frozen=True)
class LayerStats:
    """The counters of one layer: counts [slots, G] int64, past tokens attended to in the latest step."""

    counts: Tensor

    def record(self, counts: Tensor, slots: Tensor) -> None:
        """Record a step of slots [B]: counts [B, G] int64, the past tokens that each KV head attended to."""
        self.counts.index_copy_(0, slots, counts)


@dataclass(frozen=True)
class SequenceStats:
    """The statistics of a finished sequence.

    prompt_tokens; steps: decode steps. kept: mean share of past tokens attended to over sparse layers, KV heads and
    steps, None without a sparse step. attended: past tokens attended to, summed over the same. sparse_layers,
    dense_layers: the number of layers of each kind. slot: of the sequence. last_step_discarded: whether one more step
    than `steps` was decoded. It does not count here, and must not count in a method's own sums.
    """

    prompt_tokens: int
    steps: int
    kept: float | None
    attended: int
    sparse_layers: int
    dense_layers: int
    slot: int
    last_step_discarded: bool


class DeviceStats:
    """The counters of all layers on one device, and the lengths of the sequences, which the layers share.

    seq_lens: [slots] int64, tokens before the current one. layers: a LayerStats per layer.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, max_tokens: int, device: torch.device) -> None:
        self.seq_lens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._counts = torch.zeros(layers, slots, kv_heads, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, layers, slots, kv_heads, dtype=torch.int64, device=device)  # shares, counts
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._max_tokens = max_tokens
        self.layers = [LayerStats(counts) for counts in self._counts]

    def start_sequence(self, slot: int, tokens: int) -> None:
        """Set a slot's length to `tokens`, those of its prompt; its counters begin at zero."""
        self.seq_lens[slot].fill_(tokens)
        self._sums[:, :, slot].zero_()

    def end_step(self, slots: Tensor, sparse: bool) -> None:
        """Add one to the lengths of slots [B] and, where layers are sparse, the step's counts to the sums."""
        if sparse:
            counts = self._counts[:, slots]
            self._sums.index_add_(2, slots, torch.stack((_share(counts, self.seq_lens[slots][:, None]), counts)))
        self.seq_lens.index_add_(0, slots, self._one.expand(len(slots)))
        self.seq_lens.clamp_(max=self._max_tokens)  # padding steps of a free slot have no end

    def read(self, slot: int, discard_last_step: bool) -> tuple[int, list[list[int]], list[list[int]]]:
        """Return a slot's length and, per layer and KV head, the sums of shares and of counts."""
        length = self.seq_lens[slot]
        sums = self._sums[:, :, slot]
        if discard_last_step:
            length = length - 1
            counts = self._counts[:, slot]
            sums = sums - torch.stack((_share(counts, length), counts))
        numbers = torch.cat((length.view(1), sums.flatten())).tolist()  # one copy to the host
        layers, kv_heads = sums.shape[1:]
        rows = [numbers[1 + at * kv_heads : 1 + (at + 1) * kv_heads] for at in range(2 * layers)]
        return numbers[0], rows[:layers], rows[layers:]


def mean_share(shares: list[int], steps: int) -> float | None:
    """Return the mean of shares, each summed over `steps` steps; None without a step."""
    total = len(shares) * steps
    return sum(shares) / (total << _SHARE_BITS) if total else None


def _share(counts: Tensor, past: Tensor) -> Tensor:
    return (counts << _SHARE_BITS) // past.clamp(min=1)
