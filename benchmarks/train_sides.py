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
from typing import Any, Literal

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
Precision = Literal["fp32", "bf16"]


def cotree_step(
    student: Path, shape: Shape, pack_tokens: int, reference: bool = True, *, precision: Precision = "fp32"
) -> tuple[Any, Step]:
    """The model, and what computes a step, given a micro-batch: gradients stay on the model, the loss is returned.

    `reference` false leaves it at 0, which changes no size: what memory is measured with.
    """
    rows, model, unused = shape.rows, load_model(student), Path(tempfile.gettempdir()) / "unused"
    trainer: Any
    if shape.loss == "sft":
        sft = SFT(batch_size=len(rows), pack_tokens=pack_tokens, precision=precision)
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
            precision=precision,
        )
        arguments = training_arguments(unused, dpo, 1, 0)
        rows = with_reference(model.to(arguments.device), rows, arguments, dpo) if reference else rows
        trainer = PairTrainer(model, [rows], arguments, dpo)
    model = _prepared(trainer)
    return model, lambda _: float(trainer.training_step(model, rows))


def trl_step(
    student: Path,
    shape: Shape,
    fair: bool,
    reference: bool = True,
    *,
    precision: Precision = "fp32",
    attention: str = "sdpa",
) -> tuple[Any, Step]:
    """The same of TRL's SFTTrainer or DPOTrainer; gradients are accumulated over micro-batches as its loop does."""
    options = {"output_dir": tempfile.gettempdir(), "use_cpu": not torch.cuda.is_available(), "max_length": None}
    options |= {"bf16": precision == "bf16", "report_to": [], "disable_tqdm": True}
    if fair:
        options |= {"gradient_checkpointing": False}
    if fair and shape.loss != "sft":
        options |= {"precompute_ref_log_probs": True}
    trainer, rows = (_trl_sft if shape.loss == "sft" else _trl_dpo)(student, shape, options, attention)
    if fair and not torch.cuda.is_available():
        _score_labelled_only(trainer.model)  # on CUDA it does so itself
    if fair and shape.loss != "sft":
        for row in rows:
            chosen = rejected = torch.zeros(1)
            if reference:  # it is the model itself before its first step
                with torch.no_grad():
                    inputs = trainer._prepare_inputs(trainer.data_collator([row]))
                    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
            row |= {"ref_chosen_logps": chosen.item(), "ref_rejected_logps": rejected.item()}
    model = _prepared(trainer)
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(micro_batch: int) -> float:
        model.train()
        parts = [rows[at : at + micro_batch] for at in range(0, len(rows), micro_batch)]
        total = 0.0
        for part in parts:
            loss = trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(part))) / len(parts)
            loss.backward()
            total += loss.item()
        return total

    return model, step


def _prepared(trainer: Any) -> Any:
    """Its model as it trains it: on its device, and under autocast where the precision is bf16."""
    trainer.create_accelerator_and_postprocess()
    return trainer.accelerator.prepare_model(trainer.model)


def _trl_dpo(student: Path, shape: Shape, options: dict[str, Any], attention: str) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    losses = ["sigmoid", "sft"] if shape.loss == "joint" else ["sigmoid"]
    config = DPOConfig(**options, beta=BETA, loss_type=losses, loss_weights=[1.0] * len(losses))
    trainer = DPOTrainer(
        model=_plain(student, attention),
        ref_model=None if config.precompute_ref_log_probs else _plain(student, attention),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in shape.rows]
    return trainer, rows


def _trl_sft(student: Path, shape: Shape, options: dict[str, Any], attention: str) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": c.prompt + c.completion, "completion_mask": [0] * len(c.prompt) + [1] * len(c.completion)}
        for c in shape.rows
    ]
    trainer = SFTTrainer(
        model=_plain(student, attention),
        args=SFTConfig(**options, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    return trainer, list(trainer.train_dataset)


def _plain(student: Path, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation=attention)


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
