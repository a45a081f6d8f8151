"""The trained checkpoint's tokenizer, trained once; one thread."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from sparsecache.demo.tokenizer import Encoder, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def encode(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads that share a busy core are many times slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
