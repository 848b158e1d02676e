"""Supervised fine-tuning on chains (paper, SFT stage): cross-entropy over completions, packed by tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cotree.config import TrainSFT
from cotree.data.files import check_template
from cotree.errors import UsageError
from cotree.llm.tokenizer import load_tokenizer
from cotree.train.encode import Chain, encode_sft
from cotree.train.forest import Scored, forest_logps, multiplicities
from cotree.train.losses import weighted
from cotree.train.model import load_model
from cotree.train.resume import claim
from cotree.train.trainer import (
    StepLog,
    StepTrainer,
    TrainResult,
    finished,
    fixed_steps,
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
    began = monotonic()
    if (out / "model").exists():
        claim(out, rows, student, settings, seed, max_tokens)
        return finished(out)
    tokenizer = load_tokenizer(student)
    found = read_rows(rows, ("prompt", "completion"))
    check_template(rows, tokenizer)
    encoded = encode_sft(tokenizer, found, max_tokens)
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} rows are over {max_tokens} tokens: raise build.max_tokens")
    steps = fixed_steps([tuple(chain.prompt) for chain in encoded.rows], settings.batch_size, settings.epochs, seed)
    trainer: ChainTrainer | None = None
    try:
        arguments = training_arguments(out, settings, len(steps), seed)
        with arguments.main_process_first(local=False):
            claim(out, rows, student, settings, seed, max_tokens)
        trainer = ChainTrainer(
            load_model(student, settings.lora, seed, settings.compile),
            [[encoded.rows[index] for index in step] for step in steps],
            arguments,
            settings,
        )
        return run(trainer, tokenizer, out, encoded, began, on_step)
    finally:
        release(trainer)


@dataclass(frozen=True)
class ChainStep:
    """What a pack must know about its step: the weight of each scored token (by id of its row), and their sum."""

    tokens: float
    weights: dict[int, Tensor]


class ChainTrainer(StepTrainer[Chain, ChainStep]):
    """Token-mean cross-entropy over the completions of a step."""

    def __init__(
        self, model: PreTrainedModel, steps: list[list[Chain]], arguments: TrainingArguments, settings: TrainSFT
    ) -> None:
        self.dedup = settings.sft_scope == "dedup"
        super().__init__(model, steps, arguments, settings)

    def whole(self, rows: Sequence[Chain]) -> ChainStep:
        """1 for every token, or one for all chains that share it."""
        if self.dedup:
            weights = [1 / count.double() for count in multiplicities([_scored(chain) for chain in rows])]
        else:
            weights = [torch.ones(len(chain.completion)) for chain in rows]
        tokens = sum(float(each.sum()) for each in weights)
        return ChainStep(tokens, {id(row): each for row, each in zip(rows, weights, strict=True)})

    def share(self, model: nn.Module, rows: Sequence[Chain], step: ChainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of the mean of -log pi over the step's completion tokens."""
        logps = forest_logps(model, [_scored(chain) for chain in rows])
        sums = [weighted(values, step.weights[id(row)]) for values, row in zip(logps, rows, strict=True)]
        count = torch.tensor(float(sum(map(len, logps))), device=sums[0].device)
        return -torch.stack(sums).sum() / step.tokens, {"tokens": count}


def _scored(chain: Chain) -> Scored:
    return Scored(chain.chains[0], len(chain.prompt))
