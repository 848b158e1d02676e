"""What layers compute again in the backward pass: the same bits forward, the same gradients, and less that is kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_student import distance, tiny_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cotree.models.families import FAMILIES
from cotree.train.attention import ATTENTION
from cotree.train.forest import Forest
from cotree.train.model import checkpoint_layers, load_model
from cotree.train.settings import SFT, LoRA
from cotree.train.sft import ChainTrainer
from cotree.train.trainer import training_arguments

CHAINS = [list(range(3, 63)), list(range(3, 33)) + list(range(70, 95))]


class Made(TorchDispatchMode):
    """Every storage that is seen inside, and how much of them still lives, known ones aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for values in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(values, Tensor):
                storage = values.untyped_storage()
                self.storages.append((StorageWeakRef(storage), storage.nbytes()))  # type: ignore[no-untyped-call]
        return result

    def living(self, known: set[int]) -> int:
        living = {ref.cdata: size for ref, size in self.storages if not ref.expired()}  # type: ignore[no-untyped-call]
        return sum(size for storage, size in living.items() if storage not in known)


def step(model: Any, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and the bytes that are kept for the backward pass."""
    forest = Forest(CHAINS)
    model.train()
    precision = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()
    with Made() as made, precision:
        logits = model(
            input_ids=forest.ids[None], position_ids=forest.positions[None], use_cache=False, layout=forest.layout
        ).logits
    weights = {StorageWeakRef(v.untyped_storage()).cdata for v in model.parameters()}  # type: ignore[no-untyped-call]
    kept = made.living(weights)
    logits.float().log_softmax(-1)[0, :-1].gather(1, forest.ids[1:, None]).mean().backward()
    return logits, {n: v.grad for n, v in model.named_parameters() if v.grad is not None}, kept


@pytest.mark.parametrize("kind", ["full", "lora", "bf16", "lora, bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_and_keeps_less(family: str, kind: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    lora = LoRA(rank=4, alpha=8) if "lora" in kind else None
    plain, less = (load_model(tmp_path, lora) for _ in range(2))
    checkpoint_layers(less, keep_matrix_products=True)
    (before, expected, all_of_it), (after, found, rest) = (step(model, "bf16" in kind) for model in (plain, less))
    assert torch.equal(before, after)
    assert found.keys() == expected.keys()
    assert distance(found, expected) < 1e-6
    assert rest < {"full": 0.59, "lora": 0.66, "bf16": 0.45, "lora, bf16": 0.51}[kind] * all_of_it


class Counted(TorchDispatchMode):
    """How often each operation is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "factor"), [({}, 1), ({"gradient_checkpointing": True}, 2), ({"compile": True}, 1)]
)
def test_matrix_products_and_attention_are_computed_again_only_where_asked(
    changes: dict[str, bool], factor: int, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    settings = SFT.model_validate(changes)
    trainer = ChainTrainer(load_model(tmp_path), [], training_arguments(tmp_path, settings, 1, 0), settings)
    with Counted() as counted:
        step(trainer.model)
    layers, runs = trainer.model.config.num_hidden_layers, len(Forest(CHAINS).layout.runs)
    assert counted.calls["_scaled_dot_product_flash_attention_for_cpu"] == factor * layers * runs
    forward, backward = 7 * layers + 1, 2 * (7 * layers + 1)
    # The last product of a layer is not needed again.
    assert counted.calls["mm"] == forward + backward + (factor - 1) * 6 * layers
    assert counted.calls["rsqrt"] == (2 * layers + 1) + (0 if "compile" in changes else 2 * layers), "norms are"


@pytest.fixture
def wrapped(tmp_path: Path) -> Any:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    model.set_attn_implementation("sdpa")
    checkpoint_layers(model, keep_matrix_products=True)
    return model.train()


def test_what_no_backward_pass_reads_is_freed(tmp_path: Path) -> None:
    """As after Ctrl-C between the two passes: torch's collector does not see through an operation that holds itself."""
    tiny_model("llama").save_pretrained(tmp_path)
    for implementation in ("sdpa", ATTENTION):
        model = load_model(tmp_path)
        model.set_attn_implementation(implementation)
        checkpoint_layers(model, keep_matrix_products=True)
        model.train()
        layout = {"layout": Forest(CHAINS[:1]).layout} if implementation == ATTENTION else {}
        loss = model(input_ids=torch.tensor([CHAINS[0][:-1]]), use_cache=False, **layout).logits.sum()
        weights = [weakref.ref(each) for each in model.parameters()]
        assert loss.requires_grad
        del model, loss
        gc.collect()
        assert [each() for each in weights] == [None] * len(weights)


def test_a_copy_of_the_model_calls_itself(wrapped: Any) -> None:
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        for values in copied.parameters():
            values.zero_()
    logits = copied(torch.tensor([CHAINS[0]])).logits
    assert not logits.any()
    logits.sum().backward()
    assert all(values.grad is None for values in wrapped.parameters())


def test_changes_in_place_are_made_again(wrapped: Any, tmp_path: Path) -> None:
    plain = load_model(tmp_path)
    plain.set_attn_implementation("sdpa")
    for model in (plain, wrapped):
        layer = model.model.layers[0]
        layer.input_layernorm.register_forward_hook(lambda _, given, result: result.mul_(2))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: (given[0].mul_(2),))
        model(torch.tensor([CHAINS[0]])).logits.log_softmax(-1)[0, :, 5].mean().backward()
    found, expected = ({n: v.grad for n, v in model.named_parameters()} for model in (wrapped, plain))
    assert distance(found, expected) < 1e-6
