"""Sequences laid end to end get what they would get alone, from every supported family; the rest is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.tiny_student import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from cotree.errors import UsageError
from cotree.train.families import FAMILIES, family_of
from cotree.train.layout import ATTENTION, Scored, sequence_logps
from cotree.train.trainer import load_model


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny model in float64 as it is trained, and the same with transformers' own attention."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, tied=request.param != "qwen2").save_pretrained(folder)
    alone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    return load_model(folder).double(), alone


sequences = st.lists(
    st.integers(2, 24).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length - 1))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(shapes=sequences, seed=st.integers(0, 999))
def test_each_sequence_gets_what_it_gets_alone(
    models: tuple[Any, Any], shapes: list[tuple[int, int]], seed: int
) -> None:
    together, alone = models
    generator = torch.Generator().manual_seed(seed)
    rows = [Scored(torch.randint(0, 300, (length,), generator=generator).tolist(), first) for length, first in shapes]
    weights = [torch.randn(row.count, generator=generator, dtype=torch.float64) for row in rows]

    ours = sequence_logps(together, rows)
    together.zero_grad()
    sum((values * weight).sum() for values, weight in zip(ours, weights, strict=True)).backward()  # type: ignore[union-attr]

    alone.zero_grad()
    for row, values, weight in zip(rows, ours, weights, strict=True):
        logits = alone(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        expected = logits[torch.arange(row.first - 1, len(row.ids) - 1), row.ids[row.first :]]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
        (expected * weight).sum().backward()
    for (name, mine), (_, theirs) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=name)


def test_logits_exist_only_where_a_token_is_scored(models: tuple[Any, Any]) -> None:
    seen: list[torch.Size] = []
    handle = models[0].lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape))
    sequence_logps(models[0], [Scored(list(range(20)), 18), Scored(list(range(30)), 27)])
    handle.remove()
    assert seen == [torch.Size([1, 5, 300])]


def test_the_attention_refuses_to_be_used_without_segments(models: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="needs segment_lengths"):
        models[0](torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: AutoConfig.for_model("gpt2"), "cannot train 'gpt2' models: supported are llama, mistral"),
        (lambda: tiny_config("llama", attention_dropout=0.1), "cannot train with attention_dropout = 0.1"),
        (lambda: tiny_config("mistral", sliding_window=64), "cannot train a model with sliding-window layers"),
        (
            lambda: tiny_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "cannot train a model with sliding-window layers",
        ),
        (lambda: tiny_config("llama", attn_implementation="flash_attention_2"), "cannot train with FlashAttention-2"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        family_of(config())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot load the student"):
        load_model(tmp_path)


def test_a_saved_model_does_not_remember_our_attention(models: tuple[Any, Any], tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
