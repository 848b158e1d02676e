"""Estimate a training run without starting it: rows, tokens, packs, memory and time.

Loads no weights and writes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cotree.models.tokenizer import load_tokenizer
from cotree.train.forest import forest_tokens, packs
from cotree.train.memory import empty_model, training_memory
from cotree.train.processes import process_count
from cotree.train.rows import encode_file, fixed_steps
from cotree.train.settings import DPO, Optimizer
from cotree.train.student import student_config


@dataclass(frozen=True)
class TrainPlan:
    """The size of a training run, with estimates of its memory and time.

    Attributes:
        rows: per epoch. too_long: rows left out because they exceed `max_tokens`.
        steps: optimizer steps. packs: forward passes in all steps.
        tokens: in the rows of all steps, prompts included. packed_tokens: computed, shared prefixes once.
        peak_bytes: estimated, per process (`memory.TrainMemory`).
        seconds: a lower estimate: matrix products, including the reference's, at a FLOP rate measured here; attention,
            optimizer and checkpoints take as long again or more.
    """

    rows: int
    too_long: int
    steps: int
    packs: int
    tokens: int
    packed_tokens: int
    peak_bytes: int
    seconds: float


def plan(rows: Path, student: Path, settings: Optimizer, seed: int) -> TrainPlan:
    """Estimate `run.train` with these arguments; the student may also be a GGUF that is not converted yet.

    Raises:
        UsageError: rows or student cannot be trained on.
    """
    config, encoded = student_config(student), encode_file(rows, load_tokenizer(student), settings)
    steps = fixed_steps(encoded.rows, settings, seed)
    dealt = [pack for step in steps for pack in packs([encoded.rows[index] for index in step], settings.pack_tokens)]
    sizes = [forest_tokens(pack) for pack in dealt]
    weights = empty_model(config).num_parameters()
    memory = training_memory(config, settings, processes=process_count(settings), tokens=max(sizes))
    work = (4 if settings.lora else 6) * weights * sum(sizes)  # LoRA computes no weight gradients
    if isinstance(settings, DPO) and settings.has_reference:
        work += 2 * weights * sum(map(forest_tokens, packs(encoded.rows, settings.pack_tokens)))
    return TrainPlan(
        rows=len(encoded.rows),
        too_long=encoded.too_long,
        steps=len(steps),
        packs=len(dealt),
        tokens=sum(encoded.rows[index].tokens for step in steps for index in step),
        packed_tokens=sum(sizes),
        peak_bytes=memory.peak,
        seconds=work / _flops_per_second(),
    )


def _flops_per_second() -> float:
    """Measure the FLOP rate of a matrix product with a small model's shapes."""
    left, right = torch.randn(512, 576), torch.randn(576, 1536)
    _ = left @ right
    started = time.perf_counter()
    for _ in range(10):
        _ = left @ right
    return 10 * 2 * 512 * 576 * 1536 / (time.perf_counter() - started)
