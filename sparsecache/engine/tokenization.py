"""Load the tokenizer of a checkpoint, and find the token ids that end generation.

The `tokenizers` library alone reads a `tokenizer.json`, since transformers' classes rebuild parts of it depending on
the class in tokenizer_config.json and on the release. transformers reads the chat template and the names of special
tokens. Folders without a tokenizer.json get transformers' own tokenizer.
"""

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, BatchEncoding, GenerationConfig, PreTrainedTokenizerFast

from sparsecache.engine.gguf_file import isolated_folder
from sparsecache.errors import UsageError, one_line

_END_OF_TURN_TOKENS = ("<|eot_id|>", "<|im_end|>")
_PROBE_TEXTS = (
    "Question: which of the towns has a mill? Don't say I'LL, they'd ask.",
    "  two  spaces,   three\n\n\nand lines\t\tand tabs \r\n ",
    " 1 22 333 4444 55555 1,234.50 17:45 12% 2024-07-26",
    "def add(first, second):\n    total = first + second  # sum\n    return {'a': [total]}\n",
    "请根据下面的文章回答问题。河边的小镇有一座桥，１２３。 Привет, où été naïve ﬁn e\u0301",
    "🙂👩‍👧 <b>x</b> https://a.bc/d?e=f&g getValue JSONDecodeError camelCase NaOH",
)


class Tokenizer:
    """The tokenizer of a tokenizer.json, with the chat template and special tokens that transformers reads.

    It encodes and decodes exactly as the `tokenizers` library, without the truncation and padding that the file may
    state. Its methods have the names and arguments of a transformers tokenizer.
    """

    def __init__(self, path: Path, hf_tokenizer: Any):
        """path: the tokenizer.json. hf_tokenizer: transformers' tokenizer of its folder."""
        self._path, self._hf_tokenizer = path, hf_tokenizer
        self._encoder = tokenizers.Tokenizer.from_file(str(path))
        self._encoder.no_truncation()
        self._encoder.no_padding()
        # Set by transformers if it detects the incorrect regex: True if tokenizer_config.json asks for the correct one.
        self._mistral_regex_fixed: bool | None = getattr(hf_tokenizer.backend_tokenizer, "fix_mistral_regex", None)
        if self._mistral_regex_fixed:
            self._encoder.pre_tokenizer = hf_tokenizer.backend_tokenizer.pre_tokenizer
        self.bos_token: str | None = hf_tokenizer.bos_token
        self.bos_token_id = self._id_of(hf_tokenizer.bos_token)
        self.eos_token_id = self._id_of(hf_tokenizer.eos_token)
        self.chat_template: Any = hf_tokenizer.chat_template
        self._special_ids = {*hf_tokenizer.all_special_ids}

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._encoder.token_to_id(token)

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> BatchEncoding:
        """Return the ids as `input_ids`; `verbose` is ignored."""
        return BatchEncoding({"input_ids": self.encode(text, add_special_tokens=add_special_tokens)})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids. tokenizer.json and transformers both name special tokens."""
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id not in self._special_ids]
        text: str = self._encoder.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, with added ones."""
        vocabulary: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_ids_to_tokens(self, token_ids: list[int]) -> list[str | None]:
        """Return the token of each id; None for an unknown id."""
        return [self._encoder.id_to_token(token_id) for token_id in token_ids]

    def get_chat_template(self) -> str:
        """Return the chat template, the default of several. Raises ValueError if there is none."""
        template: str = self._hf_tokenizer.get_chat_template()
        return template

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation to text, or to token ids with `tokenize=True`."""
        tokenize = options.pop("tokenize", True)
        text = self._hf_tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @cached_property
    def missing_tokens(self) -> list[str]:
        """Return tokens that tokenizer_config.json or its class adds and tokenizer.json does not know."""
        added: dict[str, int] = self._hf_tokenizer.added_tokens_encoder
        return [token for token, at in added.items() if at not in self.encode(token, add_special_tokens=False)]

    @cached_property
    def notes(self) -> list[str]:
        """Return warnings for the user about tokenization."""
        notes = []
        hf_ids = [
            self._hf_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _PROBE_TEXTS
        ]
        if hf_ids != [self.encode(text, add_special_tokens=False) for text in _PROBE_TEXTS]:
            label = type(self._hf_tokenizer).__name__
            notes.append(
                f"transformers' {label} tokenizes some texts differently from {self._path}. "
                f"Prompts get the ids of tokenizer.json."
            )
        if self._mistral_regex_fixed is False:
            notes.append(
                f"transformers detects in {self._path} the incorrect regex that some Mistral checkpoints ship. "
                f"Prompts get the ids of tokenizer.json as it is. To use the correct regex, add "
                f'"fix_mistral_regex": true to tokenizer_config.json.'
            )
        if self.encode("x")[-1:] == [self.eos_token_id]:
            notes.append(
                f"{self._path} ends every text with the end-of-text token, also a prompt that is not wrapped as chat."
            )
        return notes


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a folder or GGUF file: a Tokenizer of the tokenizer.json, or else transformers' own.

    Raises UsageError if none can be loaded without running code from the folder.
    """
    if path.suffix == ".gguf":
        return _load_from_gguf(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        _check_sentencepiece(path)
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not file.is_file():
            return hf_tokenizer
        if not hasattr(hf_tokenizer, "backend_tokenizer"):  # a class that does not read tokenizer.json
            hf_tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        return Tokenizer(file, hf_tokenizer)
    except Exception as error:  # whatever a broken tokenizer file raises
        raise UsageError(f"Could not load a tokenizer from {path}: {one_line(error)}") from error


def _check_sentencepiece(path: Path) -> None:
    lacking = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if lacking and (path / "tokenizer.model").is_file():
        raise UsageError(
            f"{path} has a tokenizer.model and no tokenizer.json. Reading it needs two packages: "
            f"pip install sentencepiece protobuf"
        )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _load_from_gguf(path: Path) -> Any:
    try:
        with isolated_folder(path) as folder:
            return AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    except Exception as error:  # whatever a broken file raises
        raise UsageError(f"Could not load a tokenizer from {path}: {one_line(error)}") from error


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
