"""The planned memory: parameters as published, and the optimizer's numbers as it really has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.tiny_student import tiny_model

from cotree.base.errors import UsageError
from cotree.train.memory import empty_model, shapes_of, training_memory
from cotree.train.model import load_model
from cotree.train.settings import DPO, SFT, LoRA

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
PUBLISHED = {
    LLAMA: 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_the_paper_have_their_published_parameters(name: str) -> None:
    assert empty_model(shapes_of(name)).num_parameters() == PUBLISHED[name]


def test_shapes_need_no_weights_but_must_be_known(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path / "tiny")
    assert shapes_of(str(tmp_path / "tiny")).hidden_size == 64
    assert shapes_of(f"{LLAMA}@main").num_hidden_layers == 32
    with pytest.raises(UsageError, match=r"^no weights `nowhere` are here"):
        shapes_of("nowhere")


@pytest.mark.parametrize("lora", [None, LoRA(rank=3)])
def test_the_optimizer_has_what_is_planned(lora: LoRA | None, student: Path) -> None:
    model = load_model(student, lora)
    planned = training_memory(shapes_of(str(student)), SFT(lora=lora, precision="fp32"), processes=1, tokens=9)
    assert planned.weights == 4 * sum(values.numel() for values in model.parameters())
    trained = [values for values in model.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for values in trained:
        values.grad = torch.ones_like(values)
    optimizer.step()
    assert planned.gradients == 4 * sum(values.numel() for values in trained)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert planned.moments == 4 * sum(value.numel() for value in moments)


def test_what_is_set_changes_the_plan() -> None:
    config = shapes_of(LLAMA)
    plain = training_memory(config, SFT(precision="fp32"), processes=1, tokens=2048)
    copies = training_memory(config, SFT(precision="fp32"), processes=2, tokens=2048)
    assert (copies.weights, copies.moments) == (plain.weights, plain.moments)
    assert copies.gradients == 2 * plain.gradients, "DDP sends them from a copy"
    shards = training_memory(config, SFT(precision="fp32", shard=True), processes=8, tokens=2048)
    assert (shards.gradients, shards.moments) == (plain.gradients // 8, plain.moments // 8)
    assert plain.weights / 8 < shards.weights < plain.weights / 3, "and the layers that are gathered"
    alone = training_memory(config, SFT(precision="fp32", shard=True), processes=1, tokens=2048)
    assert alone == plain
    again = training_memory(config, SFT(precision="fp32", gradient_checkpointing=True), processes=1, tokens=2048)
    assert again.activations < plain.activations / 3
    rounded = training_memory(config, SFT(precision="bf16"), processes=1, tokens=2048)
    assert rounded.activations < plain.activations
    assert plain.reference == 0
    dpo = training_memory(config, DPO(precision="fp32", shard=True), processes=64, tokens=2048)
    assert dpo.peak == dpo.reference > plain.weights, "the reference is computed by whole models"
