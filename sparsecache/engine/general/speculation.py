"""Gives speculating caches the previous layer's hidden state and the query computed from it, in a transformers model.

Hidden states come from forward pre-hooks. A query comes from the layer itself: it is called with the hidden state, and
its attention call, which has the rotated query, ends it. So no shape of attention module needs code of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from sparsecache.cache.base import SpeculationSource
from sparsecache.engine.general.attention import AttentionCall, FullAttentionLayer, handle_attention
from sparsecache.errors import UsageError

_MIXERS = ("self_attn", "linear_attn", "mamba", "conv", "temporal_block")
"""Names of the module of a layer that its normed input goes into, where it makes no attention call."""

OnHidden = Callable[[int, Tensor], None]
"""Receives the index of a speculating cache and the hidden state [B, L, hidden] of the previous layer."""


class _AttentionReachedError(Exception):
    """Ends a layer's pass at its attention call."""


@dataclass
class _LatestCall:
    """The arguments that a module was last called with: rotations, positions and masks of the current step."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a call."""
        self.arguments = args, kwargs

    def query_of(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Return the query [B, H, L, D] with which a module calls attention for a hidden state."""
        queries: list[Tensor] = []

        def end(call: AttentionCall) -> None:
            queries.append(call.q)
            raise _AttentionReachedError

        args, kwargs = self.arguments
        args = tuple(_without_cache(value) for value in args)
        kwargs = {key: _without_cache(value) for key, value in kwargs.items()}
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = hidden
        else:
            args = (hidden, *args[1:])
        try:
            with handle_attention(end):
                module(*args, **kwargs)
        except _AttentionReachedError:
            pass
        return queries[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments."""
        args, kwargs = self.arguments
        values = [*args, *kwargs.values()]
        flat = [part for value in values for part in (value if isinstance(value, tuple | list) else (value,))]
        return tuple(part for part in flat if isinstance(part, Tensor))


class SpeculationHooks:
    """Watches the layers before speculating ones.

    The arguments of a speculated layer are those of the latest full-attention layer of the step. There is one, since
    the first of them cannot speculate.
    """

    def __init__(self, model: nn.Module, layers: list[FullAttentionLayer], modules: list[nn.Module]) -> None:
        """layers: all that are served; modules: the attention modules of all layers of the model."""
        self._layers = layers
        self._names = {module: name for name, module in model.named_modules()}
        self._modules, self._model = modules, model
        self._attention, self._block = _LatestCall(), _LatestCall()
        self._busy = False

    def query(self, index: int, hidden: Tensor, normed: bool) -> Tensor:
        """Return layer `index`'s query of a hidden state [B, L, hidden]: [B, H, L, D]."""
        module = self._layers[index].module
        self._busy = True  # the hooks see this call too
        try:
            if normed:
                return self._attention.query_of(module, hidden)
            return self._block.query_of(self._block_of(module), hidden)
        finally:
            self._busy = False

    def inputs(self, normed: bool) -> tuple[Tensor, ...]:
        """Return the tensors that `query` reads beside the hidden state."""
        return (self._attention if normed else self._block).tensors

    @contextmanager
    def watching(self, sources: dict[int, SpeculationSource], on_hidden: OnHidden) -> Iterator[None]:
        """Call `on_hidden` for each index of `sources`, in the layer that precedes it, inside the block.

        Raises UsageError where the model has no such hidden state.
        """
        with ExitStack() as stack:
            for layer in self._layers if sources else ():
                for module, latest in ((layer.module, self._attention), (self._block_of(layer.module), self._block)):
                    self._hook(stack, module, latest.record)
            for index, source in sources.items():
                self._hook(stack, self._source(index, source), partial(_give_hidden, on_hidden, index))
            yield

    def _hook(self, stack: ExitStack, module: nn.Module, act: Callable[[Any, Any], None]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._busy:
                act(args, kwargs)

        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _source(self, index: int, source: SpeculationSource) -> nn.Module:
        """Return the module whose input is the hidden state that layer `index` speculates from."""
        if index == 0:
            raise UsageError("The first full-attention layer cannot speculate. Pass -o dense_layers=1 or more.")
        block = self._block_of(self._layers[index].module)
        stem, _, number = self._names[block].rpartition(".")
        before = self._model.get_submodule(f"{stem}.{int(number) - 1}")
        found = self._mixer(before) if source == "input" else _after_attention(before)
        if found is None:
            parts = ", ".join(name for name, _ in before.named_children())
            raise UsageError(
                f"{type(before).__name__} has no known place for the hidden state that the next layer speculates from "
                f"({source}); its parts are {parts}. Add it to sparsecache/engine/general/speculation.py, or speculate "
                f"from the attention input (infinigen: -o guess=input)."
            )
        return found

    def _mixer(self, block: nn.Module) -> nn.Module | None:
        """Return the module that a layer's normed input goes into."""
        own = [module for module in self._modules if self._block_of(module) is block]
        named = [getattr(block, name) for name in _MIXERS if isinstance(getattr(block, name, None), nn.Module)]
        return next(iter(own + named), None)

    def _block_of(self, module: nn.Module) -> nn.Module:
        """Return the layer that an attention module belongs to: the part of a numbered list that holds it."""
        parts = self._names[module].split(".")
        number = max((place for place, part in enumerate(parts) if part.isdecimal()), default=None)
        if number is None:
            raise UsageError(f"{self._names[module]} is in no list of layers, so no query can be speculated for it.")
        return self._model.get_submodule(".".join(parts[: number + 1]))


def _after_attention(block: nn.Module) -> nn.Module | None:
    """Return the module whose input is a layer's residual stream after attention."""
    if getattr(block, "use_parallel_residual", False):  # attention and MLP read the same input
        return None
    names = [name for name, _ in block.named_children()]
    if "pre_feedforward_layernorm" in names:  # Gemma 2 and 3
        return block.get_submodule("pre_feedforward_layernorm")
    if "post_feedforward_layernorm" in names:  # OLMo 2 norms what attention and MLP put out
        return block.get_submodule("mlp")
    return block.get_submodule("post_attention_layernorm") if "post_attention_layernorm" in names else None


def _give_hidden(on_hidden: OnHidden, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    on_hidden(index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value
