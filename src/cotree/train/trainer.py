"""A transformers.Trainer whose batches are whole optimizer steps; its arguments and crash-safe checkpoints.

Invariant: each data item is a whole step with fixed rows, and the loss divides by the rows and tokens of the step, so
neither `pack_tokens` nor the number of processes changes the gradient. A checkpoint is valid once its marker file with
the checksums of its other files exists, which is written after these are on disk: a kill leaves the last valid one, and
if that is damaged the one before is used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, convert_outputs_to_fp32, reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cotree.base.atomic import damage, explain_write_errors, sync, write_sums
from cotree.base.errors import CotreeError, UsageError
from cotree.models.encode import EncodedChain, EncodedPair, EncodedRow
from cotree.train.forest import forest_tokens, packs
from cotree.train.model import checkpoint_layers
from cotree.train.settings import Optimizer

_COMPLETE = "complete"
_SHARDS_BY_LAUNCHER = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # read before accelerate itself sets it
Settings = TypeVar("Settings", bound=Optimizer)


def training_arguments(out: Path, settings: Optimizer, steps: int, seed: int) -> TrainingArguments:
    """TrainingArguments for `steps` steps: linear schedule with warm-up, checkpoints in `out`/trainer, no output.

    Raises:
        UsageError: a reporter is not installed, a step has fewer rows than processes, or DeepSpeed is set.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # it would step after every backward pass
        raise UsageError("DeepSpeed cannot train here, where a step is several backward passes; set shard=true (FSDP2)")
    os.environ["ACCELERATE_USE_FSDP"] = str(is_sharded(settings)).lower()  # overwrite the previous student's
    missing = sorted(set(settings.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise UsageError(f"report_to: {', '.join(missing)} is not installed, or no reporter of transformers")
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=resolve_precision(settings).precision == "bf16",
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        # The first warm-up step has learning rate 0, so a run of one step has no warm-up.
        warmup_steps=min(math.ceil(settings.warmup_ratio * steps), steps - 1),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        save_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to),
        fsdp=is_sharded(settings),
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"} if is_sharded(settings) else None,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if settings.batch_size < arguments.world_size:
        raise UsageError(f"batch_size {settings.batch_size} is less than the {arguments.world_size} processes")
    if settings.probe is not None and settings.probe.keep == "best":  # as an argument it would need an eval dataset
        arguments.load_best_model_at_end, arguments.metric_for_best_model = True, "probe_no_answer"
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer uses DataParallel, which splits rows
    return arguments


def is_sharded(settings: Optimizer) -> bool:
    """Whether FSDP is on, by `shard` with several processes or by `accelerate launch`."""
    return (settings.shard or _SHARDS_BY_LAUNCHER) and "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def resolve_precision(settings: Settings) -> Settings:
    """Replace `precision: auto` by bf16 or fp32 for this machine.

    bf16 on CUDA and on CPUs with bf16 hardware, where training takes three fifths of the time at equal accuracy
    (docs/training.md); else fp32.
    """
    if settings.precision != "auto":
        return settings
    fast = torch.cuda.is_available() or cpu_has_bf16()
    return settings.model_copy(update={"precision": "bf16" if fast else "fp32"})


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 matrix products in hardware (AMX or AVX512_BF16); False if torch is too old to tell."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


class StepTrainer(Trainer, Generic[EncodedRow]):  # type: ignore[misc]
    """A Trainer whose batches are whole optimizer steps; one subclass per method computes the loss.

    Attributes:
        steps: the rows of each optimizer step.
        settings: of the method.
        metrics: of the last step, means over its rows.
        probe: called with the unwrapped model at the steps of `settings.probe`; returns the probe's metrics.
    """

    def __init__(
        self, model: PreTrainedModel, steps: list[list[EncodedRow]], arguments: TrainingArguments, settings: Any
    ) -> None:
        self.steps = steps
        self.settings = settings
        self.metrics: dict[str, float] = {}
        self.probe: Callable[[Any], dict[str, float]] | None = None
        if settings.gradient_checkpointing or not settings.compile:
            checkpoint_layers(model, keep_matrix_products=not settings.gradient_checkpointing)
        super().__init__(model=model, args=arguments)
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Enable FSDP on CPUs too, which torch supports and accelerate refuses, without mixed-precision weights."""
        state, sharded = PartialState(), is_sharded(self.settings)
        if sharded and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU  # accelerate reads `fsdp` for this type only
        super().create_accelerator_and_postprocess()
        if sharded:  # autocast as without FSDP: weights gathered in bf16 would change the log-probabilities
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
            self.model.forward = convert_outputs_to_fp32(self.accelerator.autocast()(self.model.forward))

    @abstractmethod
    def step_weights(self, rows: Sequence[EncodedRow]) -> list[Tensor]:
        """The SFT loss weight of each completion token of a step's rows (`rows.sft_weights`)."""

    @abstractmethod
    def pack_loss(
        self, model: nn.Module, rows: Sequence[EncodedRow], weights: Sequence[Tensor], step_rows: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A pack's share of the step's loss (with gradient) and of its metrics: scalars that sum to the step's.

        Args:
            model: may be wrapped.
            rows: of the pack.
            weights: of their tokens, from `step_weights`.
            step_rows: number of rows in the whole step.
        """

    def packs(self, rows: Sequence[EncodedRow]) -> list[list[EncodedRow]]:
        """Split a step into packs, at least one per process if there are enough rows."""
        dealt, processes = packs(rows, self.settings.pack_tokens), self.args.world_size
        return dealt if len(dealt) >= processes else packs(rows, math.ceil(forest_tokens(rows) / processes))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the gradients of one optimizer step; returns its loss."""
        model.train()
        number = self.state.global_step + 1
        weights = dict(zip(map(id, inputs), self.step_weights(inputs), strict=True))
        processes, rank = self.args.world_size, self.args.process_index
        dealt = self.packs(inputs)
        total = torch.zeros(())
        metrics: dict[str, Tensor] = {}
        # FSDP needs equally many forward passes in every process: those with fewer packs repeat one with weight 0.
        turns = range(rank, math.ceil(len(dealt) / processes) * processes, processes)
        for turn in turns:
            counts = float(turn < len(dealt))
            pack = dealt[turn % len(dealt)]
            # With DDP, synchronise once a step, not once a pack; DDP averages gradients over processes.
            # With FSDP that would keep unsharded gradients until then.
            with (
                nullcontext() if turn == turns[-1] or is_sharded(self.settings) else self.accelerator.no_sync(model),
                explain_out_of_memory(f"at step {number}", pack, self.settings),
            ):
                with self.compute_loss_context_manager():
                    loss, parts = self.pack_loss(model, pack, [weights[id(row)] for row in pack], len(inputs))
                self.accelerator.backward(loss * (counts * processes))
            total = total.to(loss) + counts * loss.detach()
            metrics = {name: metrics.get(name, 0) + counts * value.detach() for name, value in parts.items()}
        sums: Tensor = reduce(torch.stack([total, *(value.to(total) for value in metrics.values())]), "sum")
        if not math.isfinite(sums[0]):
            raise CotreeError(
                f"the loss became {sums[0].item()} at step {number}: lower learning_rate, or look for broken rows"
            )
        self.metrics = dict(zip(metrics, sums[1:].tolist(), strict=True))
        return sums[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's metrics to Trainer's logs, and a probe's if one is due or training ends."""
        step = self.state.global_step
        if "loss" in logs:
            logs |= self.metrics
            last = step == self.state.max_steps
            if self.probe is not None and (last or (step - 1) % self.settings.probe.every == 0):
                with explain_out_of_memory("in a probe: lower probe.max_tokens"):
                    found = self.probe(self.accelerator.unwrap_model(self.model_wrapped))
                # Average over processes, which may generate different texts by rounding, so that all decide alike.
                values = torch.tensor([*found.values()], dtype=torch.float64, device=self.args.device)
                logs |= dict(zip(found, reduce(values, "mean").tolist(), strict=True))
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[list[EncodedRow]]:
        """The steps in order, not distributed over processes by accelerate."""
        return DataLoader(self.steps, batch_size=1, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Always 0: the base class would look for `input_ids`."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint with marker; keep the previous one and the best, delete the rest."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with explain_write_errors(checkpoint):
            if self.args.process_index == 0:  # before the new one needs their room
                whole = _checkpoints(checkpoint.parent)
                best = {self.state.best_global_step, *map(_best_step, whole[:1])}
                for other in whole[1:]:
                    if _step(other) not in best:
                        _delete(other)
            try:
                super()._save_checkpoint(model, trial)
            except RuntimeError as error:  # what torch.save raises on a full disk
                raise OSError(str(error)) from error
            self.accelerator.wait_for_everyone()
            if self.args.process_index == 0:
                write_sums(checkpoint / _COMPLETE, checkpoint.rglob("*"))
                sync(checkpoint.parent)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, if it is intact."""
        best = Path(self.state.best_model_checkpoint)
        if fault := _damage(best):
            raise CotreeError(f"{best} is damaged ({fault}); run the same command again, which trains from before it")
        super()._load_best_model()


def last_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint whose best checkpoint is also intact; None if there is none.

    Deletes newer damaged ones, with a line to `tell` for each, and unfinished ones.
    """
    whole = _checkpoints(folder)
    for at, checkpoint in enumerate(whole):
        best = checkpoint.with_name(f"checkpoint-{_best_step(checkpoint) or _step(checkpoint)}")
        fault = next(filter(None, map(_damage, dict.fromkeys((checkpoint, best)))), None)
        if fault is None:
            return checkpoint
        goes_on = f"goes on from {whole[at + 1].name}" if whole[at + 1 :] else "starts over"
        tell(f"{checkpoint} is damaged ({fault}) and was deleted; training {goes_on}")
        _delete(checkpoint)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoints, newest first; deletes unfinished ones."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    for torn in [path for path in found if not (path / _COMPLETE).exists()]:
        shutil.rmtree(torn)
    return sorted(filter(Path.exists, found), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _best_step(checkpoint: Path) -> int | None:
    """The step of the best checkpoint when this one was saved, or None."""
    with suppress(OSError, ValueError, LookupError):
        step: int | None = json.loads((checkpoint / "trainer_state.json").read_text())["best_global_step"]
        return step
    return None


def _damage(checkpoint: Path) -> str | None:
    """A description of the damage of a checkpoint, or None; markers of older versions have no checksums to compare."""
    marker = checkpoint / _COMPLETE
    if marker.exists() and not marker.stat().st_size:
        return None
    fault = damage(marker)
    return fault and f"{checkpoint.name}/{fault}"


def _delete(checkpoint: Path) -> None:
    (checkpoint / _COMPLETE).unlink()  # first, so that a kill leaves an unfinished checkpoint
    shutil.rmtree(checkpoint)


@contextmanager
def explain_out_of_memory(
    where: str, pack: Sequence[EncodedChain | EncodedPair] = (), settings: Optimizer | None = None
) -> Iterator[None]:
    """Convert an out-of-memory error in the block to a CotreeError that names the place and the setting to lower.

    Args:
        where: the phase of training; without a pack also what to lower.
        pack: the rows being computed.
        settings: of the method; given with a pack.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        if settings is not None:
            lower = f"pack_tokens (now {settings.pack_tokens})" if len(pack) > 1 else "max_tokens"
            where += f", in a pack of {len(pack)} rows and {forest_tokens(pack)} tokens: lower {lower}"
            where += ", or set gradient_checkpointing: true"
        raise CotreeError(f"out of memory {where}") from error
