"""Supervised fine-tuning on chains (paper, SFT stage): cross-entropy over completions, packed by tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cotree.experiment.recipe import TrainSFT
from cotree.models.encode import Chain
from cotree.train.forest import Scored, forest_logps
from cotree.train.losses import weighted
from cotree.train.trainer import Step, StepLog, StepTrainer, TrainResult, train


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
    included, whatever `pack_tokens` is.

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
    return train(ChainTrainer, rows, student, out, settings, seed, max_tokens, on_step)


class ChainTrainer(StepTrainer[Chain]):
    """Token-mean cross-entropy over the completions of a step."""

    def share(self, model: nn.Module, rows: Sequence[Chain], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of the mean of -log pi over the step's completion tokens."""
        logps = forest_logps(model, [Scored(chain.chains[0], len(chain.prompt)) for chain in rows])
        sums = [weighted(values, step.weights[id(row)]) for values, row in zip(logps, rows, strict=True)]
        count = torch.tensor(float(sum(map(len, logps))), device=sums[0].device)
        return -torch.stack(sums).sum() / step.tokens, {"tokens": count}
