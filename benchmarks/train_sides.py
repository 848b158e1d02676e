"""One optimizer step's loss and gradient of a shape, three ways: cotree, TRL made fair, TRL as it is.

- fair: TRL's DPOTrainer with the reference computed beforehand, no activation checkpointing, and only the labelled
  positions scored (on a CPU it would score all of them, and compute them twice).
- as it is: its defaults, with the reference model beside it, which it computes in every step.

cotree and fair both have the reference when a step begins, so its cost is in neither of their times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.train_shapes import Shape
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.train.dpo import PairTrainer, with_reference
from cotree.train.model import load_model
from cotree.train.settings import DPO, SFT
from cotree.train.sft import ChainTrainer
from cotree.train.trainer import training_arguments

BETA = 0.1
Step = Callable[[int], float]


def cotree_step(student: Path, shape: Shape, pack_tokens: int, reference: bool = True) -> tuple[Any, Step]:
    """The model, and what computes a step, given a micro-batch: gradients stay on the model, the loss is returned.

    `reference` false leaves it at 0, which changes no size: what memory is measured with.
    """
    rows, model, unused = shape.rows, load_model(student), Path(tempfile.gettempdir()) / "unused"
    trainer: Any
    if shape.loss == "sft":
        sft = SFT(batch_size=len(rows), pack_tokens=pack_tokens, precision="fp32")
        trainer = ChainTrainer(model, [rows], training_arguments(unused, sft, 1, 0), sft)
    else:
        dpo = DPO(
            batch_size=len(rows),
            beta=BETA,
            label_smoothing=0.0,
            alpha=1.0 if shape.loss == "joint" else 0.0,
            mask_prefix=True,  # the default: the shared prefix cancels in the margin, so the gradient is TRL's
            sft_scope="full",
            pack_tokens=pack_tokens,
            precision="fp32",
        )
        arguments = training_arguments(unused, dpo, 1, 0)
        rows = with_reference(model, rows, arguments, dpo) if reference else rows
        trainer = PairTrainer(model, [rows], arguments, dpo)
    trainer.create_accelerator_and_postprocess()
    return trainer.model, lambda _: float(trainer.training_step(trainer.model, rows))


def trl_step(student: Path, shape: Shape, fair: bool, reference: bool = True) -> tuple[Any, Step]:
    """The same of TRL's SFTTrainer or DPOTrainer; gradients are accumulated over micro-batches as its loop does."""
    trainer, rows = (_trl_sft if shape.loss == "sft" else _trl_dpo)(student, shape, fair)
    if fair:
        _score_labelled_only(trainer.model)
    if fair and shape.loss != "sft":
        for row in rows:
            chosen = rejected = torch.zeros(1)
            if reference:  # it is the model itself before its first step
                with torch.no_grad():
                    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator([row]))
            row |= {"ref_chosen_logps": chosen.item(), "ref_rejected_logps": rejected.item()}
    trainer.create_accelerator_and_postprocess()
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(micro_batch: int) -> float:
        trainer.model.train()
        parts = [rows[at : at + micro_batch] for at in range(0, len(rows), micro_batch)]
        total = 0.0
        for part in parts:
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(part)) / len(parts)
            loss.backward()
            total += loss.item()
        return total

    return trainer.model, step


def _trl_dpo(student: Path, shape: Shape, fair: bool) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    losses = ["sigmoid", "sft"] if shape.loss == "joint" else ["sigmoid"]
    config = DPOConfig(
        **_options(fair), beta=BETA, loss_type=losses, loss_weights=[1.0] * len(losses), precompute_ref_log_probs=fair
    )
    trainer = DPOTrainer(
        model=_plain(student),
        ref_model=None if fair else _plain(student),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in shape.rows]
    return trainer, rows


def _trl_sft(student: Path, shape: Shape, fair: bool) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": c.prompt + c.completion, "completion_mask": [0] * len(c.prompt) + [1] * len(c.completion)}
        for c in shape.rows
    ]
    trainer = SFTTrainer(
        model=_plain(student),
        args=SFTConfig(**_options(fair), completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    return trainer, list(trainer.train_dataset)


def _options(fair: bool) -> dict[str, Any]:
    options = {"output_dir": tempfile.gettempdir(), "use_cpu": True, "bf16": False, "max_length": None}
    options |= {"report_to": [], "disable_tqdm": True}
    return options | ({"gradient_checkpointing": False} if fair else {})


def _plain(student: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)


def _score_labelled_only(model: Any) -> None:
    """Answer TRL's fused forward with logits at the labelled positions alone, kept for the backward."""

    def forward(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        mask = targets != -100
        scored = -F.cross_entropy(model.lm_head(hidden[:, :-1][mask]), targets[mask], reduction="none")
        logps = torch.zeros(mask.shape).masked_scatter(mask, scored)
        zeros = torch.zeros(mask.shape)
        return SimpleNamespace(
            log_probs=logps, entropy=zeros, is_top1=zeros.bool(), mean_logits=zeros, log_sum_sq_probs=zeros,
            loss=-scored.mean(), aux_loss=None, label_mask=mask, shift_labels=targets,
        )  # fmt: skip

    model.forward = forward


def clear(model: Any) -> None:
    for values in model.parameters():
        values.grad = None


def gradient_of(model: Any) -> dict[str, Tensor]:
    return {name: values.grad.clone() for name, values in model.named_parameters()}
