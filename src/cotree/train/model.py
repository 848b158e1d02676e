"""The model that is trained: a student folder in fp32, with the attention of `attention`, all weights or an adapter.

Invariant: what training starts from computes exactly what the folder holds. An adapter in the folder is merged first,
and a new one is zero at first, so the model at step 0 is the SFT checkpoint, which is DPO's reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from cotree.train.attention import ATTENTION, forest_attention
from cotree.train.settings import LoRA
from cotree.train.student import load_weights, make_readable, quiet


def load_model(student: Path, lora: LoRA | None = None, *, seed: int = 0, compiled: bool = False) -> PreTrainedModel:
    """A student folder (a model, or a PEFT adapter that names its base) as a model, checked to be trainable.

    Args:
        student: the folder.
        lora: add a new adapter of this size, and freeze the rest.
        seed: of the adapter's random half; the other half is zero.
        compiled: by torch.compile, at the first forward pass of each kind.

    Raises:
        UsageError: it is not trainable (see `student.family_of`), or the folder holds no whole model.
    """
    # Attention is other for every pack: it would be compiled for each of them, and is not.
    outside: Callable[[Any], Any] = torch.compiler.disable
    AttentionInterface.register(ATTENTION, outside(forest_attention) if compiled else forest_attention)
    model = load_weights(student, attn_implementation=ATTENTION).requires_grad_(True)
    if (student / "adapter_config.json").exists():
        model.name_or_path = ""  # no folder holds the merged weights
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with quiet():
            model = get_peft_model(model, settings)
    if compiled:
        model.compile(dynamic=True)
    return model


def save_model(model: Any, tokenizer: Any, folder: Path, state: dict[str, Any]) -> None:
    """Store a trained model and its tokenizer; of one with an adapter the merged weights, the adapter beside them.

    An adapter that continued another one is not stored: no folder holds what it goes on top of.

    Args:
        model: a transformers or PEFT model, not wrapped.
        tokenizer: stored with it.
        folder: an empty one; an adapter goes to `folder/adapter`.
        state: the model's weights, gathered from all processes.
    """
    if hasattr(model, "merge_and_unload"):
        if model.peft_config["default"].base_model_name_or_path:
            model.save_pretrained(folder / "adapter", state_dict=state)
        model.merge_and_unload().save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    make_readable(folder)
