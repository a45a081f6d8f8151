"""Selection by a few channels of each key, kept beside the key."""

import math


def check_channels(channels: float, head_dim: int | None = None) -> None:
    """Raise ValueError if an option means no number of a head's channels: a share up to 1, else a count."""
    if not (0 < channels <= 1 or (1 < channels < math.inf and channels == math.floor(channels))):
        raise ValueError(f"channels={channels} must be a share above 0 up to 1, or a whole number of channels.")
    if head_dim is not None and channels > head_dim:
        raise ValueError(f"channels={channels:g} must be at most {head_dim}, the channels of a head of this model.")


def channel_count(channels: float, head_dim: int) -> int:
    """Return how many of a head's channels an option means, 1 or more."""
    return max(1, math.floor(channels * head_dim + 1e-6)) if channels <= 1 else min(int(channels), head_dim)
