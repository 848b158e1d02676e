"""cDPO with a joint SFT loss (paper, Fine-grained DPO and Joint Post-training Objective), on prefix-tree packs.

L = cDPO(beta, eps) + alpha L_SFT(chosen). The reference is the SFT checkpoint that training starts from. Its
log-probabilities are precomputed once, before step 0, with the model to be trained, so memory holds one model and every
margin d is 0 at step 0. This holds for LoRA too: an adapter of the checkpoint is merged first, and a new one starts
at zero.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cotree.base.atomic import data_sha256, write_text
from cotree.models.encode import EncodedPair
from cotree.train.forest import Scored, forest_logps, packs
from cotree.train.losses import dpo_loss, joint_loss, margin_weights
from cotree.train.rows import sft_weights
from cotree.train.settings import DPO
from cotree.train.student import student_sha256
from cotree.train.trainer import StepTrainer, explain_out_of_memory


class PairTrainer(StepTrainer[EncodedPair]):
    """Trains on preference pairs with the joint objective.

    Metrics: `margin` (beta times the difference of log-ratios, without SimPO's target), `accuracy` (share with
    margin > 0), `chosen_logps` and `rejected_logps` (sums over the tokens in the margin), `chosen_reward` and
    `rejected_reward` (beta times the log-ratio; only with a reference), `dpo_loss`, `sft_loss` (if alpha is not 0).
    """

    def step_weights(self, rows: Sequence[EncodedPair]) -> list[Tensor]:
        """The weight of each chosen token in the SFT term."""
        return sft_weights(rows, self.settings.scope, self.settings.sft_norm)

    def pack_loss(
        self, model: nn.Module, rows: Sequence[EncodedPair], weights: Sequence[Tensor], step_rows: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A pack's share of the step's L = L_DPO + alpha L_SFT(chosen), and of the metrics."""
        settings: DPO = self.settings
        chosen, policy = pair_logps(model, rows, settings, sft=settings.alpha > 0)
        weights = [each[len(each) - len(logps) :] for each, logps in zip(weights, chosen, strict=True)]
        reference = policy.new_tensor([row.reference for row in rows])
        losses, margin = dpo_loss(policy, reference, settings)
        loss, dpo, sft = joint_loss(losses, chosen, weights, alpha=settings.alpha, pairs=step_rows)
        means = {"margin": margin, "accuracy": (margin > 0).to(margin)}
        means |= {"chosen_logps": policy[:, 0], "rejected_logps": policy[:, 1]}
        if settings.has_reference:
            rewards = settings.beta * (policy - reference)
            means |= {"chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1]}
        metrics = {name: values.sum() / step_rows for name, values in means.items()}
        return loss, metrics | {"dpo_loss": dpo} | ({"sft_loss": sft} if settings.alpha else {})


def pair_logps(
    model: nn.Module, pairs: Sequence[EncodedPair], settings: DPO, *, sft: bool
) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities of pairs from one forward pass; a shared prefix with weight 0 everywhere is not scored.

    Args:
        model: see `forest_logps`.
        pairs: of one pack.
        settings: give the margin weights and the scope of the SFT term.
        sft: whether an SFT term needs the chosen log-probabilities.

    Returns:
        Per pair those of the chosen tokens, without the prefix if it is not scored; and (pairs, 2) weighted sums for
        the margin, of chosen and rejected.
    """
    whole_chosen = sft and settings.scope != "suffix"
    scored: list[Scored] = []
    weights: list[Tensor] = []
    for pair in pairs:
        masked = pair.prefix if settings.mask_prefix else 0
        sides = ((pair.chosen, pair.rejected, 0 if whole_chosen else masked), (pair.rejected, pair.chosen, masked))
        for side, other, start in sides:
            start = min(start, len(side) - 1)  # chosen may be a prefix of rejected
            scored.append(Scored(pair.prompt + side, len(pair.prompt) + start))
            weights.append(margin_weights(len(side), len(other), pair.prefix, settings)[start:])
    logps = forest_logps(model, scored)
    sums = [(values * weight.to(values)).sum() for values, weight in zip(logps, weights, strict=True)]
    return logps[::2], torch.stack(sums).view(-1, 2)


def stored_reference(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    arguments: TrainingArguments,
    settings: DPO,
    *,
    student: Path,
    folder: Path,
) -> list[EncodedPair]:
    """Add the student's reference log-probabilities to pairs, cached in a file named by a hash of the inputs.

    Args:
        model: `student`, loaded and not yet trained.
        pairs: of one epoch.
        arguments: of the trainer.
        settings: of the method.
        student: the folder of the initial weights.
        folder: for the cache file; runs from the same student may share it.
    """
    margin = settings.model_dump(include={"loss", "mask_prefix", "ld_alpha"})
    chains = [(len(pair.prompt), *pair.sequences) for pair in pairs]
    inputs = [student_sha256(student), chains, margin, arguments.bf16]
    path = folder / f"{data_sha256(inputs)[:16]}.json"
    with arguments.main_process_first(local=False):
        stored = _read_reference(path)
    if stored is not None:
        return [replace(pair, reference=logps) for pair, logps in zip(pairs, stored, strict=True)]
    model.to(arguments.device)
    referenced = with_reference(model, pairs, arguments, settings)
    if arguments.process_index == 0:
        logps = [[*pair.reference] for pair in referenced]
        write_text(path, json.dumps({"sha256": data_sha256(logps), "logps": logps}))
    return referenced


def _read_reference(path: Path) -> list[tuple[float, float]] | None:
    """Read a cache file of `stored_reference`; None if it is missing or damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["sha256"] == data_sha256(stored["logps"]):
            return [(chosen, rejected) for chosen, rejected in stored["logps"]]
    return None


def with_reference(
    model: nn.Module, pairs: Sequence[EncodedPair], arguments: TrainingArguments, settings: DPO
) -> list[EncodedPair]:
    """Compute reference log-probabilities of pairs with `model` as the reference.

    In packs, distributed over all processes.
    """
    number = {id(pair): index for index, pair in enumerate(pairs)}
    sums = torch.zeros(len(pairs), 2, device=arguments.device)
    model.eval()
    with torch.no_grad(), torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
        for pack in packs(pairs, settings.pack_tokens)[arguments.process_index :: arguments.world_size]:
            with explain_out_of_memory("in the reference", pack, settings):
                sums[[number[id(pair)] for pair in pack]] = pair_logps(model, pack, settings, sft=False)[1].to(sums)
    total = reduce(sums, "sum").tolist()
    return [replace(pair, reference=tuple(logps)) for pair, logps in zip(pairs, total, strict=True)]
