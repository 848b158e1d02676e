"""Estimate training memory from a model's shapes, without weights or network access.

Weights, gradients and optimizer state are exact, activations are estimated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from cotree.models.weights import HUB_WEIGHTS, locate
from cotree.train.settings import DPO, Optimizer
from cotree.train.student import student_config
from cotree.train.trainer import resolve_precision

_SHAPES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
_FP32, _BF16 = 4, 2


@dataclass(frozen=True)
class TrainMemory:
    """Memory of a training in bytes per process.

    Attributes:
        weights: in fp32; with FSDP the process's shard and the layers gathered at once.
        gradients: of trainable weights; with DDP also its communication buckets.
        moments: Adam's two per trainable weight.
        activations: estimate of what one pack keeps for the backward pass, within a factor of 2.
        reference: total while DPO's reference log-probabilities are computed, before sharding; else 0.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    reference: int

    @property
    def peak(self) -> int:
        """Peak bytes."""
        return max(self.weights + self.gradients + self.moments + self.activations, self.reference)


def shapes_of(weights: str) -> Any:
    """The transformers config of a recipe's weights: from local files, or of a known hub model.

    Raises:
        UsageError: no local config (a folder needs only its config.json), and not a known model.
    """
    if (Path(weights) / "config.json").is_file():
        return student_config(Path(weights))
    on_hub = HUB_WEIGHTS.fullmatch(weights)
    if on_hub is not None and on_hub["repo"] in _SHAPES:
        return AutoConfig.for_model(**_SHAPES[on_hub["repo"]])
    return student_config(locate(weights))


def empty_model(config: Any) -> Any:
    """Build a model on torch's meta device, without allocating weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def training_memory(config: Any, settings: Optimizer, *, processes: int, tokens: int) -> TrainMemory:
    """Estimate the memory of training a model of this config.

    Args:
        config: of transformers.
        settings: of the method; `precision: auto` is resolved for this machine.
        processes: number of training processes.
        tokens: of the largest pack.
    """
    model = empty_model(config)
    weights = trained = whole = model.num_parameters()
    if settings.lora:
        layers = [part for part in model.model.modules() if isinstance(part, torch.nn.Linear)]
        trained = settings.lora.rank * sum(layer.in_features + layer.out_features for layer in layers)
        weights += trained
    sharded, shards = settings.shard and processes > 1, processes if settings.shard else 1
    layer = sum(values.numel() for values in model.model.layers[0].parameters())
    head = config.vocab_size * config.hidden_size
    gathered = 2 * layer + (1 if config.tie_word_embeddings else 2) * head if sharded else 0
    # A layer keeps about six rows of the model's width and two of the feed-forward's for each token
    # (`model.checkpoint_layers`); the vocabulary is kept in fp32 where a token is scored.
    kept = config.num_hidden_layers * (6 * config.hidden_size + 2 * config.intermediate_size)
    kept = kept // 6 if settings.gradient_checkpointing else kept
    in_bf16 = resolve_precision(settings).precision == "bf16"
    rounded = _BF16 * (layer + head) if in_bf16 else 0  # bf16 copies of the current layer's weights and the head's
    compared = isinstance(settings, DPO) and settings.has_reference
    return TrainMemory(
        weights=_FP32 * (weights // shards + gathered),
        gradients=_FP32 * (trained // shards) * (2 if processes > 1 and not sharded else 1),
        moments=2 * _FP32 * (trained // shards),
        activations=tokens * ((_BF16 if in_bf16 else _FP32) * kept + _FP32 * config.vocab_size) + rounded,
        reference=_FP32 * (whole + tokens * config.vocab_size) + rounded if compared else 0,
    )
