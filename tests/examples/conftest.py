"""Makes the modules of examples/train_demo importable; the demo checkpoint's tokenizer, trained once."""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "train_demo"))

from lesson_tokenizer import Encoder, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def encode(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)
