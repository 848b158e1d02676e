"""The tokenizer that a GGUF file carries, as a transformers tokenizer.

Invariant: it cuts text exactly as llama.cpp does with the same file, because what the student is trained on and what
it is served with must be the same tokens. (transformers' own reader does not know how `smollm` splits digits and
spaces: it differs wherever a digit follows two spaces or two newlines.) Imports no torch of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.errors import UsageError
from cotree.llm.gguf_file import GGUF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How each vocabulary splits text before merging, by the name that llama.cpp gives it; None is GPT-2's own expression.
_SPLITS: dict[str, list[str | None]] = {
    "gpt-2": [None],
    "smollm": [r"\p{N}", None],
    "qwen2": [_WORDS + r"|\p{N}" + _REST],
    "llama-bpe": [_WORDS + r"|\p{N}{1,3}" + _REST],
}


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer, from a `.gguf` file, a transformers folder or a hub id.

    Raises:
        UsageError: there is none, it has no chat template, or the GGUF's vocabulary is of an unsupported kind.
    """
    from transformers import AutoTokenizer

    if str(source).endswith(".gguf"):
        tokenizer = gguf_tokenizer(GGUF(Path(source)))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load the tokenizer of {source}: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise UsageError(f"{source} has no chat template: cotree trains chat models; take an instruct variant")
    return tokenizer


def gguf_tokenizer(file: GGUF) -> PreTrainedTokenizerBase:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        UsageError: the vocabulary is of another kind (the message says to take the transformers folder instead).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    model, pre = file["tokenizer.ggml.model"], file.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _SPLITS:
        raise UsageError(
            f"{file.path} has a {model}/{pre} vocabulary, cotree reads gpt2 with {', '.join(_SPLITS)}: "
            "give the model's transformers folder or hub id as student instead"
        )
    tokens: list[str] = file["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in file["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            if split is None
            else pre_tokenizers.Split(Regex(split), behavior="isolated")
            for split in _SPLITS[pre]
        ]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] * (None not in _SPLITS[pre])
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, file.get("tokenizer.ggml.token_type", []), strict=False))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])

    named: dict[str, Any] = {"eos_token": tokens[file["tokenizer.ggml.eos_token_id"]]}
    for name, key in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            named[name] = tokens[index]
    if file.get("tokenizer.ggml.add_bos_token") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    named.setdefault("pad_token", named["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=file.get("tokenizer.chat_template"), **named
    )
