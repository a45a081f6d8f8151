"""Small tokenizers of the kinds that checkpoints ship, written as checkpoint folders under any label."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (
    "The harbour master counted 1234 crates and 56 barrels before the ships left at 17:45 on the 3rd of May.",
    "Question: which of the towns has a mill? Answer: Oakfield has a mill, Riverton has a bridge and a market.",
    "def add(first, second):\n    total = first + second\n    return total\n",
    "Passage 12 says that the baker's son moved north; passage 13 says he didn't. getValue, JSONDecodeError",
    "请根据下面的文章回答问题。 河边的小镇有一座桥和一个集市。",
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|im_start|>", "<|im_end|>")


def byte_level(kind: str = "llama3") -> Tokenizer:
    """A byte-level BPE that splits words as GPT-2, Llama 3 or SmolLM (digits one by one) do."""
    return Tokenizer.from_str(_trained(kind))


@cache
def _trained(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    first = {
        "gpt2": [],
        "llama3": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated")],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
    }[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, plain])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer.to_str()


def sentencepiece_like() -> Tokenizer:
    """A BPE with byte fallback whose spaces are put in by a normalizer, as in Llama 2's tokenizer.json."""
    return Tokenizer.from_str(_trained_pieces())


@cache
def _trained_pieces() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator([word for text in TEXTS * 4 for word in text.split(" ")], trainer)
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [added for added in stored["added_tokens"] if added["content"] not in byte_tokens]
    return json.dumps(stored)


def adding(tokenizer: Tokenizer, single: str) -> Tokenizer:
    """The tokenizer, made to put special tokens around a text: "<s> $A"."""
    tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level as Llama 3": lambda: adding(byte_level("llama3"), "<s> $A"),
    "byte-level as GPT-2": lambda: byte_level("gpt2"),
    "byte-level, single digits": lambda: byte_level("digits"),
    "sentencepiece": lambda: adding(sentencepiece_like(), "<s> $A"),
}
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a folder of a tokenizer: `write(tokenizer, model_type="llama", **fields of tokenizer_config.json)`."""

    def make(tokenizer: Tokenizer, model_type: str = "llama", **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **fields}
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        return folder

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each kind."""
    return KINDS[request.param]()


@pytest.fixture
def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's, which puts <s> before a text."""
    return KINDS["sentencepiece"]()


@pytest.fixture
def llama_3() -> Tokenizer:
    """A byte-level tokenizer that puts <s> before a text."""
    return adding(byte_level(), "<s> $A")


@pytest.fixture
def make_tokenizer() -> Callable[..., Tokenizer]:
    """Makes a byte-level tokenizer, with `single` as its post-processor: `make_tokenizer("gpt2", "<s> $A")`."""
    return lambda kind="llama3", single=None: adding(byte_level(kind), single) if single else byte_level(kind)
