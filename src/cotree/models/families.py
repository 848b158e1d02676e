"""Supported model families, and the names of models and tensors in transformers and GGUF.

Invariant: a family is listed only if training, GGUF -> transformers and transformers -> GGUF are tested for it; others
are refused by name. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cotree.base.errors import UsageError

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Tensors in every layer of every family.
MATRICES_AND_NORMS = sorted(set(_LAYER.values()) - {"attn_q_norm", "attn_k_norm"})
_OUTER_BACK = {gguf: name for name, gguf in _OUTER.items()}
_LAYER_BACK = {gguf: name for name, gguf in _LAYER.items()}


@dataclass(frozen=True)
class Family:
    """A model family in transformers and llama.cpp.

    architecture: the transformers class in `config.json`. gguf: the architecture's name in GGUF.
    rotates_pairs: RoPE rotates adjacent dimensions in llama.cpp but halves in transformers, so the rows of q_proj and
        k_proj are permuted in GGUF.
    """

    architecture: str
    gguf: str
    rotates_pairs: bool


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", rotates_pairs=True),
    "mistral": Family("MistralForCausalLM", "llama", rotates_pairs=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", rotates_pairs=False),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", rotates_pairs=False),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3", rotates_pairs=True),
}


def read_config(source: str | Path, fault: str) -> Any:
    """Read the transformers config of a folder or hub id, of any family.

    Args:
        fault: start of the error message: "cannot load the student X".

    Raises:
        UsageError: missing or unreadable.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises many types for an invalid config
        raise UsageError(f"{fault}: {' '.join(str(error).split())[:200]}") from error


def supported_family(config: Any, cannot: str) -> Family:
    """The family of a transformers config.

    Args:
        cannot: start of the error message: "cannot train".

    Raises:
        UsageError: unsupported family, or sliding-window attention.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UsageError(f"{cannot} {config.model_type!r} models: supported are {', '.join(FAMILIES)}")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        raise UsageError(f"{cannot} a model with sliding-window layers: set `sliding_window` to null in config.json")
    return family


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF: `model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`.

    Raises:
        KeyError: unknown tensor.
    """
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{match[1]}.{_LAYER[match[2]]}.{kind}" if match else f"{_OUTER[stem]}.{kind}"


def transformers_name(name: str) -> str:
    """A tensor's name in transformers: the inverse of `gguf_name`, with the same error."""
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    return f"model.layers.{match[1]}.{_LAYER_BACK[match[2]]}.{kind}" if match else f"{_OUTER_BACK[stem]}.{kind}"


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows of a q or k projection (heads * head_dim, ...) from transformers' RoPE order to llama.cpp's."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def reordered(
    values: np.ndarray, name: str, config: Mapping[str, Any], order: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Convert a tensor to GGUF's or transformers' RoPE order, if it is a q or k projection that differs.

    Args:
        values: of the whole tensor.
        name: of the tensor in transformers.
        config: the model's `config.json`.
        order: `to_pairs` for GGUF, `to_halves` for transformers.
    """
    if not FAMILIES[config["model_type"]].rotates_pairs:
        return values
    heads = config["num_attention_heads"]
    if ".q_proj." in name:
        return order(values, heads)
    return order(values, config.get("num_key_value_heads") or heads) if ".k_proj." in name else values
