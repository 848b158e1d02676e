"""A step in packs is the plain computation of its rows, for random trees, pair sets and switches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import distance, gradients, in_float64, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from cotree.models.encode import EncodedChain, EncodedPair, prefix_tokens
from cotree.models.families import FAMILIES
from cotree.train.dpo import PairTrainer
from cotree.train.model import load_model
from cotree.train.settings import DPO, SFT
from cotree.train.sft import ChainTrainer
from cotree.train.trainer import training_arguments

END = 2


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny model, plain and as it is trained, each in float64 and in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return {
        "plain": in_float64(AutoModelForCausalLM.from_pretrained(folder)),
        "plain32": AutoModelForCausalLM.from_pretrained(folder),
        "packed": in_float64(load_model(folder)),
        "packed32": load_model(folder),
    }


@st.composite
def pair_sets(draw: st.DrawFn) -> list[EncodedPair]:
    """Pairs of the leaves of some random trees."""
    pairs = []
    tokens = st.lists(st.integers(3, 99), min_size=1, max_size=7)
    for _ in range(draw(st.integers(1, 3))):
        prompt, branches = draw(tokens), [draw(tokens)]
        for _ in range(draw(st.integers(1, 5))):
            parent = draw(st.sampled_from(branches))
            branches.append(parent[: draw(st.integers(0, len(parent)))] + draw(tokens))
        leaves = [list(leaf) for leaf in dict.fromkeys((*branch, END) for branch in branches)]
        if len(leaves) < 2:
            leaves.append([*leaves[0][:-1], 3, END])
        for _ in range(draw(st.integers(1, 4))):
            chosen, rejected = draw(st.permutations(leaves))[:2]
            pairs.append(EncodedPair(prompt, chosen, rejected, prefix_tokens(chosen, rejected)))
    return pairs


switches = st.builds(
    DPO,
    loss=st.sampled_from(["sigmoid", "length_normalised", "simpo", "ld_dpo"]),
    beta=st.floats(0.05, 1),
    label_smoothing=st.floats(0, 0.4),
    simpo_gamma=st.floats(0, 1),
    ld_alpha=st.floats(0, 1),
    reference_free=st.booleans(),
    alpha=st.sampled_from([0.0, 0.7]),
    mask_prefix=st.booleans(),
    sft_norm=st.sampled_from(["token", "pair"]),
    sft_scope=st.sampled_from([None, "full", "suffix", "dedup"]),
    pack_tokens=st.integers(1, 120),
)


def plain_logps(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def plain_margin(logps: Tensor, pair: EncodedPair, other: list[int], s: DPO) -> Tensor:
    """The sum or mean of one side, written down from the papers."""
    kept = logps[pair.prefix if s.mask_prefix else 0 :]
    if s.loss in ("length_normalised", "simpo"):
        return kept.mean()
    if s.loss == "ld_dpo":
        shorter = min(len(logps), len(other)) - (len(logps) - len(kept))
        return kept[: max(shorter, 0)].sum() + s.ld_alpha * kept[max(shorter, 0) :].sum()
    return kept.sum()


def plain_loss(model: Any, rows: list[EncodedPair], s: DPO) -> Tensor:
    preferences, sums, counts, means = [], [], [], []
    ways = Counter(tuple(row.prompt + row.chosen[: end + 1]) for row in rows for end in range(len(row.chosen)))
    for pair in rows:
        chosen = plain_logps(model, pair.prompt, pair.chosen)
        rejected = plain_logps(model, pair.prompt, pair.rejected)
        d = plain_margin(chosen, pair, pair.rejected, s) - plain_margin(rejected, pair, pair.chosen, s)
        d = s.beta * (d - (pair.reference[0] - pair.reference[1])) - (s.simpo_gamma if s.loss == "simpo" else 0)
        e = s.label_smoothing
        preferences.append(-(1 - e) * d.sigmoid().log() - e * (-d).sigmoid().log())
        weights = [1.0] * len(chosen)
        if s.scope == "suffix":
            weights = [float(at >= pair.prefix) for at in range(len(chosen))]
        if s.scope == "dedup":
            weights = [1 / ways[tuple(pair.prompt + pair.chosen[: end + 1])] for end in range(len(chosen))]
        sums.append(-(chosen * torch.tensor(weights, dtype=torch.float64)).sum())
        counts.append(sum(weights))
        means.append(sums[-1] / counts[-1])
    sft = torch.stack(sums).sum() / sum(counts) if s.sft_norm == "token" else torch.stack(means).mean()
    return torch.stack(preferences).mean() + s.alpha * sft


@settings(max_examples=15, deadline=None)
@given(pairs=pair_sets(), switch=switches, seed=st.integers(0, 99))
def test_a_step_of_pairs_is_the_plain_computation(
    models: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[EncodedPair],
    switch: DPO,
    seed: int,
) -> None:
    out = tmp_path_factory.getbasetemp() / "unused"
    values = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(seed)) * switch.has_reference
    rows = [replace(pair, reference=tuple(row)) for pair, row in zip(pairs, values.tolist(), strict=True)]
    expected, gradient = plain_gradient(models["plain"], rows, switch)
    # Float32 rounds each term before it cancels: a row against its mirror, the smoothed loss against itself. How far a
    # processor's rounding carries, the plain computation in float32 says: packing may not add to it.
    apart = [(row, change) for row in rows for change in ({}, {"label_smoothing": 0.0})]
    terms = [plain_gradient(models["plain"], [row], switch.model_copy(update=change))[1] for row, change in apart]
    # Where a saturated loss leaves hardly any gradient, what remains is the rounding of tokens' gradients of about 1.
    size = max(1e-5, norm(gradient), *(norm(term) / len(rows) for term in terms))
    rounding = max(2e-5 * size, 4 * difference(plain_gradient(models["plain32"], rows, switch)[1], gradient))
    for name, loss_limit, limit in (("packed", 1e-10, 1e-8 * size), ("packed32", 1e-4, rounding)):
        trainer = PairTrainer(models[name], [rows], training_arguments(out, switch, 1, 0), switch)
        loss, found = gradients(trainer, rows)
        assert abs(loss - expected) <= loss_limit * max(1, abs(expected))
        assert difference(found, gradient) <= limit


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return norm({name: one[name] - other[name] for name in other})


def plain_gradient(model: Any, rows: list[EncodedPair], switch: DPO) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = plain_loss(model, rows, switch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: values.grad for name, values in model.named_parameters()}


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(values.square().sum().item() for values in gradient.values()))


@settings(max_examples=10, deadline=None)
@given(pairs=pair_sets(), cap=st.integers(1, 120), scope=st.sampled_from(["full", "dedup"]))
def test_a_step_of_chains_is_the_plain_computation(
    models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, pairs: list[EncodedPair], cap: int, scope: Any
) -> None:
    rows = [EncodedChain(pair.prompt, completion) for pair in pairs for completion in (pair.chosen, pair.rejected)]
    plain = models["plain"]
    plain.zero_grad()
    edges: dict[tuple[int, ...], list[Tensor]] = {}
    for row in rows:
        for end, value in enumerate(plain_logps(plain, row.prompt, row.completion), 1):
            edges.setdefault((*row.prompt, *row.completion[:end]), []).append(value)
    scored = [v for values in edges.values() for v in (values if scope == "full" else values[:1])]
    expected = -torch.stack(scored).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    switch = SFT(pack_tokens=cap, sft_scope=scope)
    arguments = training_arguments(tmp_path_factory.getbasetemp() / "unused", switch, 1, 0)
    trainer = ChainTrainer(models["packed"], [rows], arguments, switch)
    loss, found = gradients(trainer, rows)
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    assert distance(found, {name: values.grad for name, values in plain.named_parameters()}) < 1e-9
