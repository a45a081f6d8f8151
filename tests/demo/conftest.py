"""The trained checkpoint's tokenizer, trained once."""

import pytest
from tokenizers import Tokenizer

from sparsecache.demo.tokenizer import Encoder, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def encode(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)
