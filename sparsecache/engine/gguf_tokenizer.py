"""Load the tokenizer of a GGUF file: transformers' reading of it, corrected where it gives other token ids.

A sentencepiece vocabulary is encoded by the `sentencepiece` library. A byte-level one is split as the field
tokenizer.ggml.pre says, of which transformers knows some names, depending on its release.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from sparsecache.engine.gguf_file import GGUFHeader, isolated_folder, read_header
from sparsecache.engine.tokenizer import Tokenizer

_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_REGEXES = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN_2),
}
"""Values of tokenizer.ggml.pre, with the regex in the tokenizer.json that the vocabulary comes from."""


def load_gguf_tokenizer(path: Path) -> Any:
    """Return a Tokenizer, or transformers' tokenizer. Raises what a broken file makes transformers raise."""
    with isolated_folder(path) as folder:
        hf_tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    header = read_header(path, whole=_VOCABULARY)
    if header.metadata.get("tokenizer.ggml.model") == "llama" and "tokenizer.ggml.scores" in header.metadata:
        return _sentencepiece(header, hf_tokenizer)
    if (splitter := _splitter(header.metadata.get("tokenizer.ggml.pre"))) is not None:
        hf_tokenizer.backend_tokenizer.pre_tokenizer = splitter
    return hf_tokenizer


def _splitter(name: Any) -> Any:
    """Return the pre-tokenizer of a byte-level vocabulary; None for a name that is left to transformers."""
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _REGEXES:
        split = pre_tokenizers.Split(Regex(_REGEXES[name]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def _sentencepiece(header: GGUFHeader, hf_tokenizer: Any) -> Tokenizer:
    from sparsecache.engine.sentencepiece_model import SentencePieceEncoder

    stated = {key.removeprefix("tokenizer.ggml."): value for key, value in header.metadata.items()}
    model = sentencepiece_model(stated)
    encoder = SentencePieceEncoder(model, hf_tokenizer.added_tokens_decoder, stated, hf_tokenizer.bos_token)
    return Tokenizer(header.path, encoder, hf_tokenizer)


def sentencepiece_model(stated: dict[str, Any]) -> Any:
    """Return sentencepiece's ModelProto of a vocabulary. stated: the fields `tokenizer.ggml.NAME` by name."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto()
    for piece, score, kind in zip(stated["tokens"], stated["scores"], stated["token_type"], strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)  # GGUF numbers the types as sentencepiece does
    if "unknown_token_id" in stated and ModelProto.SentencePiece.UNKNOWN not in stated["token_type"]:
        # Files of Gemma 3 call it a control token. sentencepiece before 0.2.3 refuses a model without an unknown one.
        model.pieces[stated["unknown_token_id"]].type = ModelProto.SentencePiece.UNKNOWN
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.bos_id = stated.get("bos_token_id", -1)
    model.trainer_spec.eos_id = stated.get("eos_token_id", -1)
    model.trainer_spec.unk_id = stated.get("unknown_token_id", 0)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = stated.get("add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = stated.get("remove_extra_whitespaces", False)
    return model
