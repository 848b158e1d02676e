"""The tokenizer that a GGUF file carries, as a transformers tokenizer.

Two kinds are read: byte-level BPE (SmolLM2, Qwen, Llama 3) and SentencePiece's scored pieces (Gemma).

Invariant: it tokenises exactly as llama.cpp does with the same file, because a student must be trained on the tokens
that it is served with. (transformers' own GGUF reader does not know how `smollm` splits digits and spaces: it differs
wherever a digit follows two spaces or two newlines.) Imports no torch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.errors import UsageError
from cotree.models.gguf_files import GGUF

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# About right for English; stands in only where a server reports no usage and no tokenizer is given.
_BYTES_PER_TOKEN = 4
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How each vocabulary splits text before merging, by llama.cpp's name for it: the expression ("" for none), and whether
# GPT-2's own expression splits the parts further.
SPLITS = {
    "gpt-2": ("", True),
    "smollm": (r"\p{N}", True),
    "qwen2": (_WORDS + r"|\p{N}" + _REST, False),
    "llama-bpe": (_WORDS + r"|\p{N}{1,3}" + _REST, False),
}


def load_tokenizer(source: str | Path, *, chats: bool = True) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from a `.gguf` file, a transformers folder or a hub id; no code of theirs is run.

    Args:
        chats: whether it must have a chat template, as a student's must; a base model can write thoughts without one.

    Raises:
        UsageError: there is none, it lacks a chat template, or the GGUF's vocabulary is of an unsupported kind.
    """
    from transformers import AutoTokenizer

    if str(source).endswith(".gguf"):
        path = Path(source).absolute()
        tokenizer = _cached_tokenizer(path, path.stat().st_mtime_ns if path.is_file() else 0)
    else:
        check_has_tokenizer(Path(source))
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load the tokenizer of {source}: {str(error).splitlines()[0]}") from error
    if chats and not tokenizer.chat_template:
        raise UsageError(f"{source} has no chat template: cotree trains chat models; take an instruct variant")
    return tokenizer


def check_has_tokenizer(folder: Path) -> None:
    """Refuse a transformers folder without the files of a tokenizer; anything else passes."""
    if folder.is_dir() and not any(folder.glob("token*")):
        fix = "copy tokenizer.json and tokenizer_config.json of its base model into it"
        raise UsageError(f"{folder} has no tokenizer; {fix}")


def token_counter(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], int]:
    """A function that counts a text's tokens, four times as fast as transformers' own call: searches call it often.

    Without a tokenizer it estimates them by the text's bytes.
    """
    if tokenizer is None:
        return lambda text: math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    # The fast way gives no places of the tokens in the text, and has no form for a single text.
    return lambda text: len(backend.encode_batch_fast([text], add_special_tokens=False)[0])


@lru_cache(maxsize=4)
def _cached_tokenizer(path: Path, modified: int) -> PreTrainedTokenizerBase:
    """Cached because Gemma's 262,144 pieces take seconds to read; tokenizers are never changed after loading."""
    return gguf_tokenizer(GGUF(path))


def gguf_tokenizer(file: GGUF) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its special tokens and, where it has one, its chat template.

    Raises:
        UsageError: it has no vocabulary, or one of another kind.
    """
    for key in ("model", "tokens", "eos_token_id"):
        file[f"tokenizer.ggml.{key}"]
    return tokenizer_of(file.values, file.path)


def tokenizer_of(values: Mapping[str, Any], source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the metadata of a GGUF file describe; `source` is named in errors.

    Raises:
        UsageError: the vocabulary is of another kind (the message says to take the transformers folder instead).
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    model, pre = values["tokenizer.ggml.model"], values.get("tokenizer.ggml.pre", "gpt-2")
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    # With a space prefix a text has other tokens at its start than in the middle, so no text could be continued.
    if model == "llama" and not values.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer = _scored_pieces(values, tokens)
    elif model == "gpt2" and pre in SPLITS:
        tokenizer = _byte_level(values, tokens, pre)
    else:
        known = f"gpt2 with {', '.join(SPLITS)}, and llama without a space prefix"
        fix = "give the model's transformers folder instead"
        raise UsageError(f"{source} has a {model}/{pre} vocabulary, cotree reads {known}: {fix}")
    kinds = list(zip(tokens, values.get("tokenizer.ggml.token_type", []), strict=False))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])

    eos = tokens[values["tokenizer.ggml.eos_token_id"]]
    named: dict[str, Any] = {"eos_token": eos, "pad_token": eos}
    for name, key in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = values.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            named[name] = tokens[index]
    if values.get("tokenizer.ggml.add_bos_token") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    template = values.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def _byte_level(values: Mapping[str, Any], tokens: list[str], pre: str) -> Tokenizer:
    """GPT-2's kind: text is split by regular expressions, then bytes are merged in the order of the file's merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in values["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    expression, then_as_gpt2 = SPLITS[pre]
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated")] if expression else []
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=then_as_gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _scored_pieces(values: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's kind: of all neighbours that form a piece together, those of the best score are merged first.

    Expressed as BPE: every way to cut a piece in two is a merge, ranked by the piece's score. A space is written as
    U+2581, and a character without a piece as its bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores, kinds = values["tokenizer.ggml.scores"], values["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = sorted((i for i, kind in enumerate(kinds) if kind == _NORMAL), key=lambda i: -scores[i])
    halves = ((tokens[i][:cut], tokens[i][cut:]) for i in ranked for cut in range(1, len(tokens[i])))
    merges = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
