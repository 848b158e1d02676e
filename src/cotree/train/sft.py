"""Supervised fine-tuning on chains (paper, SFT stage): cross-entropy over completions, packed by tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cotree.models.encode import EncodedChain
from cotree.train.forest import Scored, forest_logps
from cotree.train.losses import weighted
from cotree.train.steps import Step
from cotree.train.trainer import StepTrainer


class ChainTrainer(StepTrainer[EncodedChain]):
    """The mean of -log pi over all completion tokens of a step, end of turn included. Metrics: `tokens` (scored)."""

    def pack_loss(self, model: nn.Module, rows: Sequence[EncodedChain], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """What the chains of a pack add to the step's mean, and how many tokens they score."""
        logps = forest_logps(model, [Scored(chain.sequences[0], len(chain.prompt)) for chain in rows])
        sums = [weighted(values, step.weights[id(row)]) for values, row in zip(logps, rows, strict=True)]
        count = torch.tensor(float(sum(map(len, logps))), device=sums[0].device)
        return -torch.stack(sums).sum() / step.tokens, {"tokens": count}
