"""One training run on transformers.Trainer: exact steps, checkpoints that survive a kill, nothing on the terminal.

Invariants. A dataset item is a whole optimizer step: its rows are fixed by the seed before anything is split, and the
loss denominators are those of the step, so the micro-batch size changes memory and time, never the gradient. Going on
after a kill gives the weights of the uninterrupted run, bit for bit (CPU, fp32). `model/` appears last and whole.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from cotree.config import Optimizer
from cotree.errors import CotreeError, UsageError
from cotree.train.durable import whole_file, whole_folder, writing
from cotree.train.encode import Encoded
from cotree.train.families import family_of
from cotree.train.layout import ATTENTION, segment_attention
from cotree.train.resume import last_checkpoint, seal_checkpoint
from cotree.train.student import quiet


class Item(Protocol):
    """What a step is made of: something that knows how many tokens computing it takes."""

    @property
    def tokens(self) -> int:
        """Prompts included."""


Row = TypeVar("Row", bound=Item)


@dataclass(frozen=True)
class StepLog:
    """What one optimizer step was like: the loss, and the gauges of its trainer (means over the step's rows)."""

    step: int
    total_steps: int
    loss: float
    gauges: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """What a training run was like.

    Attributes:
        steps: optimizer steps.
        rows: rows trained on (of one epoch); too_long: rows left out because they are over the token limit.
        tokens: tokens computed in training, prompts included, over all epochs.
        seconds: wall time, over all resumes.
        first, final: the metrics of the first and the last step.
    """

    steps: int
    rows: int
    too_long: int
    tokens: int
    seconds: float
    first: dict[str, float]
    final: dict[str, float]


def fixed_steps(rows: int, batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step of a run: a new order each epoch, the last batch of an epoch may be short.

    A fractional number of epochs rounds up to whole steps.
    """
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(math.ceil(epochs)):
        order = torch.randperm(rows, generator=generator).tolist()
        steps += [order[at : at + batch_size] for at in range(0, rows, batch_size)]
    return steps[: math.ceil(epochs * math.ceil(rows / batch_size))]


def split_step(rows: Sequence[Row], micro_batch_size: int) -> list[list[Row]]:
    """The micro-batches of a step: as few as the size allows, dealt by length so that they are about equally large."""
    parts = math.ceil(len(rows) / micro_batch_size)
    by_length = sorted(rows, key=lambda row: row.tokens, reverse=True)
    return [by_length[part::parts] for part in range(parts)]


class StepTrainer(Trainer, Generic[Row]):  # type: ignore[misc]
    """A Trainer whose batches are whole optimizer steps. Subclasses say what a step's denominators and loss are."""

    def __init__(
        self, model: PreTrainedModel, steps: list[list[Row]], arguments: TrainingArguments, micro_batch_size: int
    ) -> None:
        self.steps = steps
        self.micro_batch_size = micro_batch_size
        self.gauges: dict[str, float] = {}
        super().__init__(model=model, args=arguments)
        self.remove_callback(PrinterCallback)

    @abstractmethod
    def denominators(self, rows: Sequence[Row]) -> dict[str, int]:
        """What the sums of a whole step are divided by."""

    @abstractmethod
    def share(self, model: nn.Module, rows: Sequence[Row], step: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the step's loss (to differentiate) and of its gauges (scalars); shares add up."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of one optimizer step; returns its loss."""
        model.train()
        step = self.denominators(inputs)
        parts = split_step(inputs, self.micro_batch_size)
        total = torch.zeros((), device=self.args.device)
        gauges: dict[str, Tensor] = {}
        for number, part in enumerate(parts, 1):
            # DDP needs one synchronisation a step, not one a micro-batch.
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss, share = self.share(model, part, step)
                self.accelerator.backward(loss)
            total += loss.detach()
            gauges = {name: gauges.get(name, 0) + value.detach() for name, value in share.items()}
        if not math.isfinite(total):
            raise CotreeError(
                f"the loss became {total.item()} at step {self.state.global_step + 1}: lower learning_rate, "
                "or look for broken rows"
            )
        self.gauges = {name: float(value) for name, value in gauges.items()}
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's gauges to what Trainer logs."""
        if "loss" in logs:
            logs |= self.gauges
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        """The steps in order; accelerate must not deal them out to processes."""
        return DataLoader(self.steps, batch_size=1, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the base class would look for `input_ids`."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing(checkpoint):
            try:
                super()._save_checkpoint(model, trial)
            except RuntimeError as error:  # torch.save's word for a full disk
                raise OSError(str(error)) from error
            seal_checkpoint(checkpoint)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Writes `log.jsonl` and calls `on_step`, once a step; skips the checkpoint that the final model makes useless."""

    def __init__(self, log: Path, began: float, on_step: Callable[[StepLog], None] | None) -> None:
        self.log = log
        self.began = began
        self.on_step = on_step
        self.before = 0.0

    def seconds(self) -> float:
        """Wall time of this run, earlier attempts up to their last checkpoint included."""
        return self.before + monotonic() - self.began

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A killed run may have logged steps after its last checkpoint: they are about to be done again.
        with whole_file(self.log) as draft:
            draft.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))
        self.before = state.log_history[-1]["seconds"] if state.log_history else 0.0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:
            state.log_history.pop()  # Trainer's own summary at the end
            return
        entry["seconds"] = self.seconds()
        entry.pop("epoch", None)  # all epochs are one to Trainer, so its number says nothing
        with writing(self.log), self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.on_step is not None:
            gauges = {name: value for name, value in entry.items() if name not in ("step", "loss")}
            self.on_step(StepLog(state.global_step, state.max_steps, entry["loss"], gauges))


def load_model(student: Path) -> PreTrainedModel:
    """A student folder as a model in fp32 with the attention of `layout`, checked to be trainable.

    Raises:
        UsageError: it is not (see `families.family_of`), or the folder holds no model.
    """
    AttentionInterface.register(ATTENTION, segment_attention)
    with quiet():
        try:
            family_of(AutoConfig.from_pretrained(student))
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                student, dtype=torch.float32, attn_implementation=ATTENTION
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load the student {student}: {str(error).splitlines()[0]}") from error
    return model


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        UsageError: it is missing, unreadable or empty.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"cannot read the rows in {path}: {str(error).splitlines()[0]}") from error
    if not rows:
        raise UsageError(f"{path} has no rows: the build stage selected none; search more questions or rollouts")
    return rows


def finished(out: Path) -> TrainResult | None:
    """The stored result if the run in `out` is done."""
    if not (out / "model").exists():
        return None
    shutil.rmtree(out / "trainer", ignore_errors=True)  # a kill may have come between the two
    return TrainResult(**json.loads((out / "result.json").read_text()))


def training_arguments(out: Path, settings: Optimizer, steps: int, seed: int) -> TrainingArguments:
    """Trainer's arguments: bf16 autocast on CUDA, fp32 on CPU; a linear schedule with warm-up; silent."""
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        seed=seed,
        use_cpu=not cuda,
        bf16=cuda,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.world_size > 1:
        raise UsageError("cotree trains in one process: start it without torchrun or accelerate launch")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer wraps the model in DataParallel, which splits rows
    return arguments


def run(
    trainer: StepTrainer[Row],
    tokenizer: Any,
    out: Path,
    encoded: Encoded[Any],
    began: float,
    on_step: Callable[[StepLog], None] | None,
) -> TrainResult:
    """Train from the last whole checkpoint (or the start) to the end, and store model and result.

    Args:
        trainer: with the model and the steps.
        tokenizer: to store with the model.
        out: the run's folder.
        encoded: the rows, to count them.
        began: `time.monotonic()` when the run began.
        on_step: called after each step.

    Raises:
        CotreeError: the loss is no number any more, or something cannot be written; run again to go on.
    """
    progress = _Progress(out / "log.jsonl", began, on_step)
    trainer.add_callback(progress)
    with quiet():
        checkpoint = last_checkpoint(out / "trainer")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        history = trainer.state.log_history
        result = TrainResult(
            steps=len(trainer.steps),
            rows=len(encoded.rows),
            too_long=encoded.too_long,
            tokens=sum(row.tokens for step in trainer.steps for row in step),
            seconds=progress.seconds(),
            first=history[0],
            final=history[-1],
        )
        with whole_folder(out / "model") as draft:
            trainer.model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            with whole_file(out / "result.json") as text:
                text.write_text(json.dumps(asdict(result), indent=2) + "\n")
    shutil.rmtree(out / "trainer", ignore_errors=True)
    return result


def release(trainer: StepTrainer[Row] | None) -> None:
    """Give back the memory of weights, gradients and optimizer, also after an error: Trainer is full of cycles."""
    if trainer is not None:
        trainer.accelerator.free_memory()
        for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "callback_handler"):
            setattr(trainer, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
