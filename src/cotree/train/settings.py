"""The settings of training: those of all methods (`Optimizer`), those of each, and the methods by name.

Loads no torch: a recipe is checked by these. A new method is a class here with a line in `METHODS`, and a file with a
trainer, which has a line in `run.TRAINERS`.
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
    """Train low-rank adapters on all linear layers instead of the weights; `model/` is stored merged all the same."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)


class Probe(Section):
    """Ask the student `questions` of the training prompts every `every` steps, greedily, and diagnose what it writes.

    stop_rise: stop training when the no-answer ratio is more than this above that of the first probe.
    keep: `best` makes the student of the probe with the fewest missing answers (then the fewest loops; of equals the
        last) the trained one, instead of that of the last step.
    """

    every: int = Field(50, ge=1)
    questions: int = Field(8, ge=1)
    max_tokens: int = Field(256, ge=1)
    stop_rise: float | None = Field(None, gt=0, le=1)
    keep: Literal["last", "best"] = "last"


class Optimizer(Section):
    """The settings of all methods. `batch_size` counts chains (SFT) or pairs (DPO) in one optimizer step.

    A step is computed in packs of at most `pack_tokens` tokens, shared ones counted once: it changes memory and time,
    never the gradient. The learning rate rises over `warmup_ratio` of the steps, from 0 as in transformers, then falls
    linearly to 0. `precision: auto` is bf16 autocast on CUDA and on CPUs with AMX or AVX512_BF16, else fp32. `compile`
    is torch.compile on all but the attention. `save_dtype: bf16` rounds the trained weights when they are stored: half
    of the disk, half of what a server loads. `report_to` names Trainer's reporters (tensorboard, wandb, ...). Rows over
    `max_tokens` (prompt included) are left out and counted; None takes all that the dataset has.

    `gpus` is how many processes of this machine train, a GPU each: `all` that are there (one process without CUDA, and
    at most one for each row of a step), or a number, which without CUDA starts as many on the CPU. Under torchrun
    all of its own train. `shard` divides weights, gradients and the optimizer's moments among the processes
    (FSDP2); else each has all of them (DDP), as a single process has in any case.
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
    row_kind: ClassVar[Literal["sft", "dpo"]]  # the rows that the method trains on (`data.kinds`)


class SFT(Optimizer):
    """Supervised fine-tuning on chains: token-mean cross-entropy over the completion.

    `sft_scope: dedup` counts a token that several chains of a step share once instead of once for each.
    """

    sft_scope: Literal["full", "dedup"] = "full"
    row_kind = "sft"


class DPO(Optimizer):
    """L = cDPO(beta, label_smoothing) + alpha * L_SFT(chosen) (paper, Fine-grained DPO and Joint Post-training).

    `mask_prefix` leaves the tokens that chosen and rejected share out of the margin; in the sigmoid margin they cancel
    exactly, so what it changes is the default of `sft_scope` (`suffix`) and the logged rewards.
    `sft_norm`: `token` = mean over all scored tokens of the step, `pair` = mean over pairs of per-pair token means.
    `sft_scope`: `full` completions, the `suffix` after the shared prefix, or `dedup`: shared tokens of a step once.
    `loss`: the margin's form (docs/training.md); `simpo_gamma` is SimPO's target margin, `ld_alpha` LD-DPO's weight of
    tokens beyond the shorter side's length. `reference_free` drops the reference; SimPO never has one.
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
        """The SFT term's scope: an explicit one wins, else masking decides."""
        return self.sft_scope or ("suffix" if self.mask_prefix else "full")

    @property
    def has_reference(self) -> bool:
        """Whether the margin is relative to the SFT checkpoint."""
        return self.loss != "simpo" and not self.reference_free


METHODS: Mapping[str, type[Optimizer]] = {"sft": SFT, "dpo": DPO}
# Raised when the code changes what training makes from the same student, rows and settings.
TRAINING_VERSION = 1
