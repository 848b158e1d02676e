"""What the backward pass computes again: the same bits forward, the same gradients, and less that is kept."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.tiny_student import distance, tiny_model
from torch import Tensor

from cotree.config import LoRA, TrainSFT
from cotree.train.families import FAMILIES
from cotree.train.model import load_model
from cotree.train.recompute import keep_less
from cotree.train.sft import ChainTrainer
from cotree.train.trainer import training_arguments

IDS = torch.arange(3, 63)[None]


def step(model: Any, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and the bytes that are kept for the backward pass, weights aside."""
    weights = {values.untyped_storage().data_ptr() for values in model.parameters()}
    kept: dict[int, int] = {}

    def keep(values: Tensor) -> Tensor:
        storage = values.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return values

    precision = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values), precision:
        logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None]).mean().backward()
    return logits, {n: v.grad for n, v in model.named_parameters() if v.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("kind", ["full", "lora", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_and_keeps_less(family: str, kind: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    lora = LoRA(rank=4, alpha=8) if kind == "lora" else None
    plain, less = (load_model(tmp_path, lora) for _ in range(2))
    for model in (plain, less):
        model.set_attn_implementation("sdpa")
    keep_less(less)
    products: list[weakref.ref[Tensor]] = []
    for name, module in less.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(lambda _, given: products.append(weakref.ref(given[0])))
    alive: list[bool] = []
    less.get_output_embeddings().register_forward_hook(lambda *_: alive.extend(ref() is not None for ref in products))
    (before, expected, all_of_it), (after, found, rest) = (step(model, kind == "bf16") for model in (plain, less))
    assert torch.equal(before, after)
    assert found.keys() == expected.keys()
    assert distance(found, expected) < (0.02 if kind == "bf16" else 1e-6)
    assert rest < 0.85 * all_of_it
    assert alive == [False, False], "what down_proj reads is not kept (its own hooks hide it from the count)"


@pytest.mark.parametrize(("changes", "less"), [({}, True), ({"gradient_checkpointing": True}, False)])
def test_checkpointed_layers_have_their_own_way(changes: dict[str, bool], less: bool, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    settings = TrainSFT.model_validate(changes)
    trainer = ChainTrainer(load_model(tmp_path), [], training_arguments(tmp_path, settings, 1, 0), settings)
    assert any("forward" in vars(module) for module in trainer.model.modules()) == less
