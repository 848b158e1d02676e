"""The training methods by name: a new one is one file with a trainer, its settings, and one line here.

Loads no torch: a recipe is checked by this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cotree.train.settings import DPO, SFT, Optimizer


@dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        settings: what can be set.
        rows: the kind of rows that it trains on (`data.kinds`).
        trainer: `module:class` of the StepTrainer that computes the loss of a step.
    """

    settings: type[Optimizer]
    rows: Literal["sft", "dpo"]
    trainer: str


METHODS: Mapping[str, Method] = {
    "sft": Method(SFT, rows="sft", trainer="cotree.train.sft:ChainTrainer"),
    "dpo": Method(DPO, rows="dpo", trainer="cotree.train.dpo:PairTrainer"),
}


def method_of(settings: Optimizer) -> Method:
    """The method that these settings are of."""
    return next(method for method in METHODS.values() if isinstance(settings, method.settings))
