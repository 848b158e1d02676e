"""The supported model families: their names in transformers and GGUF, for models and for tensors.

Invariant: a family is here only if training, GGUF -> transformers and transformers -> GGUF are all tested for it;
everything else is refused by name. Imports no torch.
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
# What every layer of every family has.
MATRICES_AND_NORMS = sorted(set(_LAYER.values()) - {"attn_q_norm", "attn_k_norm"})
_OUTER_BACK = {gguf: name for name, gguf in _OUTER.items()}
_LAYER_BACK = {gguf: name for name, gguf in _LAYER.items()}


@dataclass(frozen=True)
class Family:
    """A family as transformers and llama.cpp know it.

    architecture: the class in transformers, as `config.json` states it. gguf: the architecture's name in GGUF.
    rotates_pairs: whether llama.cpp rotates neighbouring dimensions where transformers rotates halves, so that the rows
        of q_proj and k_proj have another order in GGUF.
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
    """The transformers config of a folder or a hub id, of whatever family.

    Args:
        fault: begins the error: "cannot load the student X".

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers checks a config with errors of many types
        raise UsageError(f"{fault}: {' '.join(str(error).split())[:200]}") from error


def supported_family(config: Any, cannot: str) -> Family:
    """The family of a transformers config.

    Args:
        cannot: begins the error: "cannot train".

    Raises:
        UsageError: the model is of no supported family, or has layers that see a window of the text only.
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
        KeyError: no family has such a tensor.
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
    """Rows of a q or k projection (heads * head_dim, ...) from transformers' rotary order to llama.cpp's."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def reordered(
    values: np.ndarray, name: str, config: Mapping[str, Any], order: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """The values of a tensor in GGUF's or transformers' rotary order, where the two differ for it.

    Args:
        values: of the whole tensor.
        name: of the tensor in transformers.
        config: the model's `config.json`.
        order: `to_pairs` for GGUF's order, `to_halves` for that of transformers.
    """
    if not FAMILIES[config["model_type"]].rotates_pairs:
        return values
    heads = config["num_attention_heads"]
    if ".q_proj." in name:
        return order(values, heads)
    return order(values, config.get("num_key_value_heads") or heads) if ".k_proj." in name else values
