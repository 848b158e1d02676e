"""The memory of training, from a model's shapes alone: no weights are read, and nothing is asked of the hub.

What the optimizer holds is counted exactly, activations are estimated.
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
    """Bytes in each process of a training.

    Attributes:
        weights: in fp32; of a sharded model the process's own, and the layers that are gathered at once.
        gradients: of what is trained; with DDP also the copies that it sends.
        moments: Adam's two for each number that is trained.
        activations: an estimate of what one pack keeps for its backward pass; half or twice of it is no surprise.
        reference: all that is there while DPO's reference is computed, before the model is sharded; else 0.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    reference: int

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.weights + self.gradients + self.moments + self.activations, self.reference)


def shapes_of(weights: str) -> Any:
    """The transformers config of weights that a recipe names: their own if they are here, or that of a known model.

    Raises:
        UsageError: they are not here (a folder needs no more than its config.json), and their shapes are not known.
    """
    if (Path(weights) / "config.json").is_file():
        return student_config(Path(weights))
    on_hub = HUB_WEIGHTS.fullmatch(weights)
    if on_hub is not None and on_hub["repo"] in _SHAPES:
        return AutoConfig.for_model(**_SHAPES[on_hub["repo"]])
    return student_config(locate(weights))


def empty_model(config: Any) -> Any:
    """A model of a config without weights (on torch's meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def training_memory(config: Any, settings: Optimizer, *, processes: int, tokens: int) -> TrainMemory:
    """The memory of training a model of this config.

    Args:
        config: of transformers.
        settings: of the method; `precision: auto` is what it becomes on this machine.
        processes: that train together.
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
    rounded = _BF16 * (layer + head) if in_bf16 else 0  # of the layer that is computed, and of the last product
    compared = isinstance(settings, DPO) and settings.has_reference
    return TrainMemory(
        weights=_FP32 * (weights // shards + gathered),
        gradients=_FP32 * (trained // shards) * (2 if processes > 1 and not sharded else 1),
        moments=2 * _FP32 * (trained // shards),
        activations=tokens * ((_BF16 if in_bf16 else _FP32) * kept + _FP32 * config.vocab_size) + rounded,
        reference=_FP32 * (whole + tokens * config.vocab_size) + rounded if compared else 0,
    )
