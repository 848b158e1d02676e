"""Supervised fine-tuning on chains (paper, SFT stage): cross-entropy over completions, on prefix-tree packs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cotree.models.encode import EncodedChain
from cotree.train.forest import Scored, forest_logps
from cotree.train.losses import sft_loss
from cotree.train.rows import sft_weights
from cotree.train.trainer import StepTrainer


class ChainTrainer(StepTrainer[EncodedChain]):
    """The mean of -log pi over all completion tokens of a step, end of turn included. Metrics: `tokens` (scored)."""

    def step_weights(self, rows: Sequence[EncodedChain]) -> list[Tensor]:
        """The weight of each completion token by `sft_scope`."""
        return sft_weights(rows, self.settings.sft_scope)

    def pack_loss(
        self, model: nn.Module, rows: Sequence[EncodedChain], weights: Sequence[Tensor], step_rows: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A pack's share of the step's mean loss, and its number of scored tokens."""
        logps = forest_logps(model, [Scored(chain.sequences[0], len(chain.prompt)) for chain in rows])
        loss = sft_loss(logps, weights)
        return loss, {"tokens": loss.new_tensor(sum(map(len, logps)))}
