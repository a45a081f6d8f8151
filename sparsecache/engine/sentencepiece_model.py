"""Encode texts with the `sentencepiece` library, for a tokenizer.model without a tokenizer.json.

transformers rebuilds such a tokenizer by rules of its own: it drops a space at the start of a text, and depending on
the class in tokenizer_config.json it ignores how the model normalizes texts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken


def read_model(content: bytes) -> ModelProto | None:
    """Return the model in a tokenizer.model; None for a file of another format, such as tiktoken's."""
    try:
        model = ModelProto.FromString(content)
    except Exception:  # DecodeError of protobuf, which has no types
        return None
    return model if model.pieces else None


class Encoding(NamedTuple):
    """The token ids of a text."""

    ids: list[int]


class SentencePieceEncoder:
    """A sentencepiece model with the part of the interface of `tokenizers.Tokenizer` that a Tokenizer needs.

    Special tokens are recognised in a text. sentencepiece encodes what stands between them.
    """

    def __init__(
        self, model: ModelProto, added: Mapping[int, AddedToken], settings: Mapping[str, Any], bos: str | None
    ):
        """model: what `read_model` returns. added: transformers' special and added tokens by id.

        settings: the tokenizer_config.json, of which `legacy`, `add_bos_token` and `add_eos_token` count, with the
        defaults of transformers. bos: the BOS token, if it is not the model's own.

        Raises RuntimeError for a model that sentencepiece refuses.
        """
        self._first = SentencePieceProcessor(model_proto=model.SerializeToString())
        inner = ModelProto()
        inner.CopyFrom(model)
        inner.normalizer_spec.add_dummy_prefix = False
        self._inner = SentencePieceProcessor(model_proto=inner.SerializeToString())
        # The model adds a space to the start of a text; legacy tokenizers also add one after a special token.
        self._later = self._first if settings.get("legacy") else self._inner
        self._pieces = [self._first.id_to_piece(at) for at in range(self._first.get_piece_size())]
        known = {piece: at for at, piece in enumerate(self._pieces)}
        controls = {piece: at for piece, at in known.items() if self._first.is_control(at)}
        # sentencepiece itself recognises a symbol that the model defines and that is not special.
        names = {str(token): at for at, token in added.items() if token.special or str(token) not in known}
        self._special = controls | {token: known.get(token, at) for token, at in names.items()}
        self._special_names = {at: token for token, at in self._special.items()}
        self._vocabulary = known | self._special
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")
        bos_id, eos_id = self._special.get(bos or "", self._first.bos_id()), self._first.eos_id()
        self._prefix = [bos_id] if settings.get("add_bos_token", True) and bos_id >= 0 else []
        self._suffix = [eos_id] if settings.get("add_eos_token", False) and eos_id >= 0 else []

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Return the token ids, with BOS and EOS as the settings ask for if `add_special_tokens`."""
        ids = list(self._encode(text))
        return Encoding([*self._prefix, *ids, *self._suffix] if add_special_tokens else ids)

    def _encode(self, text: str) -> Iterator[int]:
        start = 0
        for match in self._split.finditer(text):
            yield from self._encode_plain(text[start : match.start()], start)
            yield self._special[match[0]]
            start = match.end()
        yield from self._encode_plain(text[start:], start)

    def _encode_plain(self, text: str, start: int) -> Sequence[int]:
        ids: list[int] = (self._later if start else self._first).encode(text)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text. Only the space that the model adds to the start of a text is removed."""
        parts: list[str] = []
        for special, run in groupby(ids, key=self._special_names.__contains__):
            if special and not skip_special_tokens:
                parts += [self._special_names[token_id] for token_id in run]
            elif not special:
                pieces = [token_id for token_id in run if 0 <= token_id < len(self._pieces)]
                parts.append((self._inner if parts else self._first).decode(pieces))
        return "".join(parts)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        return self._vocabulary.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id; None for an unknown id."""
        if token_id in self._special_names:
            return self._special_names[token_id]
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the ids of all tokens."""
        return dict(self._vocabulary)
