"""Load a model's tokenizer, including the one in a GGUF file, as a transformers tokenizer.

GGUF vocabularies: byte-level BPE (SmolLM2, Qwen, Llama 3) and SentencePiece with scores (Gemma).

Invariant: it tokenizes exactly as llama.cpp does with the same file, because a student must be trained on the tokens
that it is served with. (transformers' GGUF reader does not know how `smollm` splits digits and spaces: it differs
wherever a digit follows two spaces or two newlines.) Imports no torch itself.
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

# Typical for English; used only if a server reports no usage and no tokenizer is given.
_BYTES_PER_TOKEN = 4
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenization by llama.cpp's name: (split regex or "", whether GPT-2's regex splits the parts further).
SPLITS = {
    "gpt-2": ("", True),
    "smollm": (r"\p{N}", True),
    "qwen2": (_WORDS + r"|\p{N}" + _REST, False),
    "llama-bpe": (_WORDS + r"|\p{N}{1,3}" + _REST, False),
}


def load_tokenizer(source: str | Path, *, chats: bool = True) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a `.gguf` file, a transformers folder or a hub id, without running remote code.

    Args:
        chats: require a chat template, which students need; base models can write thoughts without one.

    Raises:
        UsageError: no tokenizer, no chat template, or an unsupported GGUF vocabulary.
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
    """Raise UsageError for a transformers folder without tokenizer files; other sources pass."""
    if folder.is_dir() and not any(folder.glob("token*")):
        fix = "copy tokenizer.json and tokenizer_config.json of its base model into it"
        raise UsageError(f"{folder} has no tokenizer; {fix}")


def token_counter(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], int]:
    """A fast function that counts a text's tokens (4x transformers' own call); without a tokenizer, a byte-based
    estimate."""
    if tokenizer is None:
        return lambda text: math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    # The fast method skips offsets, and exists only for batches.
    return lambda text: len(backend.encode_batch_fast([text], add_special_tokens=False)[0])


@lru_cache(maxsize=4)
def _cached_tokenizer(path: Path, modified: int) -> PreTrainedTokenizerBase:
    """Cached because Gemma's 262,144 pieces take seconds to read; tokenizers are never changed after loading."""
    return gguf_tokenizer(GGUF(path))


def gguf_tokenizer(file: GGUF) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with special tokens and chat template if any.

    Raises:
        UsageError: no vocabulary, or an unsupported one.
    """
    for key in ("model", "tokens", "eos_token_id"):
        file[f"tokenizer.ggml.{key}"]
    return tokenizer_of(file.values, file.path)


def tokenizer_of(values: Mapping[str, Any], source: Path) -> PreTrainedTokenizerBase:
    """Build a tokenizer from the metadata of a GGUF file; `source` is for error messages.

    Raises:
        UsageError: unsupported vocabulary (the message recommends the transformers folder).
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    model, pre = values["tokenizer.ggml.model"], values.get("tokenizer.ggml.pre", "gpt-2")
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    # With a space prefix, tokens at the start of a text differ from those inside, so texts could not be continued.
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
    """Byte-level BPE as in GPT-2: split by regex, then merge bytes in the order of the file's merges."""
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
    """SentencePiece with scores: neighbours that form the piece with the best score are merged first.

    Expressed as BPE: every split of a piece in two is a merge, ranked by the piece's score. A space is U+2581, and a
    character without a piece becomes its bytes.
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
