"""Training settings: those common to all methods (`Optimizer`), those of each method, and `METHODS` by name.

Imports no torch, because recipes are validated with these classes. A new method needs a class here with a line in
`METHODS`, and a trainer with a line in `run.TRAINERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cotree.base.settings import NOT_CONTENT, Section


def _all_or_number(given: Any) -> Any:
    if given == "all" or (type(given) is int and given >= 1):
        return given
    raise ValueError("must be `all` or a whole number from 1")


class LoRA(Section):
    """Train LoRA adapters on all linear layers instead of all weights; `model/` holds the merged weights."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)


class Probe(Section):
    """Every `every` steps, generate greedily for `questions` training prompts and count missing answers and loops.

    stop_rise: stop training when the no-answer ratio is more than this above that of the first probe.
    keep: `best` keeps the checkpoint of the probe with the lowest no-answer ratio (then the lowest loop ratio, then the
        latest) instead of the last step's.
    """

    every: int = Field(50, ge=1)
    questions: int = Field(8, ge=1)
    max_tokens: int = Field(256, ge=1)
    stop_rise: float | None = Field(None, gt=0, le=1)
    keep: Literal["last", "best"] = "last"


class Optimizer(Section):
    """Settings of all methods. `batch_size` is the number of chains (SFT) or pairs (DPO) per optimizer step.

    A step is computed in packs (micro-batches) of at most `pack_tokens` tokens, shared prefixes counted once; it
    affects memory and time, never the gradient. Linear schedule: the learning rate warms up from 0 over `warmup_ratio`
    of the steps, then decays to 0. `precision: auto` is bf16 autocast on CUDA and on CPUs with AMX or AVX512_BF16, else
    fp32. `compile` applies torch.compile to all but attention. `save_dtype: bf16` rounds the stored weights, which
    halves disk and server memory. `report_to` names Trainer's reporters (tensorboard, wandb, ...). Rows longer than
    `max_tokens` (prompt included) are left out and counted; None keeps all rows of the dataset.

    `gpus`: training processes on this machine, one per GPU: `all` (one process without CUDA, and at most one per row
    of a step) or a number; without CUDA that many CPU processes. Under torchrun its own processes train. `shard` uses
    FSDP2 (shards weights, gradients and optimizer state) instead of DDP; no effect on a single process.
    """

    learning_rate: float = Field(5e-5, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    max_tokens: int | None = Field(None, ge=8)
    pack_tokens: Annotated[int, NOT_CONTENT] = Field(2048, ge=1)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    save_steps: Annotated[int, NOT_CONTENT] = Field(20, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: Annotated[bool, NOT_CONTENT] = False
    compile: Annotated[bool, NOT_CONTENT] = False
    gpus: Annotated[Literal["all"] | int, BeforeValidator(_all_or_number), NOT_CONTENT] = "all"
    shard: Annotated[bool, NOT_CONTENT] = False
    lora: LoRA | None = None
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    report_to: Annotated[tuple[str, ...], NOT_CONTENT] = ()
    probe: Probe | None = None
    row_kind: ClassVar[Literal["sft", "dpo"]]  # kind of dataset rows (`data.kinds`)


class SFT(Optimizer):
    """Supervised fine-tuning on chains: token-mean cross-entropy over the completion.

    `sft_scope: dedup` counts a prefix token shared by several chains of a step once instead of once per chain.
    """

    sft_scope: Literal["full", "dedup"] = "full"
    row_kind = "sft"


class DPO(Optimizer):
    """L = cDPO(beta, label_smoothing) + alpha * L_SFT(chosen) (paper, Fine-grained DPO and Joint Post-training).

    `mask_prefix` masks the shared prefix of chosen and rejected in the margin; in the sigmoid margin these tokens
    cancel exactly, so it only changes the default of `sft_scope` (to `suffix`) and the logged rewards.
    `sft_norm`: `token` = mean over all scored tokens of the step, `pair` = mean over pairs of per-pair token means.
    `sft_scope`: `full` completions, the `suffix` after the shared prefix, or `dedup`: shared tokens of a step once.
    `loss`: form of the margin (docs/training.md); `simpo_gamma` is SimPO's target margin, `ld_alpha` LD-DPO's weight
    for tokens beyond the shorter side's length. `reference_free` drops the reference model; SimPO never uses one.
    """

    learning_rate: float = Field(5e-6, gt=0)
    batch_size: int = Field(4, ge=1)
    loss: Literal["sigmoid", "length_normalised", "simpo", "ld_dpo"] = "sigmoid"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    simpo_gamma: float = Field(0.5, ge=0)
    ld_alpha: float = Field(0.5, ge=0, le=1)
    reference_free: bool = False
    alpha: float = Field(1.0, ge=0)
    mask_prefix: bool = True
    sft_norm: Literal["token", "pair"] = "token"
    sft_scope: Literal["full", "suffix", "dedup"] | None = None
    row_kind = "dpo"

    @property
    def scope(self) -> Literal["full", "suffix", "dedup"]:
        """The SFT term's scope: as set, else `suffix` with `mask_prefix` and `full` without."""
        return self.sft_scope or ("suffix" if self.mask_prefix else "full")

    @property
    def has_reference(self) -> bool:
        """Whether the margin uses a reference model."""
        return self.loss != "simpo" and not self.reference_free


METHODS: Mapping[str, type[Optimizer]] = {"sft": SFT, "dpo": DPO}
# Increase it when a code change alters the weights trained from the same student, rows and settings.
TRAINING_VERSION = 1
