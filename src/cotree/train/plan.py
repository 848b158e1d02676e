"""What a training stage would do, before it does it: rows, tokens, packs, and estimates of memory and time.

Invariant: nothing is written and no weight is loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cotree.experiment.recipe import TrainDPO, TrainSFT
from cotree.models.gguf_file import GGUF
from cotree.models.tokenizer import load_tokenizer
from cotree.train.forest import forest_tokens, packs
from cotree.train.student import gguf_config
from cotree.train.trainer import encode_file, fixed_steps


@dataclass(frozen=True)
class TrainPlan:
    """Rows, rows over the token limit, steps, packs, tokens of all epochs unpacked and packed, and two estimates.

    `peak_bytes` and `seconds` are estimates: weights, gradients, Adam's moments and the largest pack's activations in
    fp32 (half or twice of it is no surprise); and the matrices' work, the reference's included, at the speed of a
    matrix product measured here, beside which attention, the optimizer and checkpoints take as long again or more.
    """

    rows: int
    too_long: int
    steps: int
    packs: int
    tokens: int
    packed_tokens: int
    peak_bytes: int
    seconds: float

    @property
    def token_ratio(self) -> float:
        """Tokens that plain training computes for each one computed here."""
        return self.tokens / self.packed_tokens


def plan(rows: Path, student: Path, settings: TrainSFT | TrainDPO, seed: int, max_tokens: int) -> TrainPlan:
    """Plan `train_sft` or `train_dpo` (by the type of settings) of a GGUF; other arguments are theirs."""
    file = GGUF(student)
    config, encoded = gguf_config(file), encode_file(rows, load_tokenizer(student), settings, max_tokens)
    steps = fixed_steps([tuple(row.prompt) for row in encoded.rows], settings.batch_size, settings.epochs, seed)
    dealt = [pack for step in steps for pack in packs([encoded.rows[index] for index in step], settings.pack_tokens)]
    sizes = [forest_tokens(pack) for pack in dealt]
    weights = sum(prod(tensor.shape) for tensor in file.tensors.values())
    # A layer keeps about five rows of the model's width and two of the feed-forward's for each token (`recompute`);
    # the vocabulary is kept where a token is scored.
    kept = config["num_hidden_layers"] * (5 * config["hidden_size"] + 2 * config["intermediate_size"])
    kept = kept // 6 if settings.gradient_checkpointing else kept
    peak = (4 if settings.lora else 16) * weights + 4 * max(sizes) * (kept + config["vocab_size"])
    work = (4 if settings.lora else 6) * weights * sum(sizes)  # an adapter leaves out the gradients of the weights
    if isinstance(settings, TrainDPO) and settings.has_reference:
        work += 2 * weights * sum(map(forest_tokens, packs(encoded.rows, settings.pack_tokens)))
    return TrainPlan(
        rows=len(encoded.rows),
        too_long=encoded.too_long,
        steps=len(steps),
        packs=len(dealt),
        tokens=sum(encoded.rows[index].tokens for step in steps for index in step),
        packed_tokens=sum(sizes),
        peak_bytes=peak,
        seconds=work / _speed(),
    )


def _speed() -> float:
    """Floating-point operations a second of a matrix product like those of a small model."""
    import torch

    left, right = torch.randn(512, 576), torch.randn(576, 1536)
    _ = left @ right
    started = time.perf_counter()
    for _ in range(10):
        _ = left @ right
    return 10 * 2 * 512 * 576 * 1536 / (time.perf_counter() - started)
