"""The layer of a transformers cache whose keys and values a LayerCache keeps."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class DelegatedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Counts a layer's tokens and hands the new ones on; the attention function stores them in a LayerCache."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    def lazy_initialization(self, *tensors: Tensor) -> None:
        """Do nothing: the LayerCache is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new tokens alone."""
        self.num_tokens += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        """Return how many tokens the layer was given."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a mask is for, and which is the first."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: no limit of its own."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20
