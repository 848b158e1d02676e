"""Train a student from a rows file: from the last whole checkpoint, or the start, to a stored model.

Invariant: going on after a kill gives the weights of the uninterrupted run, bit for bit (CPU, fp32); `model/` appears
last and whole.
"""

from __future__ import annotations

import atexit
import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from cotree.base.atomic import atomic_draft, write_json
from cotree.models.tokenizer import load_tokenizer
from cotree.train.arguments import resolve, training_arguments
from cotree.train.callback import RunCallback
from cotree.train.checkpoints import last_checkpoint, remove_checkpoints
from cotree.train.forest import forest_tokens
from cotree.train.memory import explain_out_of_memory
from cotree.train.methods import METHODS
from cotree.train.metrics import probe_answers
from cotree.train.model import load_model, save_model
from cotree.train.result import StepLog, TrainResult
from cotree.train.rows import check_fits, encode_file
from cotree.train.settings import Optimizer
from cotree.train.steps import fixed_steps
from cotree.train.student import quiet
from cotree.train.trainer import StepTrainer

__all__ = ["StepLog", "TrainResult", "resolve", "train"]


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
) -> TrainResult:
    """Train a student; the same call after an interruption goes on, and after the end returns the result at once.

    Whether the content of `out` is of these rows and settings is for the caller to know (`base.run_folder`).

    Args:
        method: a name in `methods.METHODS`.
        rows: a file of the method's rows (`data.kinds`).
        student: the transformers folder that training starts from (`student.load_student`).
        out: folder of this run: `model/` (the trained student), `result.json`, `log.jsonl`; `trainer/` on the way.
        settings: of the method.
        seed: fixes the order of the rows.
        on_step: called after each optimizer step.
        references: a folder where runs from one student share what is computed before the first step; without one it
            is kept in `out` until the run is done.

    Raises:
        UsageError: rows, student or settings cannot be trained on.
        CotreeError: the loss is no number any more, or memory or the disk is full; nothing before the last checkpoint
            is lost.
    """
    started = monotonic()
    if (out / "model").exists():
        remove_checkpoints(out / "trainer")  # a kill may have come between the two
        return TrainResult(**json.loads((out / "result.json").read_text()))
    tokenizer = load_tokenizer(student)
    encoded = encode_file(rows, tokenizer, settings)
    order = fixed_steps([tuple(row.prompt) for row in encoded.rows], settings.batch_size, settings.epochs, seed)
    trainer: StepTrainer[Any] | None = None
    try:
        arguments = training_arguments(out, settings, len(order), seed)
        model = load_model(student, settings.lora, seed=seed, compiled=settings.compile)
        check_fits(encoded.rows, model.config)
        trainer_class = trainer_of(method)
        prepared = trainer_class.prepare_rows(
            model,
            encoded.rows,
            arguments,
            settings,
            student=student,
            references=references or out / "trainer/reference",
        )
        trainer = trainer_class(model, [[prepared[index] for index in step] for step in order], arguments, settings)
        del model
        # A process that ends with the group still open can be aborted by a thread of gloo or NCCL.
        atexit.register(trainer.accelerator.state.destroy_process_group)
        prompts = list(dict.fromkeys(tuple(row.prompt) for row in encoded.rows))
        trainer.probe = partial(_probe, trainer, tokenizer, prompts)
        callback = RunCallback(out / "log.jsonl", started, on_step, settings.probe)
        trainer.add_callback(callback)
        with quiet():
            _train(trainer)
            result = _result(trainer, len(encoded.rows), encoded.too_long, callback.seconds())
            _store(trainer, tokenizer, out, result)
        return result
    finally:
        _release(trainer)


def trainer_of(method: str) -> type[StepTrainer[Any]]:
    """The trainer of a method."""
    module, _, name = METHODS[method].trainer.partition(":")
    found: type[StepTrainer[Any]] = getattr(import_module(module), name)
    return found


def _probe(trainer: StepTrainer[Any], tokenizer: Any, prompts: list[tuple[int, ...]]) -> dict[str, float]:
    settings = trainer.settings.probe
    few = [list(prompt) for prompt in prompts[: settings.questions]]
    with explain_out_of_memory(lambda: "in a probe: lower probe.max_tokens"):
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        return probe_answers(model, tokenizer, few, settings.max_tokens)


def _train(trainer: StepTrainer[Any]) -> None:
    """Make all steps after the last whole checkpoint."""
    with trainer.args.main_process_first(local=False):  # torn checkpoints are deleted once
        checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    with explain_out_of_memory(lambda: "outside the packs, where the optimizer keeps two numbers a weight: set lora"):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


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
    )


def _store(trainer: StepTrainer[Any], tokenizer: Any, out: Path, result: TrainResult) -> None:
    """Write result and model, and delete the checkpoints that the model replaces."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes hold parts of it (FSDP)
    if trainer.args.process_index == 0:
        with atomic_draft(out / "model") as draft:
            draft.mkdir()
            save_model(trainer.accelerator.unwrap_model(trainer.model_wrapped), tokenizer, draft, state_dict)
            write_json(out / "result.json", asdict(result))
        remove_checkpoints(out / "trainer")
    trainer.accelerator.wait_for_everyone()


def _release(trainer: StepTrainer[Any] | None) -> None:
    """Give back the memory of weights, gradients and optimizer, also after an error: Trainer is full of cycles."""
    if trainer is not None:
        trainer.accelerator.free_memory()
        trainer.probe = dict
        for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "callback_handler"):
            setattr(trainer, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
