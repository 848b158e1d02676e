"""Settings as transformers' Trainer takes them, and what `auto` becomes on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cotree.base.errors import UsageError
from cotree.train.settings import Optimizer

Settings = TypeVar("Settings", bound=Optimizer)


def resolve(settings: Settings) -> Settings:
    """The settings with `precision: auto` replaced by what it becomes on this machine: bf16 on CUDA, else fp32."""
    if settings.precision != "auto":
        return settings
    return settings.model_copy(update={"precision": "bf16" if torch.cuda.is_available() else "fp32"})


def training_arguments(out: Path, settings: Optimizer, steps: int, seed: int) -> TrainingArguments:
    """Trainer's arguments for so many steps: a linear schedule with warm-up, checkpoints in `out`/trainer, silent.

    Raises:
        UsageError: a reporter is not installed, or a step has fewer rows than there are processes.
    """
    missing = sorted(set(settings.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise UsageError(f"report_to: {', '.join(missing)} is not installed, or no reporter of transformers")
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=resolve(settings).precision == "bf16",
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        # The first step of a warm-up has a learning rate of 0, so a run of one step has no warm-up.
        warmup_steps=min(math.ceil(settings.warmup_ratio * steps), steps - 1),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        save_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.world_size > 1 and settings.batch_size < arguments.world_size:
        raise UsageError(f"batch_size {settings.batch_size} is less than the {arguments.world_size} processes")
    if settings.gradient_checkpointing:  # a flag of Trainer's that transformers is renaming
        arguments.activation_checkpointing = arguments.gradient_checkpointing = True
    if settings.probe is not None and settings.probe.keep == "best":  # to Trainer that would need an evaluation
        arguments.load_best_model_at_end, arguments.metric_for_best_model = True, "probe_no_answer"
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer wraps the model in DataParallel, which splits rows
    return arguments
