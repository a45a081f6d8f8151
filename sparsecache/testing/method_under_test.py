"""A cache method with the options that its checks need."""

import math
from dataclasses import dataclass
from typing import Any

from sparsecache.cache.base import CacheMethod
from sparsecache.methods import load_method, method_options, option_errors, parse_options

Options = dict[str, Any]
# Built-in methods that a budget of everything does not make lossless, or that have none.
_LOSSLESS: dict[str, Options] = {
    "vanilla": {},
    "infinigen": {"alpha": math.inf, "budget": 1.0, "dense_layers": 1},
    "topp": {"p": 1.0, "budget": 1.0, "dense_layers": 0},
    "duoattention": {"sparsity": 0.0},
    "kivi": {"residual": 128},  # longer than the prompts
    "composed": {"evict": "snapkv,budget=1.0,dense_layers=0", "select": "quest,budget=1.0,dense_layers=0"},
}
# Built-in methods without a budget that drop tokens, or bits.
_TIGHT: dict[str, Options] = {
    "duoattention": {"sparsity": 0.5, "sinks": 1, "recent": 2},
    "kivi": {"bits": 2, "group": 16, "residual": 0},
    "composed": {"evict": "snapkv,budget=9,window=4,dense_layers=0", "select": "quest,budget=4,page=2,dense_layers=0"},
}


@dataclass(frozen=True)
class MethodUnderTest:
    """A method, and the options that the checks need.

    lossless: options that drop nothing (output must equal transformers'); None: there are none. tight: options that
    already drop tokens of a prompt of 40 tokens. Both replace defaults.
    """

    method: str
    lossless: Options | None
    tight: Options

    @classmethod
    def of(cls, method: str, lossless: Options | None = None, tight: Options | None = None) -> "MethodUnderTest":
        """Return a method to test; by default a budget of 1.0 is lossless, and one of 4 tokens tight."""
        kind = load_method(method)
        known = method_options(kind)
        if lossless is None:
            lossless = _LOSSLESS.get(method)
        if tight is None:
            tight = _TIGHT.get(method)
        dense = {"dense_layers": getattr(kind, "min_dense_layers", 0)} if "dense_layers" in known else {}
        if "budget" in known:
            lossless = {"budget": 1.0, **dense} if lossless is None else lossless
            tight = {"budget": 4.0, **dense} if tight is None else tight
        return cls(method, lossless, tight or {})

    def make(self, options: Options) -> CacheMethod:
        """Return an instance with options over the defaults. Errors of the constructor keep their traceback."""
        with option_errors(self.method):
            return load_method(self.method)(**{**parse_options(self.method, {}), **options})

    @property
    def tested(self) -> list[Options]:
        """The options to test with: the defaults and the tight ones."""
        return [{}, self.tight] if self.tight else [{}]
