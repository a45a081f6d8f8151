"""sparsecache measures how much accuracy sparse KV-cache methods lose on LongBench, and what they save."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecache.api import LLM, Evaluation, Generation, compare, evaluate

__version__ = "0.1.0"
__all__ = ["LLM", "Evaluation", "Generation", "compare", "evaluate"]


def __getattr__(name: str) -> Any:  # the command lines start without torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import sparsecache.api

    return getattr(sparsecache.api, name)
