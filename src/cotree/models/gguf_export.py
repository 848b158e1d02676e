"""Convert a transformers folder to GGUF with its own config and tokenizer, so one engine serves teacher and student.

Invariant: llama.cpp tokenizes with the written vocabulary exactly as the folder's tokenizer. Tokenizers for which this
fails (SentencePiece, pre-tokenizers unknown to llama.cpp) and configs that llama.cpp would compute differently are
refused by name. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np

from cotree.base.atomic import atomic_draft, sums_of, write_sums
from cotree.base.errors import UsageError
from cotree.models.families import MATRICES_AND_NORMS, gguf_name, read_config, reordered, supported_family, to_pairs
from cotree.models.gguf_files import as_float32, packed, stored_tensors, write_gguf
from cotree.models.settings import GGUFType
from cotree.models.tokenizer import SPLITS, load_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3's RoPE frequency factors: constants, not weights.
_CONSTANTS = "rope_freqs.weight"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Texts that tell pre-tokenizers apart: digits, spaces, line ends, contractions, scripts, symbols and marks.
HARD_TEXTS = (
    "Tom has 12 apples, 1,024 pears and 3.14 pies.\n\nIt's 17  minus 10\t\t= 7 \r\n \n  x",
    "I'LL we've THEY'RE he'd O'Neil's ''quoted'' \"it's\"",
    "½ naïve ２３ ٣٤ 中文字 日本語テキスト русский текст हिन्दी 한국어 עברית 🙂👩‍👩‍👧",
    "    def f(x):\n        return x**2  # 100%\n\n\n\n---\n===\n\u00a0\u2003wide\u200bspaces",
    "\\boxed{42} \\frac{1}{2} $x_1^{10}$ <b>&amp;</b> a_b-c/d\\e @user #tag https://a.b/c?d=e&f=1",
    "3\n\n 4\n\n  5   6 \n7", "a  1", " leading", "trailing  ", "\n", " ", "\t", "0123456789" * 3,
)  # fmt: skip


def export_gguf(model: Path, out: Path, kind: GGUFType) -> Path:
    """Write a transformers folder with its own tokenizer as a GGUF file, atomically; an existing file is replaced.

    Args:
        model: a transformers folder (safetensors) of a supported family.
        kind: type of the matrices; vectors (norms, biases) are always F32.

    Returns:
        `out`.

    Raises:
        UsageError: unsupported family or tokenizer, or weights are missing.
        CotreeError: a file cannot be read or written.
    """
    config = read_config(model, f"cannot read {model / 'config.json'} as a model's config")
    supported_family(config, "cannot export")
    stored = stored_tensors(model)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    try:
        sources = {gguf_name(name): name for name in stored}
    except KeyError as error:
        raise UsageError(f"{model} has a tensor that GGUF export does not know: {error}") from None
    if missing := sorted(_lacking(sources, config.num_hidden_layers, tied=config.tie_word_embeddings)):
        fault = f"{len(missing)} tensors are missing ({missing[0]}, ...)"
        raise UsageError(f"{model} is no whole model: {fault}; copy it again")
    values = header_of(model, config, len(stored["model.embed_tokens.weight"]))
    shapes = {name: stored[source].shape for name, source in sources.items()}
    factors = rope_factors(config)
    if factors is not None:
        shapes[_CONSTANTS] = factors.shape

    def read(name: str) -> np.ndarray:
        if name == _CONSTANTS and factors is not None:
            return factors
        return reordered(as_float32(stored[sources[name]]), sources[name], config.to_dict(), to_pairs)

    with atomic_draft(out) as draft:
        write_gguf(draft, {key: packed(value) for key, value in values.items()}, kind, shapes=shapes, read=read)
    write_sums(sums_of(out), [out])
    return out


def _lacking(there: Collection[str], layers: int, *, tied: bool) -> set[str]:
    """The names of missing tensors: matrices and norms, and in each layer those that the first has."""
    of_layer = {name.partition("blk.0.")[2] for name in there if name.startswith("blk.0.")}
    of_layer |= {f"{stem}.weight" for stem in MATRICES_AND_NORMS}
    wanted = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    wanted |= {f"blk.{layer}.{name}" for layer in range(layers) for name in of_layer}
    return wanted - set(there)


def header_of(folder: Path, config: Any, rows: int) -> dict[str, Any]:
    """GGUF metadata of a transformers folder: {key: number, bool, string, or list of these}.

    Args:
        config: the folder's transformers config.
        rows: of its embedding matrix.

    Raises:
        UsageError: config or tokenizer cannot be represented exactly.
    """
    return _architecture(folder, config, rows) | _vocabulary(load_tokenizer(folder, chats=False), folder, rows)


def _architecture(folder: Path, config: Any, rows: int) -> dict[str, Any]:
    family = supported_family(config, "cannot write as GGUF")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UsageError(f"cannot write {folder} as GGUF: llama.cpp computes {family.gguf} models with silu")
    without = [layer for layer, rotated in enumerate(getattr(config, "no_rope_layers", ())) if not rotated]
    if family.gguf == "smollm3" and without != [*range(3, config.num_hidden_layers, 4)]:
        raise UsageError(f"cannot write {folder} as GGUF: llama.cpp rotates no positions in every fourth layer only")
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "vocab_size": rows,
    } | _rotary(config.rope_parameters, folder)
    named = {"general.architecture": family.gguf, "general.name": folder.resolve().name}
    return named | {f"{family.gguf}.{key}": value for key, value in fields.items()}


def _rotary(rope: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """RoPE metadata; Llama 3's frequency factors are a tensor (`rope_factors`)."""
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return fields
    if kind == "linear":
        return fields | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and not {"attention_factor", "mscale", "beta_fast", "beta_slow", "truncate"} & {
        key for key, value in rope.items() if value is not None
    }:
        original = int(rope["original_max_position_embeddings"])
        scaling = {"type": "yarn", "factor": float(rope["factor"]), "original_context_length": original}
        return fields | {f"rope.scaling.{key}": value for key, value in scaling.items()}
    raise UsageError(f"cannot write {folder} as GGUF: llama.cpp has no rotary positions like its own ({kind})")


def rope_factors(config: Any) -> np.ndarray | None:
    """The divisor of each RoPE frequency in Llama 3, (head_dim / 2,); None for other models."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)  # tokens a turn
    turns = rope["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    model = state.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type", "a tokenizer of its own code")
        raise UsageError(
            f"cannot write {folder} as GGUF: its tokenizer is {'SentencePiece' if model else kind}, and llama.cpp cuts "
            "text with the folder's exactly only where it is byte-level BPE; serve it with vLLM and give its `url`"
        )
    if tokenizer.eos_token_id is None:
        raise UsageError(f"cannot write {folder} as GGUF: its tokenizer names no eos_token, so no reply would end")
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    words = tokenizer.get_vocab()
    if (most := max(words.values())) >= rows:
        raise UsageError(f"{folder} has {rows} embeddings, and a token {most}; copy its base model's tokenizer into it")
    for word, index in words.items():
        tokens[index], kinds[index] = word, NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        kinds[index] = CONTROL if added.special else USER_DEFINED
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.add_bos_token": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            values[f"tokenizer.ggml.{key}_token_id"] = index
    if tokenizer.chat_template:
        values["tokenizer.chat_template"] = str(tokenizer.chat_template)
    return values | {"tokenizer.ggml.pre": _split_of(tokenizer, values, folder, bool(model.get("ignore_merges")))}


def _split_of(tokenizer: Any, values: Mapping[str, Any], folder: Path, ignore_merges: bool) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer.

    Ignores decomposed Unicode: Qwen composes it first, llama.cpp never does.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    # Joined words of the whole vocabulary reveal differences that the sample texts do not.
    words = [tokenizer.decode(range(start, len(tokenizer), 97), skip_special_tokens=True) for start in range(8)]
    texts = [*HARD_TEXTS, *(normalize("NFC", text) for text in words), *(f"a {token} b{token}c" for token in added)]

    def cut(one: Any) -> Sequence[Sequence[int]]:
        return [encoded.ids for encoded in one.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]

    wanted = cut(tokenizer)
    for name in SPLITS:
        if ignore_merges != (name == "llama-bpe"):
            continue
        if cut(tokenizer_of({**values, "tokenizer.ggml.pre": name}, folder)) == wanted:
            return name
    raise UsageError(
        f"cannot write {folder} as GGUF: its tokenizer splits text in none of the ways that cotree knows of llama.cpp "
        f"({', '.join(SPLITS)}); serve it with vLLM and give its `url`"
    )
