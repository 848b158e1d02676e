"""transformers.Trainer on whole optimizer steps.

Invariant: an item of its data is a whole step, whose rows are fixed before anything is split; the loss divides by the
rows and tokens of the step, so neither the cap of a pack nor the number of processes changes the gradient.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from cotree.base.atomic import explain_write_errors
from cotree.base.errors import CotreeError
from cotree.models.encode import EncodedRow
from cotree.train.checkpoints import complete_checkpoint
from cotree.train.forest import forest_tokens, packs
from cotree.train.memory import explain_out_of_memory, pack_out_of_memory
from cotree.train.recompute import recompute_activations
from cotree.train.steps import Step, whole_step


class StepTrainer(Trainer, Generic[EncodedRow]):  # type: ignore[misc]
    """A Trainer whose batches are whole optimizer steps. A subclass for each method computes the loss.

    Attributes:
        steps: the rows of each optimizer step.
        settings: of the method.
        metrics: of the last step, means over its rows.
        probe: gives the metrics of a probe; called at the steps of `settings.probe`.
    """

    def __init__(
        self, model: PreTrainedModel, steps: list[list[EncodedRow]], arguments: TrainingArguments, settings: Any
    ) -> None:
        self.steps = steps
        self.settings = settings
        self.metrics: dict[str, float] = {}
        self.probe: Callable[[], dict[str, float]] = dict
        if not (settings.compile or settings.gradient_checkpointing):
            recompute_activations(model)
        super().__init__(model=model, args=arguments)
        self.remove_callback(PrinterCallback)

    @classmethod
    def prepare_rows(
        cls,
        model: PreTrainedModel,
        rows: list[EncodedRow],
        arguments: TrainingArguments,
        settings: Any,
        *,
        student: Path,
        references: Path,
    ) -> list[EncodedRow]:
        """The rows with what the method needs to know of the model before its first step; here nothing.

        Args:
            model: as `student` has it.
            rows: of one epoch.
            arguments: as the trainer gets them.
            settings: of the method.
            student: the folder that training starts from.
            references: a folder for what takes long to compute, which other runs from this student may share.
        """
        return rows

    @abstractmethod
    def pack_loss(self, model: nn.Module, rows: Sequence[EncodedRow], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the step's loss (to differentiate) and of its metrics that the rows of a pack add: scalars."""

    def packs(self, rows: Sequence[EncodedRow]) -> list[list[EncodedRow]]:
        """The packs of a step, at least one for each process if there are enough rows."""
        dealt, processes = packs(rows, self.settings.pack_tokens), self.args.world_size
        return dealt if len(dealt) >= processes else packs(rows, math.ceil(forest_tokens(rows) / processes))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of one optimizer step; returns its loss."""
        model.train()
        number = self.state.global_step + 1
        step = whole_step(inputs, self.settings.scope)
        processes, rank = self.args.world_size, self.args.process_index
        dealt = self.packs(inputs)
        total = torch.zeros(())
        metrics: dict[str, Tensor] = {}
        # Every process must call the model equally often (FSDP): those without a pack repeat one that counts nothing.
        turns = range(rank, math.ceil(len(dealt) / processes) * processes, processes)
        for turn in turns:
            counts = float(turn < len(dealt))
            pack = dealt[turn % len(dealt)]
            # DDP needs one synchronisation a step, not one a pack; it divides the sum of gradients by the processes.
            with (
                nullcontext() if turn == turns[-1] else self.accelerator.no_sync(model),
                explain_out_of_memory(
                    partial(pack_out_of_memory, pack, f"at step {number}", self.settings.pack_tokens)
                ),
            ):
                with self.compute_loss_context_manager():
                    loss, parts = self.pack_loss(model, pack, step)
                self.accelerator.backward(loss * (counts * processes))
            total = total.to(loss) + counts * loss.detach()
            metrics = {name: metrics.get(name, 0) + counts * value.detach() for name, value in parts.items()}
        sums = sum_over_processes(torch.stack([total, *(metrics[name].to(total) for name in metrics)]))
        if not math.isfinite(sums[0]):
            raise CotreeError(
                f"the loss became {sums[0].item()} at step {number}: lower learning_rate, or look for broken rows"
            )
        self.metrics = dict(zip(metrics, sums[1:].tolist(), strict=True))
        return sums[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's metrics, and a probe where one is due or training ends, to what Trainer logs and reports."""
        step, settings = self.state.global_step, self.settings.probe
        if "loss" in logs:
            logs |= self.metrics
            if settings is not None and ((step - 1) % settings.every == 0 or step == self.state.max_steps):
                found = self.probe()
                # One set of numbers decides for all processes, which may round their texts apart.
                device = self.args.device if self.args.world_size > 1 else None
                values = sum_over_processes(torch.tensor([*found.values()], dtype=torch.float64, device=device))
                logs |= dict(zip(found, (values / self.args.world_size).tolist(), strict=True))
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[list[EncodedRow]]:
        """The steps in order; accelerate must not deal them out to processes."""
        return DataLoader(self.steps, batch_size=1, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the base class would look for `input_ids`."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with explain_write_errors(checkpoint):
            try:
                super()._save_checkpoint(model, trial)
            except RuntimeError as error:  # what torch.save raises on a full disk
                raise OSError(str(error)) from error
            self.accelerator.wait_for_everyone()
            if self.args.process_index == 0:
                complete_checkpoint(checkpoint, self.state.best_global_step)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
