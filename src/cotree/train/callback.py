"""What happens after each step of a run: a line of `log.jsonl`, warnings, a stop, and which checkpoint is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from cotree.base.atomic import atomic_draft, explain_write_errors
from cotree.train.metrics import best_step, chosen_falls, no_answer_rises
from cotree.train.result import StepLog
from cotree.train.settings import Probe


@dataclass
class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Logs every step, warns, calls `on_step`; stops and keeps the best student as the probe's settings say.

    Attributes:
        log: the file, a line of JSON a step.
        started: when this process began, by time.monotonic.
        on_step: called with each step.
        probe: the settings, None without probes.
        seconds_before: of work before this process went on, up to the checkpoint it goes on from.
    """

    log: Path
    started: float
    on_step: Callable[[StepLog], None] | None
    probe: Probe | None
    seconds_before: float = 0.0

    def seconds(self) -> float:
        """Wall time of this run, earlier attempts up to their last checkpoint included."""
        return self.seconds_before + monotonic() - self.started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cut the log back to the checkpoint: what a killed run did after it is about to be done again."""
        if state.is_world_process_zero:
            with atomic_draft(self.log) as draft:
                draft.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))
        self.seconds_before = state.log_history[-1]["seconds"] if state.log_history else 0.0
        state.save_steps = args.save_steps  # not those of when the checkpoint was written
        if state.best_global_step is not None:  # the folder may have been moved since
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save no checkpoint at the last step: the final model replaces it at once."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the step's line, with a warning where there is one."""
        entry = state.log_history[-1]
        if "loss" not in entry:
            state.log_history.pop()  # Trainer's own summary at the end
            return
        if self.probe is not None and "probe_no_answer" in entry:
            self._decide(self.probe, state, control)
        if not any("warning" in line for line in state.log_history) and (falls := chosen_falls(state.log_history)):
            entry["warning"] = falls
        entry["seconds"] = self.seconds()
        entry.pop("epoch", None)  # all epochs are one to Trainer, so its number says nothing
        if not state.is_world_process_zero:
            return
        with explain_write_errors(self.log), self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.on_step is not None:
            metrics = {name: value for name, value in entry.items() if name not in ("step", "loss", "warning")}
            warnings = (entry["warning"],) if "warning" in entry else ()
            self.on_step(StepLog(state.global_step, state.max_steps, entry["loss"], metrics, warnings))

    def _decide(self, probe: Probe, state: TrainerState, control: TrainerControl) -> None:
        """Stop if answers go missing, and make this step's checkpoint the best one if it is."""
        history = state.log_history
        if probe.stop_rise is not None and (rises := no_answer_rises(history, probe.stop_rise)):
            history[-1]["warning"] = rises
            control.should_training_stop = True
            # A resume that began at this step would not know that it should stop.
            control.should_save = False
        if probe.keep == "best" and best_step(history) == state.global_step:
            state.best_global_step, state.best_model_checkpoint = state.global_step, None
            # Trainer loads the best checkpoint at the end; the last step needs none.
            control.should_save = state.global_step < state.max_steps
