"""Training on the terminal: a small plot of the loss and of each metric, and warnings as they come."""

from __future__ import annotations

from collections.abc import Callable

from cotree.base.numbers import sparkline
from cotree.base.progress import Output, Update
from cotree.train.result import StepLog

_SHOWN = (
    "loss",
    "margin",
    "accuracy",
    "chosen_logps",
    "rejected_logps",
    "chosen_reward",
    "probe_tokens",
    "probe_loop",
    "probe_no_answer",
)


def plot_steps(name: str, update: Update, output: Output) -> Callable[[StepLog], None]:
    """An `on_step` that shows each metric's last value and course, a line each, in the counter `update` of `output`.

    Args:
        name: of the student, for warnings.
        update: as `output.progress` yields it.
        output: prints the warnings.
    """
    seen: dict[str, list[float]] = {}

    def show(log: StepLog) -> None:
        for metric, value in (log.metrics | {"loss": log.loss}).items():
            seen.setdefault(metric, []).append(value)
        lines = [
            f"{metric:<15} {seen[metric][-1]:>8.3g}  {sparkline(seen[metric])}" for metric in _SHOWN if metric in seen
        ]
        update(log.step, log.total_steps, "\n".join(lines))
        for warning in log.warnings:
            output.print(f"  warning at {name} step {log.step}: {warning}")

    return show
