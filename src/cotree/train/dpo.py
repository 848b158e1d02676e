"""DPO made safe for long chains (paper, Fine-grained DPO and Joint Post-training Objective).

L = cDPO(beta, eps) + alpha L_SFT(chosen). The reference is the SFT checkpoint that training starts from: its
log-probabilities are computed once, before step 0, with the very model that is about to be trained, so there is never a
second model in memory and every margin d is 0 at step 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cotree.config import TrainDPO
from cotree.errors import UsageError
from cotree.llm.tokenizer import load_tokenizer
from cotree.train.durable import whole_file
from cotree.train.encode import Pair, encode_dpo
from cotree.train.layout import Scored, sequence_logps
from cotree.train.losses import dpo_loss, joint_loss
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


def train_dpo(
    rows: Path,
    student: Path,
    out: Path,
    settings: TrainDPO,
    seed: int,
    max_tokens: int,
    on_step: Callable[[StepLog], None] | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train an SFT checkpoint on pairs; resumes and returns as `sft.train_sft` does.

    Args:
        rows: Parquet with `prompt`, `chosen` and `rejected` (messages).
        student: the SFT checkpoint, a transformers folder; it is the reference.
        out: folder of this run: `model/`, `result.json`, `log.jsonl`.
        settings: the recipe's `train.dpo`.
        seed: fixes the order of the pairs.
        max_tokens: pairs with a side of more tokens, prompt included, are left out and counted.
        on_step: called after each optimizer step. Gauges, means over the step's pairs: `margin` (beta times the
            difference of log-ratios), `accuracy` (share with margin > 0), `chosen_logps` and `rejected_logps` (sums
            over the tokens in the margin), `dpo_loss`, `sft_loss`; and `learning_rate`, `grad_norm`, `seconds`.
        on_reference: called with (pairs done, pairs) while the reference is computed.

    Raises:
        UsageError: rows, student or settings cannot be trained on, or `out` holds a run on other inputs.
        CotreeError: the loss is no number any more, or the disk is full; nothing before the last checkpoint is lost.
    """
    began = monotonic()
    result = finished(out)
    if result is not None:
        return result
    tokenizer = load_tokenizer(student)
    encoded = encode_dpo(tokenizer, read_rows(rows), max_tokens)
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} pairs are over {max_tokens} tokens: raise build.max_tokens")
    claim(out, rows, student, settings, seed, max_tokens)
    steps = fixed_steps(len(encoded.rows), settings.batch_size, settings.epochs, seed)
    trainer: PairTrainer | None = None
    try:
        model = load_model(student)
        arguments = training_arguments(out, settings, len(steps), seed)
        model.to(arguments.device)
        pairs = _with_reference(model, encoded.rows, settings, out / "trainer" / "reference.safetensors", on_reference)
        trainer = PairTrainer(model, [[pairs[index] for index in step] for step in steps], arguments, settings)
        del model
        return run(trainer, tokenizer, out, encoded, began, on_step)
    finally:
        release(trainer)


@dataclass(frozen=True)
class ReferencedPair:
    """A pair with the reference's log-probabilities: summed over the tokens in the margin, in nats."""

    pair: Pair
    chosen: float
    rejected: float

    @property
    def tokens(self) -> int:
        """Of both sides, prompts included."""
        return self.pair.tokens


class PairTrainer(StepTrainer[ReferencedPair]):
    """The joint objective over the pairs of a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        steps: list[list[ReferencedPair]],
        arguments: TrainingArguments,
        settings: TrainDPO,
    ) -> None:
        self.settings = settings
        super().__init__(model, steps, arguments, settings.micro_batch_size)

    def denominators(self, rows: Sequence[ReferencedPair]) -> dict[str, int]:
        """Pairs of the step, and tokens in its SFT term."""
        tokens = sum(len(row.pair.chosen) - sft_start(row.pair, self.settings) for row in rows)
        return {"pairs": len(rows), "tokens": tokens}

    def share(
        self, model: nn.Module, rows: Sequence[ReferencedPair], step: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of L = L_DPO + alpha L_SFT(chosen) of the step."""
        settings = self.settings
        pairs = [row.pair for row in rows]
        margins = [margin_start(pair, settings) for pair in pairs]
        sfts = [sft_start(pair, settings) for pair in pairs]
        firsts = [min(both) for both in zip(margins, sfts, strict=True)]
        logps = sequence_logps(model, _chosen(pairs, firsts) + _rejected(pairs, margins))
        chosen, rejected = logps[: len(pairs)], logps[len(pairs) :]
        in_margin = [values[start - first :] for values, start, first in zip(chosen, margins, firsts, strict=True)]
        in_sft = [values[start - first :] for values, start, first in zip(chosen, sfts, firsts, strict=True)]
        policy_chosen = torch.stack([values.sum() for values in in_margin])
        policy_rejected = torch.stack([values.sum() for values in rejected])
        losses, d = dpo_loss(
            policy_chosen,
            policy_rejected,
            policy_chosen.new_tensor([row.chosen for row in rows]),
            policy_chosen.new_tensor([row.rejected for row in rows]),
            settings.beta,
            settings.label_smoothing,
        )
        loss, dpo, sft = joint_loss(
            losses,
            torch.cat(in_sft),
            [len(values) for values in in_sft],
            alpha=settings.alpha,
            sft_norm=settings.sft_norm,
            pairs=step["pairs"],
            tokens=step["tokens"],
        )
        means = {"margin": d, "accuracy": (d > 0).float()}
        means |= {"chosen_logps": policy_chosen, "rejected_logps": policy_rejected}
        gauges = {name: values.sum() / step["pairs"] for name, values in means.items()}
        return loss, gauges | {"dpo_loss": dpo, "sft_loss": sft}


def margin_start(pair: Pair, settings: TrainDPO) -> int:
    """The first completion token in the margin (paper, Masking-based DPO: those of the shared prefix are left out)."""
    return pair.prefix if settings.mask_prefix else 0


def sft_start(pair: Pair, settings: TrainDPO) -> int:
    """The first token of chosen in the SFT term: that after the shared prefix, or the first."""
    return pair.prefix if settings.scope == "suffix" else 0


def reference_logps(
    model: nn.Module,
    pairs: Sequence[Pair],
    settings: TrainDPO,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Log-probabilities of (chosen, rejected) under the model as it is, summed over the margin's tokens: (pairs, 2)."""
    sums = torch.empty(len(pairs), 2)
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for at in range(0, len(pairs), settings.micro_batch_size):
            part = pairs[at : at + settings.micro_batch_size]
            starts = [margin_start(pair, settings) for pair in part]
            logps = sequence_logps(model, _chosen(part, starts) + _rejected(part, starts))
            sums[at : at + len(part)] = torch.stack([values.sum() for values in logps]).reshape(2, -1).T
            if on_progress is not None:
                on_progress(at + len(part), len(pairs))
    return sums


def _with_reference(
    model: nn.Module,
    pairs: Sequence[Pair],
    settings: TrainDPO,
    path: Path,
    on_progress: Callable[[int, int], None] | None,
) -> list[ReferencedPair]:
    """The pairs with their reference, computed with the model before step 0, and kept at `path` for a resume."""
    if not path.exists():
        logps = reference_logps(model, pairs, settings, on_progress)
        with whole_file(path) as draft:
            save_file({"logps": logps}, draft)
    chosen, rejected = load_file(path)["logps"].unbind(1)
    return [ReferencedPair(*row) for row in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)]


def _chosen(pairs: Sequence[Pair], starts: list[int]) -> list[Scored]:
    """Chosen completions after their prompts, each scored from its completion token `start` on."""
    return [Scored(p.prompt + p.chosen, len(p.prompt) + start) for p, start in zip(pairs, starts, strict=True)]


def _rejected(pairs: Sequence[Pair], starts: list[int]) -> list[Scored]:
    return [Scored(p.prompt + p.rejected, len(p.prompt) + start) for p, start in zip(pairs, starts, strict=True)]
