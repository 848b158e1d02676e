"""One training run on transformers.Trainer: exact steps, checkpoints that survive a kill, nothing on the terminal.

Invariants. A dataset item is a whole optimizer step: its rows are fixed by the seed before anything is split, and the
loss denominators are those of the step, so neither the cap of a pack nor the number of processes changes the gradient.
Going on after a kill gives the weights of the uninterrupted run, bit for bit (CPU, fp32). `model/` appears last and
whole.
"""

from __future__ import annotations

import gc
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations

from cotree.base.atomic import whole, writing
from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import read_rows
from cotree.data.kinds import check_template, faults_of, kind_of
from cotree.experiment.recipe import Optimizer, Probe, TrainDPO, TrainSFT
from cotree.models.encode import Chain, Encoded, Pair, Row, encode_dpo, encode_sft, template_hash
from cotree.models.tokenizer import load_tokenizer
from cotree.train.forest import Scored, forest_tokens, multiplicities, packs
from cotree.train.gauges import best_step, chosen_falls, no_answer_rises, probe
from cotree.train.model import load_model, save_model
from cotree.train.recompute import keep_less
from cotree.train.resume import claim, clear, last_checkpoint, seal_checkpoint
from cotree.train.student import quiet


@dataclass(frozen=True)
class StepLog:
    """What one optimizer step was like: the loss, the gauges of its trainer (means over the step's rows), warnings."""

    step: int
    total_steps: int
    loss: float
    gauges: dict[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a training run was like.

    Attributes:
        steps: optimizer steps; kept: the one whose student was kept (the last, or the best of the probes).
        rows: rows trained on (of one epoch); too_long: rows left out because they are over the token limit.
        tokens: tokens in the rows of all steps that were made, prompts included.
        packed: tokens computed for them, as shared ones are computed once.
        seconds: wall time, over all resumes.
        first, final: the metrics of the first and the last step.
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


def fixed_steps(trees: Sequence[Hashable], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step of a run: a new order each epoch, the last batch of an epoch may be short.

    Rows of one tree follow each other, so that a step has as much to share as it can. A fractional number of epochs
    rounds up to whole steps.

    Args:
        trees: of each row the tree that it is from; rows of one question are one tree.
        batch_size: rows of a step.
        epochs: how often each row is trained on.
        seed: fixes the order of the trees, and of the rows in each.
    """
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(math.ceil(epochs)):
        rows: dict[Hashable, list[int]] = {}
        for row in torch.randperm(len(trees), generator=generator).tolist():
            rows.setdefault(trees[row], []).append(row)
        by_tree = list(rows.values())
        order = [row for tree in torch.randperm(len(by_tree), generator=generator) for row in by_tree[tree]]
        steps += [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return steps[: math.ceil(epochs * math.ceil(len(trees) / batch_size))]


@dataclass(frozen=True)
class Step:
    """What a pack must know about its step.

    Attributes:
        rows: how many the step has.
        weights: of each row, by its id, how much each completion token counts in the SFT loss.
        tokens: the sum of all of them.
    """

    rows: int
    weights: dict[int, Tensor]
    tokens: float


class StepTrainer(Trainer, Generic[Row]):  # type: ignore[misc]
    """A Trainer whose batches are whole optimizer steps. Subclasses say what a step's loss is."""

    def __init__(
        self, model: PreTrainedModel, steps: list[list[Row]], arguments: TrainingArguments, settings: Any
    ) -> None:
        self.steps = steps
        self.settings = settings
        self.scope = settings.scope if isinstance(settings, TrainDPO) else settings.sft_scope
        self.ask: Callable[[], dict[str, float]] = dict
        self.gauges: dict[str, float] = {}
        if not (settings.compile or settings.gradient_checkpointing):
            keep_less(model)
        super().__init__(model=model, args=arguments)
        self.remove_callback(PrinterCallback)

    @abstractmethod
    def share(self, model: nn.Module, rows: Sequence[Row], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """A pack's share of the step's loss (to differentiate) and of its gauges (scalars); shares add up."""

    def packs(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The packs of a step, at least one for each process if there are enough rows."""
        dealt, processes = packs(rows, self.settings.pack_tokens), self.args.world_size
        return dealt if len(dealt) >= processes else packs(rows, math.ceil(forest_tokens(rows) / processes))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of one optimizer step; returns its loss."""
        model.train()
        weights = sft_weights(inputs, self.scope)
        by_row = {id(row): each for row, each in zip(inputs, weights, strict=True)}
        step = Step(len(inputs), by_row, sum(float(each.sum()) for each in weights))
        processes, rank = self.args.world_size, self.args.process_index
        dealt = self.packs(inputs)
        total = torch.zeros(())
        gauges: dict[str, Tensor] = {}
        # Every process must call the model equally often (FSDP): those without a pack repeat one that counts nothing.
        turns = range(rank, math.ceil(len(dealt) / processes) * processes, processes)
        for turn in turns:
            counts = float(turn < len(dealt))
            pack = dealt[turn % len(dealt)]
            # DDP needs one synchronisation a step, not one a pack; it divides the sum of gradients by the processes.
            with (
                nullcontext() if turn == turns[-1] else self.accelerator.no_sync(model),
                room_for_pack(pack, f"at step {self.state.global_step + 1}", self.settings.pack_tokens),
            ):
                with self.compute_loss_context_manager():
                    loss, share = self.share(model, pack, step)
                self.accelerator.backward(loss * (counts * processes))
            total = total.to(loss) + counts * loss.detach()
            gauges = {name: gauges.get(name, 0) + counts * value.detach() for name, value in share.items()}
        sums = add_over_processes(torch.stack([total, *(gauges[name].to(total) for name in gauges)]))
        if not math.isfinite(sums[0]):
            raise CotreeError(
                f"the loss became {sums[0].item()} at step {self.state.global_step + 1}: lower learning_rate, "
                "or look for broken rows"
            )
        self.gauges = dict(zip(gauges, sums[1:].tolist(), strict=True))
        return sums[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's gauges, and a probe where one is due or training ends, to what Trainer logs and reports."""
        step, settings = self.state.global_step, self.settings.probe
        if "loss" in logs:
            logs |= self.gauges
            if settings is not None and ((step - 1) % settings.every == 0 or step == self.state.max_steps):
                found = self.ask()
                # One set of numbers decides for all processes, which may round their texts apart.
                device = self.args.device if self.args.world_size > 1 else None
                values = add_over_processes(torch.tensor([*found.values()], dtype=torch.float64, device=device))
                logs |= dict(zip(found, (values / self.args.world_size).tolist(), strict=True))
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
            self.accelerator.wait_for_everyone()
            if self.args.process_index == 0:
                seal_checkpoint(checkpoint, self.state.best_global_step)


@contextmanager
def room_for(told: Callable[[], str]) -> Iterator[None]:
    """If there is too little memory, say where and what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CotreeError(f"out of memory {told()}") from error


def room_for_pack(pack: Sequence[Chain | Pair], where: str, pack_tokens: int) -> AbstractContextManager[None]:
    """If there is too little memory, say for which pack, and what to lower."""

    def told() -> str:
        lower = f"pack_tokens (now {pack_tokens})" if len(pack) > 1 else "build.max_tokens"
        which = f"in a pack of {len(pack)} rows and {forest_tokens(pack)} tokens"
        return f"{where}, {which}: lower {lower}, or set gradient_checkpointing: true"

    return room_for(told)


def sft_weights(rows: Sequence[Chain | Pair], scope: str) -> list[Tensor]:
    """How much each token of each row's (chosen) completion counts in the SFT loss of a step of these rows.

    Args:
        rows: all of the step.
        scope: `full` is 1 everywhere, `suffix` 0 in the prefix that both sides of a pair share, `dedup` 1 / (rows of
            the step that have this very token after the same tokens).
    """
    if scope == "dedup":
        counts = multiplicities([Scored(row.chains[0], len(row.prompt)) for row in rows])
        return [1 / count.double() for count in counts]
    weights = [torch.ones(len(row.chains[0]) - len(row.prompt), dtype=torch.float64) for row in rows]
    for row, each in zip(rows, weights, strict=True):
        if scope == "suffix" and isinstance(row, Pair):
            each[: row.prefix] = 0
    return weights


def add_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


@dataclass
class _Progress(TrainerCallback):  # type: ignore[misc]
    """Writes `log.jsonl`, warns, calls `on_step`, once a step; skips a checkpoint that the final model replaces."""

    log: Path
    began: float
    on_step: Callable[[StepLog], None] | None
    settings: Probe | None
    before: float = 0.0

    def seconds(self) -> float:
        """Wall time of this run, earlier attempts up to their last checkpoint included."""
        return self.before + monotonic() - self.began

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A killed run may have logged steps after its last checkpoint: they are about to be done again.
        if state.is_world_process_zero:
            with whole(self.log) as draft:
                draft.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))
        self.before = state.log_history[-1]["seconds"] if state.log_history else 0.0
        if state.best_global_step is not None:  # the folder may have been moved since
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:
            state.log_history.pop()  # Trainer's own summary at the end
            return
        if self.settings is not None and "probe_no_answer" in entry:
            stop_rise = self.settings.stop_rise
            if stop_rise is not None and (rises := no_answer_rises(state.log_history, stop_rise)):
                entry["warning"] = rises
                control.should_training_stop = True
                # A resume that began at this step would not know that it should stop.
                control.should_save = False
            if self.settings.keep == "best" and best_step(state.log_history) == state.global_step:
                state.best_global_step, state.best_model_checkpoint = state.global_step, None
                # Trainer loads the best checkpoint at the end; the last step needs none.
                control.should_save = state.global_step < state.max_steps
        if not any("warning" in line for line in state.log_history) and (falls := chosen_falls(state.log_history)):
            entry["warning"] = falls
        entry["seconds"] = self.seconds()
        entry.pop("epoch", None)  # all epochs are one to Trainer, so its number says nothing
        if not state.is_world_process_zero:
            return
        with writing(self.log), self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.on_step is not None:
            gauges = {name: value for name, value in entry.items() if name not in ("step", "loss", "warning")}
            warnings = (entry["warning"],) if "warning" in entry else ()
            self.on_step(StepLog(state.global_step, state.max_steps, entry["loss"], gauges, warnings))


def training_arguments(out: Path, settings: Optimizer, steps: int, seed: int) -> TrainingArguments:
    """Trainer's arguments: bf16 autocast on CUDA, fp32 on CPU; a linear schedule with warm-up; silent.

    Raises:
        UsageError: a reporter is not installed.
    """
    missing = sorted(set(settings.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise UsageError(f"report_to: {', '.join(missing)} is not installed, or no reporter of transformers")
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        seed=seed,
        use_cpu=not cuda,
        bf16=settings.precision == "bf16" or (cuda and settings.precision == "auto"),
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


def train(
    trainer_class: type[StepTrainer[Row]],
    rows: Path,
    student: Path,
    out: Path,
    settings: TrainSFT | TrainDPO,
    seed: int,
    max_tokens: int,
    on_step: Callable[[StepLog], None] | None,
    prepare: Callable[[PreTrainedModel, list[Row], TrainingArguments], list[Row]] | None = None,
) -> TrainResult:
    """What `sft.train_sft` and `dpo.train_dpo` do, with their arguments.

    `prepare` may add to the rows what the model before the first step says of them.
    """
    began = monotonic()
    tokenizer = load_tokenizer(student)
    template = template_hash(tokenizer)
    if (out / "model").exists():
        claim(out, rows, student, settings, seed, max_tokens, template)
        clear(out / "trainer")  # a kill may have come between the two
        return TrainResult(**json.loads((out / "result.json").read_text()))
    encoded = encode_file(rows, tokenizer, settings, max_tokens)
    order = fixed_steps([tuple(row.prompt) for row in encoded.rows], settings.batch_size, settings.epochs, seed)
    trainer: StepTrainer[Row] | None = None
    try:
        arguments = training_arguments(out, settings, len(order), seed)
        with arguments.main_process_first(local=False):
            claim(out, rows, student, settings, seed, max_tokens, template)
        model = load_model(student, settings.lora, seed, settings.compile)
        _check_fits(encoded.rows, model.config)
        prepared = prepare(model, encoded.rows, arguments) if prepare else encoded.rows
        trainer = trainer_class(model, [[prepared[index] for index in step] for step in order], arguments, settings)
        del model
        return _run(trainer, tokenizer, out, encoded, began, on_step)
    finally:
        _release(trainer)


def encode_file(path: Path, tokenizer: Any, settings: TrainSFT | TrainDPO, max_tokens: int) -> Encoded[Any]:
    """The rows of a dataset file as these settings train on them: chains for SFT, pairs for DPO.

    Raises:
        UsageError: the file is unreadable, empty, of another kind or built for another chat template, a row is not
            what its columns promise, or none fits.
    """
    kind, encode = ("sft", encode_sft) if isinstance(settings, TrainSFT) else ("dpo", encode_dpo)
    rows = list(read_rows(path))
    if not rows:
        raise UsageError(f"{path} has no rows: the build stage selected none; search more questions or rollouts")
    if kind_of(rows[0]) != kind:
        raise UsageError(f"{path} has no {kind} rows: their columns are {', '.join(rows[0])}")
    for index, row in enumerate(rows):
        if faults := faults_of(row, kind):
            raise UsageError(f"{path}: row {index}, {faults[0]} (cotree build --check {path} finds all faults)")
    check_template(path, tokenizer)
    encoded: Encoded[Any] = encode(tokenizer, rows, max_tokens)
    if not encoded.rows:
        raise UsageError(f"all {encoded.too_long} rows are over {max_tokens} tokens: raise build.max_tokens")
    return encoded


def _check_fits(rows: Sequence[Chain | Pair], config: Any) -> None:
    """Refuse tokens and positions that the student has not."""
    largest = max(max(chain) for row in rows for chain in row.chains)
    if largest >= config.vocab_size:
        raise UsageError(
            f"the rows have token {largest}, the student's vocabulary {config.vocab_size}: is the tokenizer its own?"
        )
    positions = config.max_position_embeddings
    if longer := sum(row.longest > positions for row in rows):
        raise UsageError(f"{longer} rows are over the student's {positions} positions: lower build.max_tokens to that")


def _run(
    trainer: StepTrainer[Row],
    tokenizer: Any,
    out: Path,
    encoded: Encoded[Any],
    began: float,
    on_step: Callable[[StepLog], None] | None,
) -> TrainResult:
    """Train from the last whole checkpoint (or the start) to the end, and store model and result."""
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in encoded.rows))

    def ask() -> dict[str, float]:
        settings = trainer.settings.probe
        few = [list(prompt) for prompt in prompts[: settings.questions]]
        with room_for(lambda: "in a probe: lower probe.max_tokens"):
            return probe(trainer.accelerator.unwrap_model(trainer.model_wrapped), tokenizer, few, settings)

    trainer.ask = ask
    progress = _Progress(out / "log.jsonl", began, on_step, trainer.settings.probe)
    trainer.add_callback(progress)
    with quiet():
        with trainer.args.main_process_first(local=False):  # torn checkpoints are deleted once
            checkpoint = last_checkpoint(out / "trainer")
        with room_for(lambda: "outside the packs, where the optimizer keeps two numbers a weight: set lora"):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        history, done = trainer.state.log_history, trainer.steps[: trainer.state.global_step]
        result = TrainResult(
            steps=trainer.state.global_step,
            kept=trainer.state.best_global_step or trainer.state.global_step,
            rows=len(encoded.rows),
            too_long=encoded.too_long,
            tokens=sum(row.tokens for step in done for row in step),
            packed=sum(forest_tokens(pack) for step in done for pack in trainer.packs(step)),
            seconds=progress.seconds(),
            first=history[0],
            final=history[-1],
        )
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes hold parts of it (FSDP)
        if trainer.args.process_index == 0:
            with whole(out / "model") as draft:
                draft.mkdir()
                save_model(trainer.accelerator.unwrap_model(trainer.model_wrapped), draft, state_dict)
                tokenizer.save_pretrained(draft)
                with whole(out / "result.json") as text:
                    text.write_text(json.dumps(asdict(result), indent=2) + "\n")
            clear(out / "trainer")
        trainer.accelerator.wait_for_everyone()
    return result


def _release(trainer: StepTrainer[Row] | None) -> None:
    """Give back the memory of weights, gradients and optimizer, also after an error: Trainer is full of cycles."""
    if trainer is not None:
        trainer.accelerator.free_memory()
        for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "callback_handler"):
            setattr(trainer, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
