"""Load the tokenizer of a checkpoint, and find the token ids that end generation.

The `tokenizers` library alone reads a tokenizer.json, since transformers' classes rebuild parts of it depending on
the class in tokenizer_config.json and on the release. The `sentencepiece` library reads a tokenizer.model for the same
reason. transformers reads the chat template and the names of special tokens.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from sparsecache.engine.config_checks import read_json
from sparsecache.engine.gguf_tokenizer import load_gguf_tokenizer
from sparsecache.engine.tokenizer import Tokenizer, mistral_regex_fixed
from sparsecache.errors import UsageError, one_line
from sparsecache.files import read_file

_MAX_MODEL_BYTES = 256 * 2**20  # the largest known tokenizer.model has 5 MiB
_BYTES = 256  # a vocabulary of tiktoken holds every byte
_END_OF_TURN_TOKENS = ("<|eot_id|>", "<|im_end|>")


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a folder or GGUF file: a Tokenizer, or transformers' own where neither library reads it.

    Raises UsageError if none can be loaded without running code from the folder.
    """
    file, model = path / "tokenizer.json", path / "tokenizer.model"
    if not file.is_file() and model.is_file():
        _check_sentencepiece(path)
    try:
        if path.suffix == ".gguf":
            return load_gguf_tokenizer(path)
        if file.is_file():
            return _load_from_json(file)
        hf_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return _load_sentencepiece(model, hf_tokenizer) if model.is_file() else hf_tokenizer
    except UsageError:
        raise
    except Exception as error:  # whatever a broken tokenizer file raises
        raise UsageError(f"Could not load a tokenizer from {path}: {one_line(error)}") from error


def _load_from_json(file: Path) -> Tokenizer:
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False)
    except Exception:  # a class that cannot be made of this file, or needs a package: its name is only a label
        hf_tokenizer = None
    if not hasattr(hf_tokenizer, "backend_tokenizer"):
        hf_tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
    encoder = tokenizers.Tokenizer.from_file(str(file))
    encoder.no_truncation()
    encoder.no_padding()
    if mistral_regex_fixed(hf_tokenizer):
        encoder.pre_tokenizer = hf_tokenizer.backend_tokenizer.pre_tokenizer
    return Tokenizer(file, encoder, hf_tokenizer)


def _load_sentencepiece(file: Path, hf_tokenizer: Any) -> Any:
    from sparsecache.engine.sentencepiece_model import SentencePieceEncoder, read_model

    model = read_model(read_file(file, _MAX_MODEL_BYTES))
    if model is None:  # a file of tiktoken, which transformers has read
        if len(hf_tokenizer.get_vocab()) < _BYTES:
            raise ValueError(f"{file.name} holds no vocabulary")
        return hf_tokenizer
    config = file.with_name("tokenizer_config.json")
    settings = read_json(config) if config.is_file() else {}
    encoder = SentencePieceEncoder(model, hf_tokenizer.added_tokens_decoder, settings, hf_tokenizer.bos_token)
    return Tokenizer(file, encoder, hf_tokenizer)


def _check_sentencepiece(path: Path) -> None:
    if not all(_installed(name) for name in ("sentencepiece", "google.protobuf")):
        raise UsageError(
            f"{path} has a tokenizer.model and no tokenizer.json. Reading it needs two packages: "
            f"pip install sentencepiece protobuf"
        )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def find_stop_ids(path: Path, config: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a turn: generation_config's eos, the tokenizer's eos, <|eot_id|> and <|im_end|>.

    Without a generation_config.json, the eos of `config` is used, as in transformers. Raises UsageError for an
    eos_token_id that is not a token id.
    """
    if (path / "generation_config.json").is_file():
        stated = _read_generation_config(path).eos_token_id
    else:
        stated = config.get_text_config().eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    wrong = [each for each in listed if each is not None and (type(each) is not int or each < 0)]
    if wrong:
        raise UsageError(f"{path} states eos_token_id {wrong[0]!r}; a token id is a whole number from 0 on.")
    ids = {*listed, tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in _END_OF_TURN_TOKENS if token in vocabulary}
    return sorted(stop_id for stop_id in ids if stop_id is not None)


def _read_generation_config(path: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # broken JSON, or values that transformers refuses
        raise UsageError(f"{path / 'generation_config.json'} cannot be read: {one_line(error)}") from error
