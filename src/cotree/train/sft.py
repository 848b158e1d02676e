"""Supervised fine-tuning on chains (paper, SFT stage): cross-entropy over completions, a token mean over the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from cotree.config import TrainSFT
from cotree.errors import UsageError
from cotree.llm.tokenizer import load_tokenizer
from cotree.train.encode import Chain, encode_sft
from cotree.train.layout import Scored, sequence_logps
from cotree.train.resume import claim
from cotree.train.trainer import (
    StepLog,
    StepTrainer,
    TrainResult,
    finished,
    fixed_steps,
    load_model,
    read_rows,
    release,
    run,
    training_arguments,
)


def train_sft(
    rows: Path,
    student: Path,
    out: Path,
    settings: TrainSFT,
    seed: int,
    max_tokens: int,
    on_step: Callable[[StepLog], None] | None = None,
) -> TrainResult:
    """Fine-tune a student on chains; the same call after an interruption goes on, and after the end returns at once.

    The loss of a step is the mean of -log pi over all completion tokens of its `batch_size` chains, end of turn
    included, whatever `micro_batch_size` is.

    Args:
        rows: Parquet with `prompt` and `completion` (messages).
        student: a transformers folder (`student.load_student`).
        out: folder of this run: `model/` (the trained student), `result.json`, `log.jsonl`.
        settings: the recipe's `train.sft`.
        seed: fixes the order of the rows.
        max_tokens: chains with more tokens, prompt included, are left out and counted.
        on_step: called after each optimizer step; gauges: `tokens` (scored), `learning_rate`, `grad_norm`, `seconds`.

    Raises:
        UsageError: rows, student or settings cannot be trained on, or `out` holds a run on other inputs.
        CotreeError: the loss is no number any more, or the disk is full; nothing before the last checkpoint is lost.
    """
    began = monotonic()
    result = finished(out)
    if result is not None:
        return result
    tokenizer = load_tokenizer(student)
    encoded = encode_sft(tokenizer, read_rows(rows), max_tokens)
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} rows are over {max_tokens} tokens: raise build.max_tokens")
    claim(out, rows, student, settings, seed, max_tokens)
    steps = fixed_steps(len(encoded.rows), settings.batch_size, settings.epochs, seed)
    trainer: ChainTrainer | None = None
    try:
        trainer = ChainTrainer(
            load_model(student),
            [[encoded.rows[index] for index in step] for step in steps],
            training_arguments(out, settings, len(steps), seed),
            settings.micro_batch_size,
        )
        return run(trainer, tokenizer, out, encoded, began, on_step)
    finally:
        release(trainer)


class ChainTrainer(StepTrainer[Chain]):
    """Token-mean cross-entropy over the completions of a step."""

    def denominators(self, rows: Sequence[Chain]) -> dict[str, int]:
        """Scored tokens of the step."""
        return {"tokens": sum(len(chain.completion) for chain in rows)}

    def share(self, model: nn.Module, rows: Sequence[Chain], step: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of the mean of -log pi over the step's completion tokens."""
        sequences = [Scored(chain.prompt + chain.completion, len(chain.prompt)) for chain in rows]
        logps = torch.cat(sequence_logps(model, sequences))
        return -logps.sum() / step["tokens"], {"tokens": torch.tensor(len(logps))}
