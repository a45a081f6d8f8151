"""Rotary position embedding (RoPE) of every type that transformers initialises.

The frequencies come from transformers' initialisation. Unlike transformers', this implementation keeps no state between
calls: a rotation depends on the position and the sequence's length only.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsecache.errors import UsageError
from sparsecache.kernels.rotation import Rotation, RotationOf


class Rope:
    """The rotations of one model.

    The frequencies of types `dynamic` and `longrope` depend on the sequence's length, as in transformers. A key keeps
    the rotation with which it was stored.
    """

    def __init__(self, config: Any, device: torch.device):
        """config: a transformers configuration. Raises UsageError for an unknown type and for partial rotation."""
        self._config = config
        self._device = device
        self._parameters: dict[str, Any] = dict(config.rope_parameters)
        self.type: str = self._parameters.get("rope_type", "default")
        if self.type != "default" and self.type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise UsageError(f"RoPE type {self.type!r} of the checkpoint is unknown. Known: {known}.")
        if self._parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UsageError(
                "The checkpoint rotates only a part of each head (partial_rotary_factor), which is not supported."
            )
        self._base, self._scaling = self._initialise(None)
        if self.type == "longrope":
            self._long, _ = self._initialise(self._original_window + 1)

    def cos_sin(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> Rotation:
        """Return cosines and sines [N, D] of positions [N]; lengths: [N] or [1], the sequences' tokens so far."""
        tables = self._tables(positions, self._frequencies(lengths))
        return Rotation(*(table.to(dtype) for table in tables))

    def rotation_of(self) -> RotationOf:
        """Return the rotation of a position, for cache methods. Raises UsageError if it depends on the length too."""
        if self.type in ("dynamic", "longrope"):
            raise UsageError(
                f"The method needs the rotation of each position, but RoPE of type {self.type!r} also depends on the "
                f"length of the text. Choose another --method."
            )
        return lambda positions: self._tables(positions, self._base.to(positions.device))

    def _tables(self, positions: Tensor, frequencies: Tensor) -> Rotation:
        angles = positions[..., None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        return Rotation(cos, sin) if self._scaling == 1 else Rotation(cos * self._scaling, sin * self._scaling)

    @property
    def graphable(self) -> bool:
        """Return whether rotations need no synchronisation with the host, and so fit a CUDA graph."""
        return self.type != "dynamic"

    def _frequencies(self, lengths: Tensor) -> Tensor:
        """Return frequencies [D], or [N, D] if they depend on the length; the second half repeats the first."""
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
        """Return frequencies [D] float32, the second half repeating the first, and the factor of cos and sin."""
        if self.type != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[self.type](self._config, self._device, seq_len=length)
            return frequencies.to(self._device, torch.float32).repeat(2), float(scaling)
        head_dim = getattr(self._config, "head_dim", None) or (
            self._config.hidden_size // self._config.num_attention_heads
        )
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return (1.0 / self._parameters["rope_theta"] ** exponents).repeat(2).to(self._device), 1.0
