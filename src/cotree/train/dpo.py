"""DPO made safe for long chains (paper, Fine-grained DPO and Joint Post-training Objective), packed by tree.

L = cDPO(beta, eps) + alpha L_SFT(chosen). The reference is the SFT checkpoint that training starts from: its
log-probabilities are computed once, before step 0, with the very model that is about to be trained, so there is never a
second model in memory and every margin d is 0 at step 0. That holds for adapters too: one of the checkpoint is merged
before a new one is added, and a new one changes nothing yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cotree.base.atomic import write_text
from cotree.models.encode import EncodedPair
from cotree.train.forest import Scored, forest_logps, packs
from cotree.train.losses import dpo_loss, joint_loss, margin_weights, weighted
from cotree.train.memory import explain_out_of_memory, pack_out_of_memory
from cotree.train.settings import DPO
from cotree.train.steps import Step
from cotree.train.student import student_sha256
from cotree.train.trainer import StepTrainer, sum_over_processes


class PairTrainer(StepTrainer[EncodedPair]):
    """The joint objective over the pairs of a step.

    Metrics: `margin` (beta times the difference of log-ratios, without SimPO's target), `accuracy` (share with a
    margin > 0), `chosen_logps` and `rejected_logps` (sums over the tokens in the margin), `chosen_reward` and
    `rejected_reward` (beta times the log-ratio, where there is a reference), `dpo_loss`, `sft_loss` (alpha not 0).
    """

    @classmethod
    def prepare_rows(
        cls,
        model: PreTrainedModel,
        rows: list[EncodedPair],
        arguments: TrainingArguments,
        settings: DPO,
        *,
        student: Path,
        references: Path,
    ) -> list[EncodedPair]:
        """The pairs with the student as their reference, kept in `references` in a file named by what it depends on."""
        model.to(arguments.device)
        if not settings.has_reference:
            return rows
        margin = settings.model_dump(include={"loss", "mask_prefix", "ld_alpha"})
        chains = [(len(pair.prompt), *pair.sequences) for pair in rows]
        inputs = [student_sha256(student), chains, margin, arguments.bf16]
        name = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        path = references / f"{name}.json"
        with arguments.main_process_first(local=False):
            stored = json.loads(path.read_text()) if path.exists() else None
        if stored is not None:
            return _referenced(rows, stored)
        rows = with_reference(model, rows, arguments, settings)
        if arguments.process_index == 0:
            write_text(path, json.dumps([pair.reference for pair in rows]))
        return rows

    def pack_loss(self, model: nn.Module, rows: Sequence[EncodedPair], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """What the pairs of a pack add to L = L_DPO + alpha L_SFT(chosen) of the step."""
        settings: DPO = self.settings
        weights = [step.weights[id(row)] for row in rows]
        chosen, policy = pair_logps(model, rows, settings, weights if settings.alpha else ())
        reference = policy.new_tensor([row.reference for row in rows])
        gamma = settings.simpo_gamma if settings.loss == "simpo" else 0.0
        losses, d = dpo_loss(
            policy, reference, beta=settings.beta, label_smoothing=settings.label_smoothing, gamma=gamma
        )
        loss, dpo, sft = joint_loss(
            losses,
            chosen,
            weights,
            alpha=settings.alpha,
            sft_norm=settings.sft_norm,
            pairs=step.rows,
            tokens=step.tokens,
        )
        margin = d + gamma
        means = {"margin": margin, "accuracy": (margin > 0).to(d)}
        means |= dict(zip(("chosen_logps", "rejected_logps"), policy.unbind(1), strict=True))
        if settings.has_reference:
            rewards = settings.beta * (policy - reference)
            means |= dict(zip(("chosen_reward", "rejected_reward"), rewards.unbind(1), strict=True))
        metrics = {name: values.sum() / step.rows for name, values in means.items()}
        return loss, metrics | {"dpo_loss": dpo} | ({"sft_loss": sft} if settings.alpha else {})


def pair_logps(
    model: nn.Module, pairs: Sequence[EncodedPair], settings: DPO, sft: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities of some pairs, from one forward pass; a token that counts nowhere is not scored.

    Args:
        model: see `forest_logps`.
        pairs: of this pack.
        settings: decide the weights in the margin.
        sft: for each pair the weights of chosen's tokens in the SFT term, if there is one; only where they are not 0
            matters here.

    Returns:
        Those of chosen's tokens (0 for one that is not scored), and the sums in the margin: (pairs, 2), of chosen and
        of rejected.
    """
    margins: list[Tensor] = []
    for pair in pairs:
        chosen, rejected = len(pair.chosen), len(pair.rejected)
        margins.append(margin_weights(chosen, rejected, pair.prefix, settings))
        margins.append(margin_weights(rejected, chosen, pair.prefix, settings))
    needed = margins.copy()
    if sft:
        needed[::2] = [margin + weights for margin, weights in zip(margins[::2], sft, strict=True)]
    starts = [min(int((weights == 0).long().cumprod(0).sum()), len(weights) - 1) for weights in needed]
    chains = [(ids, len(pair.prompt)) for pair in pairs for ids in pair.sequences]
    scored = [Scored(ids, prompt + start) for (ids, prompt), start in zip(chains, starts, strict=True)]
    logps = [
        nn.functional.pad(values, (start, 0)) for values, start in zip(forest_logps(model, scored), starts, strict=True)
    ]
    sums = torch.stack([weighted(values, weights) for values, weights in zip(logps, margins, strict=True)])
    return logps[::2], sums.view(-1, 2)


def with_reference(
    model: nn.Module, pairs: Sequence[EncodedPair], arguments: TrainingArguments, settings: DPO
) -> list[EncodedPair]:
    """The pairs with the model as it is as their reference.

    Packed like a step, and dealt out to the processes of a distributed run.
    """
    place = {id(pair): index for index, pair in enumerate(pairs)}
    sums = torch.zeros(len(pairs), 2, device=arguments.device)
    model.eval()
    with torch.no_grad(), torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
        for pack in packs(pairs, settings.pack_tokens)[arguments.process_index :: arguments.world_size]:
            with explain_out_of_memory(partial(pack_out_of_memory, pack, "in the reference", settings.pack_tokens)):
                sums[[place[id(pair)] for pair in pack]] = pair_logps(model, pack, settings)[1].to(sums)
    return _referenced(pairs, sum_over_processes(sums).tolist())


def _referenced(pairs: Sequence[EncodedPair], logps: list[tuple[float, float]]) -> list[EncodedPair]:
    return [replace(pair, reference=(chosen, rejected)) for pair, (chosen, rejected) in zip(pairs, logps, strict=True)]
