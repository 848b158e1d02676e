"""Trainer callback for each step: logs to `log.jsonl`, warns, stops early, picks the best checkpoint, plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from cotree.base.atomic import explain_write_errors, write_text
from cotree.base.numbers import sparkline
from cotree.base.progress import Output, Update
from cotree.train.settings import Probe

WINDOW = 10
_NOT_PLOTTED = ("grad_norm", "learning_rate", "seconds", "tokens", "rejected_reward", "dpo_loss", "sft_loss")


@dataclass(frozen=True)
class StepLog:
    """One optimizer step: its loss, its metrics (means over the rows of the step), and a warning."""

    step: int
    total_steps: int
    loss: float
    metrics: dict[str, float]
    warning: str | None = None


@dataclass
class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Logs every step, warns, calls `on_step`; stops early and keeps the best checkpoint by the probe's settings.

    Attributes:
        log: path of the JSON lines file.
        started: start time of this process, by time.monotonic.
        on_step: called with each step.
        probe: its settings, or None.
        seconds_before: training time of earlier processes, up to the checkpoint that this one resumes from.
    """

    log: Path
    started: float
    on_step: Callable[[StepLog], None] | None
    probe: Probe | None
    seconds_before: float = 0.0

    def seconds(self) -> float:
        """Wall time of this run, including earlier processes up to their last checkpoint."""
        return self.seconds_before + monotonic() - self.started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Truncate the log to the checkpoint, because later steps run again."""
        if state.is_world_process_zero:
            write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in state.log_history))
        self.seconds_before = state.log_history[-1]["seconds"] if state.log_history else 0.0
        state.save_steps = args.save_steps  # the checkpoint may have other settings
        if state.best_global_step is not None:  # the folder may have moved
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save no checkpoint at the last step, because the final model is saved right after it."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Append the step to the log, with its warning if any."""
        entry = state.log_history[-1]
        if "loss" not in entry:
            state.log_history.pop()  # Trainer's own summary at the end
            return
        if self.probe is not None and "probe_no_answer" in entry:
            self._use_probe(self.probe, state, control)
        if not any("warning" in line for line in state.log_history) and (falls := chosen_falls(state.log_history)):
            entry["warning"] = falls
        entry["seconds"] = self.seconds()
        entry.pop("epoch", None)  # Trainer sees all epochs as one
        if not state.is_world_process_zero:
            return
        with explain_write_errors(self.log), self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.on_step is not None:
            metrics = {name: value for name, value in entry.items() if name not in ("step", "loss", "warning")}
            self.on_step(StepLog(state.global_step, state.max_steps, entry["loss"], metrics, entry.get("warning")))

    def _use_probe(self, probe: Probe, state: TrainerState, control: TrainerControl) -> None:
        """Stop training if the no-answer ratio rises, and save this step's checkpoint if it is the best so far."""
        history = state.log_history
        if probe.stop_rise is not None and (rises := no_answer_rises(history, probe.stop_rise)):
            history[-1]["warning"] = rises
            control.should_training_stop = True
            # No checkpoint here: a resume from it would not stop.
            control.should_save = False
        if probe.keep == "best" and best_step(history) == state.global_step:
            state.best_global_step, state.best_model_checkpoint = state.global_step, None
            # Trainer loads the best checkpoint at the end; the last step needs none.
            control.should_save = state.global_step < state.max_steps


def chosen_falls(history: Sequence[dict[str, Any]]) -> str | None:
    """A warning if chosen chains became less likely than under the reference over the last steps, else None.

    Args:
        history: the logged metrics of all steps so far.
    """
    rewards = [entry["chosen_reward"] for entry in history[-WINDOW:] if "chosen_reward" in entry]
    if len(rewards) < WINDOW or fmean(rewards) >= 0:
        return None
    return (
        f"chosen_falls: over the last {WINDOW} steps chosen chains are less likely than under the SFT checkpoint "
        f"(reward {fmean(rewards):.3f}): raise alpha, or lower learning_rate"
    )


def no_answer_rises(history: Sequence[dict[str, Any]], stop_rise: float) -> str | None:
    """A warning if the last probe's no-answer ratio is more than `stop_rise` above the first one's, else None."""
    ratios = [entry["probe_no_answer"] for entry in history if "probe_no_answer" in entry]
    rise = ratios[-1] - ratios[0]
    return f"no_answer_rises: by {rise:.2f} since the first probe; training stops here" if rise > stop_rise else None


def best_step(history: Sequence[dict[str, Any]]) -> int:
    """The probed step with the lowest (no-answer, loop) ratios; the latest of equal ones."""
    probed = [entry for entry in history if "probe_no_answer" in entry]
    best = min(probed, key=lambda entry: (entry["probe_no_answer"], entry["probe_loop"], -entry["step"]))
    return int(best["step"])


def plot_steps(name: str, update: Update, output: Output) -> Callable[[StepLog], None]:
    """Make an `on_step` callback that shows each metric's last value and sparkline through `update`.

    Args:
        name: of the student, for warnings.
        update: as `output.progress` yields it.
        output: prints the warnings.
    """
    seen: dict[str, list[float]] = {}

    def show(log: StepLog) -> None:
        for metric, value in ({"loss": log.loss} | log.metrics).items():
            if metric not in _NOT_PLOTTED:
                seen.setdefault(metric, []).append(value)
        lines = [f"{metric:<15} {values[-1]:>8.3g}  {sparkline(values)}" for metric, values in seen.items()]
        update(log.step, log.total_steps, "\n".join(lines))
        if log.warning is not None:
            output.print(f"  warning at {name} step {log.step}: {log.warning}")

    return show
