"""sparsecache: does this sparse decoding still answer long-context questions, and what does it save?"""

__version__ = "0.1.0"
