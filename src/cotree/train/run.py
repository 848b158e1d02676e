"""Train a student on a rows file, resuming from the last intact checkpoint, and save the model.

Invariant: a resumed run gives bit-identical weights to an uninterrupted one (CPU, fp32); `model/` appears last and
atomically.
"""

from __future__ import annotations

import atexit
import gc
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from cotree.base.atomic import atomic_draft, remove, write_json
from cotree.base.errors import UsageError
from cotree.base.machine import peak_bytes, reset_peak
from cotree.base.progress import Output
from cotree.base.run_folder import read_json
from cotree.models.checksums import check_weights
from cotree.models.tokenizer import load_tokenizer
from cotree.train.callback import RunCallback, StepLog
from cotree.train.dpo import PairTrainer, stored_reference
from cotree.train.forest import forest_tokens
from cotree.train.model import load_model, probe_answers, quiet, save_model
from cotree.train.rows import check_fits, encode_file, fixed_steps
from cotree.train.settings import DPO, Optimizer
from cotree.train.sft import ChainTrainer
from cotree.train.trainer import (
    StepTrainer,
    explain_out_of_memory,
    is_sharded,
    last_checkpoint,
    training_arguments,
)

TRAINERS: Mapping[str, type[StepTrainer[Any]]] = {"sft": ChainTrainer, "dpo": PairTrainer}


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    Attributes:
        steps: optimizer steps taken.
        kept: the step whose weights were saved: the last, or the best probe's.
        rows: rows per epoch.
        too_long: rows left out because they exceed `max_tokens`.
        tokens: tokens in the rows of all steps, prompts included.
        packed: tokens computed for them; shared prefixes are computed once.
        seconds: wall time of training, summed over resumes.
        peak_bytes: peak GPU memory (without a GPU: process memory) of rank 0 since its last start; 0 if unknown.
        first, final: metrics of the first and the last step.
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
    peak_bytes: int = field(default=0, compare=False)


def train(
    method: str,
    rows: Path,
    student: Path,
    out: Path,
    *,
    settings: Optimizer,
    seed: int,
    on_step: Callable[[StepLog], None] | None = None,
    references: Path | None = None,
    output: Output | None = None,
) -> TrainResult:
    """Train a student; the same call resumes after an interruption and returns the stored result of a finished run.

    The caller must ensure that the content of `out` belongs to these rows and settings (`base.run_folder`).

    Args:
        method: a name in `settings.METHODS`.
        rows: a file of the method's rows (`data.kinds`).
        student: the transformers folder of the initial weights (`student.student_folder`).
        out: output folder: `model/` (the trained student), `result.json`, `log.jsonl`; `trainer/` during training.
        settings: of the method.
        seed: fixes the order of the rows.
        on_step: called after each optimizer step.
        references: a folder where runs from one student share reference log-probabilities; by default they are kept
            in `out` until the run is done.
        output: prints warnings about damaged checkpoints.

    Raises:
        UsageError: rows, student or settings cannot be trained on, or the content of `out` is damaged.
        CotreeError: the loss is NaN or infinite, or memory or disk is full; the last checkpoint is kept.
    """
    started = monotonic()
    if (out / "model").exists():
        check_weights(out / "model")
        if (out / "result.json").exists():
            _remove_checkpoints(out / "trainer")  # a killed run may have left them
            return read_result(out)
        remove(out / "model")
    tokenizer = load_tokenizer(student)
    encoded = encode_file(rows, tokenizer, settings)
    order = fixed_steps(encoded.rows, settings, seed)
    trainer: StepTrainer[Any] | None = None
    reset_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        arguments = training_arguments(out, settings, len(order), seed)
        model = load_model(student, settings.lora, seed=seed, compiled=settings.compile)
        check_fits(encoded.rows, model.config)
        prepared = encoded.rows
        if isinstance(settings, DPO) and settings.has_reference:
            folder = references or out / "trainer/reference"
            prepared = stored_reference(model, prepared, arguments, settings, student=student, folder=folder)
        steps = [[prepared[index] for index in step] for step in order]
        trainer = TRAINERS[method](model, steps, arguments, settings)
        del model
        # A process that ends with the group still open can be aborted by a thread of gloo or NCCL.
        atexit.register(trainer.accelerator.state.destroy_process_group)
        if settings.probe is not None:
            prompts = [*dict.fromkeys(tuple(row.prompt) for row in encoded.rows)]
            trainer.probe = partial(probe_answers, tokenizer=tokenizer, prompts=prompts, settings=settings.probe)
        callback = RunCallback(out / "log.jsonl", started, on_step, settings.probe)
        trainer.add_callback(callback)
        with arguments.main_process_first(local=False):  # so that damaged checkpoints are deleted once
            checkpoint = last_checkpoint(out / "trainer", (output or Output()).print)
        if checkpoint and (checkpoint / "optimizer.pt").exists() == is_sharded(settings):
            made, now = ("whole", "in shards") if is_sharded(settings) else ("in shards", "whole (as a single process)")
            fix = f"set `gpus` and `shard` back, or delete {out}/trainer"
            raise UsageError(f"{checkpoint} was written {made} and now the model is {now}; {fix}")
        with quiet():
            with explain_out_of_memory("outside the packs, where the optimizer keeps two numbers a weight: set lora"):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            result = _result(trainer, len(encoded.rows), encoded.too_long, callback.seconds())
            _store(trainer, tokenizer, out, result, student=student)
        return result
    finally:
        _free_memory(trainer)


def read_result(out: Path) -> TrainResult:
    """Read `result.json` of a finished run."""
    return TrainResult(**(read_json(out / "result.json") or {}))


def _result(trainer: StepTrainer[Any], rows: int, too_long: int, seconds: float) -> TrainResult:
    state = trainer.state
    done = trainer.steps[: state.global_step]
    return TrainResult(
        steps=state.global_step,
        kept=state.best_global_step or state.global_step,
        rows=rows,
        too_long=too_long,
        tokens=sum(row.tokens for step in done for row in step),
        packed=sum(forest_tokens(pack) for step in done for pack in trainer.packs(step)),
        seconds=seconds,
        first=state.log_history[0],
        final=state.log_history[-1],
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes(),
    )


def _store(trainer: StepTrainer[Any], tokenizer: Any, out: Path, result: TrainResult, *, student: Path) -> None:
    """Save result and model, then delete the checkpoints."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers FSDP shards
    if trainer.args.process_index == 0:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if is_sharded(trainer.settings):
            model = load_model(student, trainer.settings.lora)
            model.load_state_dict(state_dict)
            state_dict = model.state_dict()  # restores tied weights
        for of_earlier_weights in out.glob("student-*.gguf*"):
            remove(of_earlier_weights)
        with atomic_draft(out / "model") as draft:
            draft.mkdir()
            save_model(model, tokenizer, draft, state_dict, bf16=trainer.settings.save_dtype == "bf16")
            write_json(out / "result.json", asdict(result))
        _remove_checkpoints(out / "trainer")
    trainer.accelerator.wait_for_everyone()


def _remove_checkpoints(folder: Path) -> None:
    """Delete a finished run's checkpoints; files of reporters (tensorboard, ...) stay."""
    for left in (*folder.glob("checkpoint-*"), folder / "reference"):
        shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _free_memory(trainer: StepTrainer[Any] | None) -> None:
    """Free weights, gradients and optimizer state, also after an error; Trainer's reference cycles would keep them."""
    if trainer is not None:
        trainer.accelerator.free_memory()
        for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "callback_handler"):
            setattr(trainer, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
