"""What training reports: of each optimizer step, and of a whole run. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepLog:
    """One optimizer step: its loss, its metrics (means over the rows of the step), and warnings."""

    step: int
    total_steps: int
    loss: float
    metrics: dict[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    Attributes:
        steps: optimizer steps that were made.
        kept: the step whose student was kept: the last, or the best of the probes.
        rows: rows trained on in an epoch.
        too_long: rows left out because they are over the token limit.
        tokens: tokens in the rows of all steps, prompts included.
        packed: tokens computed for them, as shared ones are computed once.
        seconds: wall time, over all interruptions.
        first, final: the metrics of the first and of the last step.
    """

    steps: int
    kept: int
    rows: int
    too_long: int
    tokens: int
    packed: int
    seconds: float
    first: dict[str, float]
    final: dict[str, float]
