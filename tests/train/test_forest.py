"""A chain in a forest gets what it gets alone, from every family, attention and pack; the rest is refused by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import in_float64, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from transformers import AutoConfig, AutoModelForCausalLM

from cotree.base.errors import UsageError
from cotree.models.encode import EncodedChain
from cotree.models.families import FAMILIES
from cotree.train.attention import ATTENTION, Layout, dense_attention, flex_attention
from cotree.train.forest import Forest, Scored, forest_logps, forest_tokens, multiplicities, packs
from cotree.train.model import load_model
from cotree.train.student import family_of


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny model in float64 as it is trained, and the same with transformers' own attention."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, tied=request.param != "qwen2").save_pretrained(folder)
    alone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return in_float64(load_model(folder)), in_float64(alone)


# A tree of chains: each goes on for a while where an earlier one was left. Few different tokens, so that chains also
# meet by chance, are each other's beginnings, or are the same.
@st.composite
def trees(draw: st.DrawFn) -> list[Scored]:
    token = st.integers(0, 3)
    chains = [draw(st.lists(token, min_size=2, max_size=12))]
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.sampled_from(chains))
        chain = start[: draw(st.integers(0, len(start)))] + draw(st.lists(token, max_size=8))
        chains.append(chain if len(chain) > 1 else [*chain, 1, 2])
    chains = draw(st.permutations(chains))
    return [Scored(chain, draw(st.integers(1, len(chain) - 1))) for chain in chains]


@settings(max_examples=30, deadline=None)
@given(chains=trees(), seed=st.integers(0, 999))
def test_each_chain_gets_what_it_gets_alone(models: tuple[Any, Any], chains: list[Scored], seed: int) -> None:
    together, alone = models
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(len(c.ids) - c.first, generator=generator, dtype=torch.float64) for c in chains]

    ours = forest_logps(together, chains)
    together.zero_grad()
    sum((values * weight).sum() for values, weight in zip(ours, weights, strict=True)).backward()  # type: ignore[union-attr]

    alone.zero_grad()
    for row, values, weight in zip(chains, ours, weights, strict=True):
        logits = alone(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        expected = logits[torch.arange(row.first - 1, len(row.ids) - 1), row.ids[row.first :]]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
        (expected * weight).sum().backward()
    for (name, mine), (_, theirs) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=name)


@given(chains=trees())
def test_a_forest_holds_each_beginning_once_and_a_token_sees_its_ancestors(chains: list[Scored]) -> None:
    forest = Forest([chain.ids for chain in chains])
    beginnings = {tuple(chain.ids[:end]) for chain in chains for end in range(1, len(chain.ids))}
    assert len(forest.ids) == len(beginnings)
    seen = torch.zeros(len(forest.ids), len(forest.ids), dtype=torch.bool)
    for chain, path in zip(chains, forest.paths, strict=True):
        assert forest.ids[path].tolist() == chain.ids[:-1]
        assert forest.positions[path].tolist() == list(range(len(path)))
        for depth, place in enumerate(path):
            seen[place, path[: depth + 1]] = True
    row = torch.arange(len(seen))
    assert torch.equal((row <= row[:, None]) & (row[:, None] < forest.layout.ends), seen)
    lengths, visibles = forest.layout.segments
    segments = torch.split(seen, lengths, dim=1)
    for run, visible in zip(torch.split(row, [own for _, own in forest.layout.runs]), visibles, strict=True):
        attended = torch.cat([segments[at][run] for at in visible], dim=1)
        assert torch.equal(attended, torch.ones_like(attended).tril(attended.shape[1] - len(run)))
        assert attended.sum() == seen[run].sum()
    scored = [tuple(c.ids[: end + 1]) for c in chains for end in range(c.first, len(c.ids))]
    assert torch.cat(multiplicities(chains)).tolist() == [scored.count(edge) for edge in scored]


@settings(max_examples=10, deadline=None)
@given(chains=trees(), heads=st.sampled_from([(4, 2), (2, 2)]))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_attends_to_the_same(chains: list[Scored], heads: tuple[int, int]) -> None:
    """Its eager form: the compiled one needs CUDA for a backward."""
    layout = Forest([chain.ids for chain in chains]).layout
    query, key, value = (torch.randn(1, n, len(layout.ends), 16, dtype=torch.float64) for n in (*heads, heads[1]))
    dense = dense_attention(query, key, value, layout=layout, scaling=0.3)
    flex = flex_attention(query, key, value, layout=layout, scaling=0.3)
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-10)


# Lengths around multiples of a block, and leaves that begin and end within one.
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), leaves=st.integers(1, 8), longest=st.sampled_from([3, 100, 128, 129, 256, 500]))
def test_the_block_mask_is_that_of_a_test_of_every_pair(seed: int, leaves: int, longest: int) -> None:
    source = random.Random(seed)
    chains = [[source.randrange(9) for _ in range(source.randint(2, longest))]]
    for _ in range(leaves):
        start = source.choice(chains)
        rest = source.choice([1, 128, source.randint(1, longest)])
        chains.append([*start[: source.randint(1, len(start))], *(source.randrange(9) for _ in range(rest))])
    layout = Forest(chains).layout
    found, tokens = layout.flex_mask, len(layout.ends)
    expected = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
    for ours, theirs in zip(found.as_tuple(), expected.as_tuple(), strict=True):
        same = torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs  # type: ignore[arg-type]
        assert same


def test_the_block_mask_of_a_long_row_takes_no_memory_of_every_pair() -> None:
    tokens = 2**18  # every pair would be 64 GiB
    ends = torch.full((tokens,), tokens)
    ends[tokens // 2 :] = torch.arange(tokens // 2, tokens) + 1  # leaves of one token
    found = Layout(ends, []).flex_mask
    full = found.full_kv_num_blocks
    assert full is not None and int(full.sum()) == sum(min(row, 1024) for row in range(2048))
    assert int(found.kv_num_blocks.sum()) == 2048


def test_a_handful_of_graphs_of_flex_attention_serves_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    attend = torch.compile(torch_flex_attention, dynamic=True, fullgraph=True, backend=counter)
    for tokens in (400, 5, 127, 128, 129, 384, 1000, 31, 256):
        mask = Layout(torch.full((tokens,), tokens), [([*range(tokens)], tokens)]).flex_mask
        query, key = (torch.randn(1, heads, tokens, 16) for heads in (4, 2))
        attend(query, key, key, block_mask=mask, enable_gqa=True)
    # One block, more, and once as many as there are heads: the first 400 tokens, whose four blocks are taken for those.
    assert counter.frame_count <= 3


@given(chains=trees(), cap=st.integers(1, 60), more=trees())
def test_packs_hold_each_row_once_under_the_cap(chains: list[Scored], more: list[Scored], cap: int) -> None:
    rows = [EncodedChain(chain.ids[: chain.first], chain.ids[chain.first :]) for chain in [*chains, *more]]
    dealt = packs(rows, cap)
    assert sorted(id(row) for pack in dealt for row in pack) == sorted(map(id, rows))
    for pack in dealt:
        tokens = len({tuple(row.sequences[0][:end]) for row in pack for end in range(1, row.tokens + 1)})
        assert forest_tokens(pack) == tokens
        assert tokens <= cap or len(pack) == 1
    assert len(packs(rows, 10_000)) == 1


def test_logits_exist_only_where_a_token_is_scored_and_once(models: tuple[Any, Any]) -> None:
    seen: list[torch.Size] = []
    handle = models[0].lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape))
    chains: Sequence[Scored] = [Scored([*range(20), 30], 18), Scored([*range(19), 7, 8, 9], 18)]
    forest_logps(models[0], chains)
    handle.remove()
    assert seen == [torch.Size([1, 1 + 2 + 3, 300])]  # the shared token once


def test_the_attention_refuses_to_be_used_without_a_layout(models: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'layout'"):
        models[0](torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: AutoConfig.for_model("gpt2"), "cannot train 'gpt2' models: supported are llama, mistral"),
        (
            lambda: AutoConfig.for_model("gemma3_text"),
            "cannot train 'gemma3_text' models: supported",
        ),
        (lambda: tiny_config("llama", attention_dropout=0.1), "cannot train with attention_dropout = 0.1"),
        (lambda: tiny_config("llama", attn_implementation="flash_attention_2"), "cannot train with FlashAttention-2"),
        (lambda: tiny_config("mistral", sliding_window=64), "cannot train a model with sliding-window layers"),
        (
            lambda: tiny_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "cannot train a model with sliding-window layers",
        ),
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
