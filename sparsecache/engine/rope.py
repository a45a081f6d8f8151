"""Rotary position embedding for any position, of every type that transformers initialises.

The frequencies come from transformers' own initialisation; what is ours is that nothing is remembered between
calls: a row's rotation depends on its position and its sequence's length, never on what was decoded before.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsecache.errors import UsageError
from sparsecache.kernels.rotation import Rotation


class Rope:
    """The rotations of one model.

    Types `dynamic` and `longrope` have frequencies that follow the sequence's length, as they do in
    transformers: keys keep the rotation they were written with.
    """

    def __init__(self, config: Any, device: torch.device):
        """`config` is a transformers configuration. Raises UsageError for a rotation of another kind."""
        self._config = config
        self._device = device
        self._parameters: dict[str, Any] = dict(config.rope_parameters)
        self.type: str = self._parameters.get("rope_type", "default")
        if self.type != "default" and self.type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise UsageError(f"RoPE type {self.type!r} of the checkpoint is unknown. Known: {known}.")
        if self._parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UsageError("The checkpoint rotates a part of each head only, which no family here does.")
        self._base, self._scaling = self._initialise(None)
        if self.type == "longrope":
            self._long, _ = self._initialise(self._original_window + 1)

    def cos_sin(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines [N, D] for positions [N] of sequences that are lengths [N] or [1] tokens long by now."""
        angles = positions[:, None] * self._frequencies(lengths)
        tables = angles.cos(), angles.sin()
        if self._scaling != 1:
            tables = tables[0] * self._scaling, tables[1] * self._scaling
        return Rotation(*(table.to(dtype) for table in tables))

    @property
    def graphable(self) -> bool:
        """Whether rotations can be made without the host looking at positions."""
        return self.type != "dynamic"

    def _frequencies(self, lengths: Tensor) -> Tensor:
        """[D], the second half as the first, or one row of [D] for each length where they follow it."""
        if self.type == "longrope":
            return torch.where((lengths > self._original_window)[:, None], self._long, self._base)
        if self.type == "dynamic":
            return self._dynamic(lengths)
        return self._base

    def _dynamic(self, lengths: Tensor) -> Tensor:
        window = self._config.max_position_embeddings
        tables = [self._initialise(length)[0] if length > window else self._base for length in lengths]
        return torch.stack(tables)

    @property
    def _original_window(self) -> int:
        return int(self._parameters["original_max_position_embeddings"])

    def _initialise(self, length: int | Tensor | None) -> tuple[Tensor, float]:
        """Frequencies [D] float32, the second half as the first, and what cosines and sines are multiplied by."""
        if self.type != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[self.type](self._config, self._device, seq_len=length)
            return frequencies.to(self._device, torch.float32).repeat(2), float(scaling)
        head_dim = getattr(self._config, "head_dim", None) or (
            self._config.hidden_size // self._config.num_attention_heads
        )
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return (1.0 / self._parameters["rope_theta"] ** exponents).repeat(2).to(self._device), 1.0
