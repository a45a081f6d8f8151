"""Any model of transformers with any cache method, through transformers' public extension points."""

from sparsecache.engine.general.engine import GeneralEngine
from sparsecache.engine.general.model import CachedModel

__all__ = ["CachedModel", "GeneralEngine"]
